"""The comparison of the backbones: its command, its models, what they measure, and its page with all results, with some, and with none."""
import io, json, math, subprocess, sys, tarfile, types
import pytest, torch
from torch import nn
from notebooks import root

sys.path.insert(0, str(root/'nbs'/'tutorials'))
import compare_backbones as C
import small_backbones as S
from backbone_comparison import IDEAS, NAMES, NOISE, Backbones, forms, recipe

OURS, TIMMS = ('dat', 'dat_pp', 'dilateformer', 'dilateformer_dense'), ('swin', 'convnext', 'vit', 'resnet')
SPEED = dict(train=100., valid=300.)

@pytest.fixture(autouse=True, scope='module')
def no_screen():
    import matplotlib
    matplotlib.use('agg')

# ---- models

@pytest.mark.parametrize('model', C.MODELS)
def test_forms_are_small_and_alike(model):
    "About three million parameters, ten logits, and a gradient for each parameter."
    if model in TIMMS: pytest.importorskip('timm')
    torch.manual_seed(0)
    m = S.build(model)
    assert 2.8e6 <= S.parameters(m) <= 3.2e6
    x = torch.randn(2, 3, C.RECIPE['size'], C.RECIPE['size'])
    out = m(x)
    assert out.shape == (2, 10) and out.isfinite().all()
    out.square().sum().backward()
    assert not [name for name, o in m.named_parameters() if o.requires_grad and o.grad is None]

@pytest.mark.parametrize('model', ['dat', 'vit'])
def test_what_decays(model):
    "Tables of places do not decay, neither in our models nor in timm's."
    if model in TIMMS: pytest.importorskip('timm')
    torch.manual_seed(0)
    m, images = S.build(model), (torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4))
    learn = S.learner(m, images, images, list('0123456789'), 1, {**C.RECIPE, 'bs': 4})
    learn.create_opt()
    spared = {id(o) for g in learn.opt.opt.param_groups if g['weight_decay'] == 0 for o in g['params']}
    for name, o in m.named_parameters():
        if 'table' in name or name == 'pos_embed': assert id(o) in spared, name
        elif name.endswith(('fc1.weight', 'conv1.weight', 'q_proj.weight')): assert id(o) not in spared, name

# ---- images

@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    "A `cifar10.tgz` of 3 classes with 8 images to train on and 6 to test, of one colour each, in no order."
    from PIL import Image
    path = tmp_path_factory.mktemp('data')/'cifar10.tgz'
    with tarfile.open(path, 'w:gz') as tar:
        for split, n in (('train', 8), ('test', 6)):
            for i in reversed(range(n)):
                for c, name in enumerate(('cat', 'bird', 'dog')):
                    file = io.BytesIO()
                    Image.new('RGB', (32, 32), (80 * c, 8 * i, 100)).save(file, 'png')
                    o = tarfile.TarInfo(f'cifar10/{split}/{name}/{i:04d}.png')
                    o.size = file.tell()
                    tar.addfile(o, io.BytesIO(file.getvalue()))
    return path

def test_images_are_read_in_order(archive):
    data = S.read_images(archive)
    (images, labels), (tests, _) = data['train'], data['test']
    assert data['vocab'] == ['bird', 'cat', 'dog'] and images.shape == (24, 32, 32, 3) and images.dtype == torch.uint8 and tests.shape[0] == 18
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert images[:, 0, 0, 0].tolist() == [80] * 8 + [0] * 8 + [160] * 8 and images[:8, 5, 5, 1].tolist() == [8 * i for i in range(8)]
    few, labels = S.first_of_each(*data['test'], 6)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and few[:, 0, 0, 1].tolist() == [0, 8] * 3

@pytest.mark.slow
def test_the_real_images():
    if not C.archive().is_file(): pytest.skip(f'no {C.archive()}: set DEFORMLIT_DATA')
    data = S.read_images(C.archive())
    assert len(data['vocab']) == 10
    for split, n in (('train', 5000), ('test', 1000)): assert data[split][0].shape == (10 * n, 32, 32, 3) and data[split][1].bincount().tolist() == [n] * 10

def test_moved_images():
    "Moved by up to 4 pixels, the border repeated; half of them mirrored. Nothing is there that was not."
    torch.manual_seed(0)
    x = torch.arange(32, dtype=torch.uint8)[None, :, None, None].expand(200, 32, 32, 3).clone()    # a pixel holds its row
    x[..., 1] = torch.arange(32, dtype=torch.uint8)                                                # and its column
    y = S.moved(x)
    assert y.shape == x.shape and y.dtype == torch.uint8 and y.min() == 0 and y.max() == 31
    rows, cols = y[:, 16, 16, 0].int() - 16, y[:, 16, :, 1].int()
    assert set(rows.tolist()) == set(range(-4, 5))
    mirrored = cols[:, 0] > cols[:, -1]
    assert .35 < mirrored.float().mean() < .65 and (cols.diff(dim=1).abs() <= 1).all()
    assert (y[..., 0] == y[:, :, :1, 0]).all() and (y[..., 1] == y[:, :1, :, 1]).all()

def test_prepared_images():
    x = S.prepared(torch.full((2, 32, 32, 3), 255, dtype=torch.uint8), 64)
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 0, 0], (1 - S.MEAN) / S.STD)

def test_batches_pass_by_pass():
    images, labels = torch.zeros(10, 32, 32, 3, dtype=torch.uint8), torch.arange(10)
    b = S.Batches(images, labels, list('0123456789'), 4, 32, 2)
    first = [y for _, y in b]
    assert len(b) == len(first) == 2 and len(set(torch.cat(first).tolist())) == 8 and all(x.shape == (4, 3, 32, 32) for _ in range(3) for x, _ in b)
    b = S.Batches(images, labels, list('0123456789'), 4, 32)
    assert len(b) == 3 and torch.cat([y for _, y in b]).tolist() == labels.tolist()

# ---- training

class Tiny(nn.Module):
    "A linear classifier of the mean colour."
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
    def forward(self, x): return self.head(x.mean((2, 3)))

def test_a_training_learns(archive, capsys):
    data = S.read_images(archive)
    recipe = {**C.RECIPE, 'bs': 8, 'size': 32, 'lr': .3}
    torch.manual_seed(0)
    learn, history, times = S.fit(Tiny(), data['train'], data['test'], data['vocab'], 3, 20, recipe)
    assert [o['seen'] for o in history] == [160, 320, 480] and history[-1]['epoch'] == 20 and len(times) == 3 and times == sorted(times) and times[0] > 0
    assert set(history[0]) == {'part', 'seen', 'epoch', 'train_loss', 'accuracy', 'valid_loss'}
    assert history[-1]['accuracy'] > .9 and history[-1]['train_loss'] < history[0]['train_loss'] and capsys.readouterr().out.count('accuracy') == 3
    rates = learn.recorder.lrs
    assert len(rates) == 60 and abs(rates[0] - .3 / 25) < 1e-6 and max(rates) > .29 and rates[-1] < 1e-2
    torch.manual_seed(0)
    again = S.fit(Tiny(), data['train'], data['test'], data['vocab'], 3, 20, recipe)[1]
    assert again == history

def test_speed(archive):
    data = S.read_images(archive)
    found = S.measure(Tiny(), data['train'], data['test'], data['vocab'], .05, {**C.RECIPE, 'bs': 8, 'size': 32})
    assert set(found) == {'train', 'valid'} and min(found.values()) > 0

@pytest.mark.parametrize('seconds', [1, 15, 60, 360])
def test_plan_fills_the_time(seconds):
    p = C.plan(seconds, 100., 64)
    assert 2 <= p['parts'] <= C.PARTS and p['steps'] >= 1
    if seconds >= 15: assert .8 * seconds < p['parts'] * p['steps'] * 64 / 100 <= seconds

# ---- reach

def loop_reach(weights, h, w, share):
    "As its docstring reads, in scalar arithmetic."
    b, n, q, k = weights.shape
    near, gaps, keys, maps = [0.] * max(h, w), 0., 0, {}
    for i in range(b):
        for m in range(n):
            for s in range(q):
                row, total = weights[i, m, s].tolist(), 0.
                for t, o in enumerate(row):
                    dy, dx = t // w - s // w, t % w - s % w
                    for r in range(max(h, w)): near[r] += o * (max(abs(dy), abs(dx)) <= r) / (b * n * q)
                    gaps += o * any(abs(dy) in (0, d) and abs(dx) in (0, d) for d in (1, 2, 3)) / (b * n * q)
                    maps.setdefault((dy, dx), []).append(o * h * w)
                for count, o in enumerate(sorted(row, reverse=True), 1):
                    total += o
                    if total >= share - 1e-9: break
                keys += count / (b * n * q)
    return near, gaps, keys, {o: sum(v) / len(v) for o, v in maps.items()}

def test_reach_is_what_it_says():
    torch.manual_seed(0)
    weights = (3 * torch.randn(2, 3, 12, 12, dtype=torch.float64)).softmax(-1)
    got = S.reach(weights, 3, 4)
    near, gaps, keys, maps = loop_reach(weights, 3, 4, .9)
    torch.testing.assert_close(torch.tensor(got['near']), torch.tensor(near)); assert math.isclose(got['keys'], keys) and math.isclose(got['gaps'], gaps) and math.isclose(got['near'][-1], 1)
    assert len(got['map']) == 5 and len(got['map'][0]) == 7
    for (dy, dx), o in maps.items(): assert math.isclose(got['map'][dy + 2][dx + 3], o)

def test_reach_of_equal_and_of_own_attention():
    n = 64
    equal = S.reach(torch.full((1, 1, n, n), 1 / n), 8, 8)
    assert math.isclose(equal['near'][1], (22 / 64)**2, rel_tol=1e-6) and equal['keys'] == 58 and all(math.isclose(o, 1, rel_tol=1e-6) for row in equal['map'] for o in row)
    own = S.reach(torch.eye(n)[None, None], 8, 8)
    assert own['near'] == [1.] * 8 and own['keys'] == 1 and own['map'][7][7] == n

def test_dense_weights_are_those_of_timm():
    pytest.importorskip('timm')
    torch.manual_seed(0)
    m, x = S.build('vit').eval(), torch.randn(2, 3, 64, 64)
    found, seen = S.dense_weights(m, x), []
    weights = [o for o, _ in found.values()]
    assert len(weights) == 9 and all(o.shape == (2, 5, 64, 64) for o in weights) and {o for _, o in found.values()} == {(8, 8)}
    hook = m.blocks[3].attn.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad(): m(x)
    hook.remove()
    (y, out), a = seen[0], m.blocks[3].attn
    v = a.qkv(y).unflatten(-1, (3, 5, 32))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close(a.proj((weights[3] @ v).transpose(1, 2).flatten(2)), out, atol=1e-5, rtol=1e-5)

def test_reach_of_models():
    "Over batches it is the mean over images; the dense DilateFormer has maps of its stages."
    torch.manual_seed(0)
    m, images = S.build('dilateformer_dense').eval(), torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    found, whole = S.measure_reach(m, images, 64, 4), S.measure_reach(m, images, 64, 6)
    assert found['images'] == 6 and [(o['h'], o['w']) for o in found['layers']] == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] * 6 + [(2, 2)] * 2 and len(json.dumps(found)) < 40_000
    for a, b in zip(found['layers'], whole['layers']): torch.testing.assert_close(torch.tensor(a['near'] + [a['keys'], a['gaps']]), torch.tensor(b['near'] + [b['keys'], b['gaps']]), atol=2e-3, rtol=2e-3)
    weights = m.stages[0][0].attn.weights(torch.randn(1, 30, 4, 4))
    assert weights.shape == (1, 3, 16, 16)

# ---- the official formulations

@pytest.mark.parametrize('model', OURS)
def test_official_formulations_agree(model):
    "The same numbers and gradients, by other ways, in parts that are all replaced."
    torch.manual_seed(0)
    ours, x = S.build(model).eval(), torch.randn(2, 3, 64, 64)
    for name, o in ours.named_parameters():
        if 'table' in name: nn.init.normal_(o)
    theirs = S.as_published(ours)
    changed = [type(b) for a, b in zip(ours.modules(), theirs.modules()) if type(a) is not type(b)]
    assert changed and not set(map(type, theirs.modules())) & set(S.formulations()) and S.same(ours, theirs, x) < 1e-5
    grads = []
    for m in (ours, theirs):
        m(x).square().sum().backward()
        grads.append({name: o.grad for name, o in m.named_parameters() if o.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, o in grads[0].items(): torch.testing.assert_close(grads[1][name], o, atol=1e-4 * max(1, o.abs().max().item()), rtol=1e-3, msg=lambda m: f'{name}: {m}')
    found = S.attentions(ours, x)
    assert found and all(S.same(m, S.as_published(m), o) < 1e-5 for m, o in found.values())

def test_race():
    a = nn.Linear(3, 3)
    found = S.race(a, a, torch.randn(5, 3), .01)
    assert set(found) == {'ours', 'official'} and all(o > 0 for rows in found.values() for o in rows.values())

# ---- the page

def fake(folder, model, accuracy, rate=100, reach=None):
    "The files of a run."
    parts = 10
    (folder/model).mkdir(parents=True)
    history = [dict(part=i, seen=i * 640, epoch=i * .0128, train_loss=2.3 / i, accuracy=accuracy * i / parts, valid_loss=1.) for i in range(1, parts + 1)]
    metrics = dict(accuracy=accuracy, tested=10_000, seconds=6400 / rate, times=[640 * i / rate for i in range(1, parts + 1)], parameters=3_000_000, threads=2, torch='2', speed=SPEED, history=history)
    if reach: metrics['reach'] = reach
    (folder/model/'config.json').write_text(json.dumps(dict(model=model, **C.RECIPE, parts=parts, steps=10, images=50_000)))
    (folder/model/'metrics.json').write_text(json.dumps(metrics))
    C.note(folder, model, 'run', dict(date='today', minutes=6, device='cpu', threads=2, machine=dict(cpu='x', cores=2, gpu=None), speed=SPEED))

def shown(o): return repr(o) if o is not None else ''

def test_nothing_was_run(tmp_path):
    c = Backbones(folder=tmp_path/'none')
    for f in (c.about, c.table, c.curves, c.buys, c.judge, c.reach, c.judge_reach, c.show_reach): assert shown(f()) == 'Not run yet: `make compare-backbones`.'
    for f in (c.forms, c.about_forms): assert 'make compare-backbones ARGS="--speed"' in shown(f())
    assert 'make compare-backbones ARGS="--device cuda"' in shown(Backbones(cuda=True, folder=tmp_path/'none').table())

def test_some_were_run(tmp_path):
    fake(tmp_path, 'swin', .4); fake(tmp_path, 'dat', .45, 80); fake(tmp_path, 'vit', .11)
    c = Backbones(folder=tmp_path)
    text = shown(c.table())
    assert text.count('not run yet') == 5 and '0.400' in text and '3.00 M' in text and '6,400' in text and '0.13' in text
    said = shown(c.judge())
    assert 'the best is DAT with accuracy 0.450' in said and 'ViT has hardly begun to learn' in said and '(Swin → DAT): a gain of 0.050, at 0.80 times the images per second' in said and 'ResNet' not in said
    assert c.curves() is None and c.curves('train_loss') is None and 'today' in shown(c.about()) and shown(c.reach()).startswith('Not run yet')

def test_all_were_run(tmp_path):
    for i, o in enumerate(C.MODELS): fake(tmp_path, o, .5 + i * .015, 100)
    c = Backbones(folder=tmp_path)
    assert list(c.runs) == list(C.MODELS) == list(NAMES) and 'not run yet' not in shown(c.table()) + shown(c.buys())
    assert shown(c.judge()).count('no difference that one seed could show') == sum(abs(C.MODELS.index(a) - C.MODELS.index(b)) * .015 < NOISE for _, a, b in IDEAS)

def a_reach(spreads):
    "A reach whose layers look so far."
    dy, dx = S.steps_between(8, 8)
    d = (dy**2 + dx**2).float()
    equal = S.reach(torch.full((1, 1, 64, 64), 1 / 64), 8, 8)
    return S.digits(dict(images=1, share=.9, layers=[dict(name=str(s), h=8, w=8, equal=equal, **S.reach((-d / s**2).softmax(-1)[None, None], 8, 8)) for s in spreads]))

def test_reach_is_shown_and_judged(tmp_path):
    fake(tmp_path/'a', 'vit', .5, reach=a_reach([1, 1.5, 2, 3, 4, 6]))
    c = Backbones(folder=tmp_path/'a')
    text = shown(c.reach())
    assert len(c.reach().rows) == 6 and '(58)' in text and '0.12' in text and c.show_reach() is None
    assert 'So shallow attention is local, more so than deep attention, and sparse here, too' in shown(c.judge_reach()) and 'most in layer 1,' in shown(c.judge_reach())
    fake(tmp_path/'b', 'vit', .5, reach=a_reach([6, 4, 3, 2, 1.5, 1]))
    assert 'So shallow attention is neither local nor sparse' in shown(Backbones(folder=tmp_path/'b').judge_reach())
    fake(tmp_path/'b', 'dilateformer_dense', .5, reach=a_reach([3]))
    assert 'In the first layer of the dense DilateFormer' in shown(Backbones(folder=tmp_path/'b').judge_reach())

def test_forms_are_shown(tmp_path):
    row = lambda what, ratio: dict(what=what, ours=dict(forward=10. * ratio, train=3.), official=dict(forward=10., train=2.))
    about = dict(date='today', device='cpu', threads=2, machine=dict(cpu='x', cores=2, gpu=None), batch=4)
    C.note(tmp_path, 'dat', 'forms', dict(about, model='dat_tiny', rows=[row('dat_tiny', 1.5), row('an attention', 2)]))
    c = Backbones(folder=tmp_path)
    assert '1.50x' in shown(c.forms()) and 'Ours is nowhere slower' in shown(c.about_forms()) and '1.50 (' in shown(c.about_forms())
    C.note(tmp_path, 'dat_pp', 'forms', dict(about, model='dat_pp_tiny', rows=[row('dat_pp_tiny', .8)]))
    assert 'Ours is slower in one place at least; the least of the ratios is 0.80 (dat_pp_tiny, forward)' in shown(Backbones(folder=tmp_path).about_forms())

def test_what_was_told():
    assert all(NAMES[o] in shown(forms()) for o in C.MODELS) and 'block=BasicBlock' in shown(forms())
    assert len(recipe().rows) == len(C.RECIPE)

# ---- the command

@pytest.fixture
def calls(monkeypatch, tmp_path):
    "The processes that would be started; they leave the files of a run."
    seen = []
    def process(code, words, **kwargs):
        job = json.loads(words[0])
        seen.append(job)
        if job['what'] == 'speed': open(job['out'], 'w').write(json.dumps([dict(what=job['model'], ours=dict(forward=2., train=1.), official=dict(forward=1., train=1.))]))
        else: fake(tmp_path/'files', job['model'], .5); (tmp_path/'files'/job['model']).rename((tmp_path/'out').resolve()/job['model'])
        return types.SimpleNamespace(returncode=0)
    (tmp_path/'out').mkdir()
    monkeypatch.setattr(C, 'process', process)
    monkeypatch.setenv('DEFORMLIT_DATA', str(tmp_path))
    (tmp_path/'cifar10.tgz').write_bytes(b'')
    return seen

def test_command(calls, tmp_path, capsys):
    out = tmp_path/'out'
    C.main(['--models', 'dat', 'resnet', '--out', str(out), '--minutes', '1', '--threads', '2'])
    assert [o['model'] for o in calls] == ['dat', 'resnet'] and calls[0]['seconds'] == 60 and calls[0]['valid'] == 2000 and calls[0]['tested'] == 10_000 and set(C.read(out/C.FILE)) == {'dat', 'resnet'}
    assert set(Backbones(folder=out).runs) == {'dat', 'resnet'}
    calls.clear()
    C.main(['--missing', '--models', 'dat', 'vit', '--out', str(out)])
    assert [o['model'] for o in calls] == ['vit']
    calls.clear(); capsys.readouterr()
    C.main(['--speed', '--models', 'dat', 'swin', '--out', str(out)])
    assert [o['model'] for o in calls] == ['dat_tiny'] and C.read(out/C.FILE)['dat']['forms']['rows'][0]['what'] == 'dat_tiny' and '2.00x' in capsys.readouterr().out
    assert set(C.read(out/C.FILE)['dat']) == {'run', 'forms'} and not list(out.glob('.*'))

def test_no_images(calls, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('DEFORMLIT_DATA', str(tmp_path/'nowhere'))
    assert C.main(['--out', str(tmp_path/'out')]) is None
    assert 'Skipped: there is no cifar10.tgz' in capsys.readouterr().out and not calls

@pytest.mark.parametrize('args', [['--models', 'alexnet'], ['--minutes', '0'], ['--minutes', 'nan'], ['--seconds', '-1'], ['--batch', '0'], ['--device', 'tpu'], ['--epochs', '3']])
def test_bad_options(args, capsys, calls):
    with pytest.raises(SystemExit) as e: C.main(args)
    assert e.value.code == 2 and args[0] in capsys.readouterr().err and not calls

@pytest.mark.slow
def test_it_trains(tmp_path):
    "For real, for some seconds."
    if not C.archive().is_file(): pytest.skip(f'no {C.archive()}: set DEFORMLIT_DATA')
    pytest.importorskip('timm')
    r = subprocess.run([sys.executable, C.__file__, '--models', 'vit', 'resnet', '--minutes', '.05', '--threads', '1', '--out', str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    c = Backbones(folder=tmp_path)
    assert set(c.runs) == {'vit', 'resnet'} and len(c.seen()['layers']) == 9 and all(o.metrics['tested'] == 200 for o in c.runs.values()) and all((tmp_path/o/'model.safetensors').exists() for o in c.runs)
