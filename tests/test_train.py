"""The commands: a run and its files, stopping and going on, everything that is refused, and finding digits in pictures."""
import io, json, os, re, signal, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
import deformlit.train as T
from deformlit.core import *
from deformlit.data import DigitScenes
from deformlit.native import needs_library
from deformlit.train import *

TINY = '--dim 16 --heads 2 --points 2 --queries 8 --decoder-layers 2 --ffn 16 --widths 8 8 16 --size 64 --items 8 --valid-items 4 --bs 4 --epochs 3 --threads 1'.split()
FILES = {'model.safetensors', 'config.json', 'metrics.json', 'losses.png', 'predictions.png', 'points.png'}

@pytest.fixture(autouse=True, scope='module')
def no_screen():
    import matplotlib
    matplotlib.use('agg')
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder of a run that was not interrupted."
    folder = tmp_path_factory.mktemp('runs')/'whole'
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, 'stdout', said)
        assert main_train([*TINY, '--out', str(folder)]) is None
    (folder/'said').write_text(said.getvalue())
    return folder

def files(folder): return {o.name for o in Path(folder).iterdir()} - {'said'}
def config(folder): return json.loads((folder/'config.json').read_text())
def metrics(folder): return json.loads((folder/'metrics.json').read_text())
def contents(folder): return {o.name: o.read_bytes() for o in sorted(folder.iterdir())}

def refused(capsys, main, args, *words):
    "The command ends with status 2 and one line on stderr that has these words."
    with pytest.raises(SystemExit) as e: main([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and err.startswith(f'deformlit-{main.__name__.removeprefix("main_")}: error: '), err
    for word in words: assert word in err, f'{word!r} is not in {err!r}'

# ---- a run

def test_files(whole):
    assert files(whole) == FILES
    for name in ('losses.png', 'predictions.png', 'points.png'):
        with Image.open(whole/name) as f: assert min(f.size) > 200 and np.asarray(f).std() > 5

def test_numbers(whole):
    m, c, way = metrics(whole), config(whole), 'eager' if needs_library('cpu') else 'native'
    assert (m['epochs'], m['seed'], m['backend'], m['threads'], m['torch']) == (3, 0, way, 1, torch.__version__)
    assert 0 < m['seconds'] < 600 and list(m['per_class']) == DigitScenes.vocab
    assert [o['epoch'] for o in m['history']] == [1, 2, 3] and m['history'][-1]['AP50'] == m['AP50'] is not None
    assert {'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'} < set(m) and m['APl'] is None        # no digit has 96² pixels
    assert {'train_loss', 'valid_loss', 'class', 'box', 'giou', 'AP', 'AP50'} < set(m['history'][0])
    assert set(c) == {*DEFAULTS, 'vocab'} and (c['dim'], c['widths'], c['seed']) == (16, [8, 8, 16], 0)
    assert c['rates'] == {'backbone': 1., **DEFAULTS['rates']} and m['parameters'] == sum(o.numel() for o in build_model(c).parameters())
    assert 'NaN' not in (whole/'metrics.json').read_text()

def test_tidy_in_a_file(whole):
    lines = (whole/'said').read_text().split('\n')
    assert lines[0].startswith('deformable_detr_refine, 0.0') and lines[1].split() == ['epoch', *'train_loss valid_loss class box giou AP AP50 time'.split()]
    assert [o.split()[0] for o in lines[2:5]] == ['1', '2', '3'] and lines[5].startswith('AP ') and lines[6:] == ['']
    assert '\r' not in ''.join(lines) and len({len(o) for o in lines[1:5]}) == 1

class Terminal(io.StringIO):
    def isatty(self): return True

def test_tidy_on_a_terminal(whole, tmp_path):
    out = Terminal()
    train({**config(whole), 'epochs': 1}, tmp_path, out=out, pictures=False)
    text = out.getvalue()
    assert 'epoch 1 of 1  ' in text and re.search(r'#+\.*  \d/2  loss [\d.]+  0:\d\d left', text)
    shown = [o.split('\r')[-1].rstrip() for o in text.split('\n')]      # what is left when lines have been written over
    assert len(shown) == 3 and shown[0].split()[0] == 'epoch' and shown[1].split()[0] == '1' and shown[2] == ''

def test_load_run(whole):
    model, c = load_run(whole)
    assert not model.training and c == config(whole)
    for k, v in load_file(whole/'model.safetensors').items(): assert torch.equal(v, model.state_dict()[k])
    assert model(torch.zeros(1, 3, 64, 64)).boxes.shape == (1, 2, 8, 4)

def test_recipe(whole):
    learn = build_learner({**config(whole), 'rates': dict(backbone=.5), 'lr': 3e-4})
    assert learn.group_rates.rates == {'backbone': .5, 'neck': 1., 'decoder': 1., 'offsets': .1, 'heads': 1.} and learn.lr == 3e-4 and learn.wd == DEFAULTS['wd']
    assert learn.gradient_clip.max_norm == DEFAULTS['clip'] and len(learn.dls.train) == 2 and len(learn.dls.valid_ds) == 4
    again = build_learner(learn.repeatable and config(whole))
    for a, b in zip(learn.model.parameters(), again.model.parameters()): assert torch.equal(a, b)

def test_defaults_are_complete():
    c = {**DEFAULTS, 'vocab': DigitScenes.vocab}
    check_config(c)
    assert set(T.HELP) == set(DEFAULTS) and json.loads(json.dumps(c)) == c

def test_help(capsys):
    for main in (main_train, main_detect):
        with pytest.raises(SystemExit) as e: main(['--help'])
        assert e.value.code == 0
    text = capsys.readouterr().out
    for o in DEFAULTS: assert f"--{o.replace('_', '-')} " in text
    for o in ('--resume', '--threads', '--out', '--threshold', '--size'): assert o in text

# ---- stopping and going on

def stop_in(m, epoch, batch=1):
    "Ctrl-C in this epoch, after this batch."
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (epoch, batch): raise KeyboardInterrupt
    m.setattr(T.Console, 'after_batch', after_batch)

@pytest.fixture(scope='module')
def part(tmp_path_factory):
    "The folder of a run that was stopped in its second epoch, and what it said."
    folder, said = tmp_path_factory.mktemp('runs')/'part', io.StringIO()
    with pytest.MonkeyPatch.context() as m:
        stop_in(m, 1)
        m.setattr(sys, 'stdout', said)
        assert main_train([*TINY, '--out', str(folder)]) == 130
    (folder/'said').write_text(said.getvalue())
    return folder

def copy(folder, to):
    "A run's folder, without what it said."
    to.mkdir()
    for o in files(folder): (to/o).write_bytes((folder/o).read_bytes())
    return to

def test_stopped_run_can_be_used(part, whole):
    assert files(part) == {'model.safetensors', 'config.json', 'metrics.json', 'resume.pt'}
    m = metrics(part)
    assert m['epochs'] == 1 and m['history'] == metrics(whole)['history'][:1] and config(part) == config(whole)
    load_run(part)
    said = (part/'said').read_text()
    assert 'holds the model after epoch 1 of 3' in said and f'go on with: deformlit-train --resume --out {part}\n' in said

def test_resume_is_the_same_run(part, whole, tmp_path, capsys, monkeypatch):
    folder, made = copy(part, tmp_path/'a'), []
    get = DigitScenes.__getitem__
    monkeypatch.setattr(DigitScenes, '__getitem__', lambda self, i: made.append(self.split) or get(self, i))
    torch.manual_seed(123); np.random.seed(5)               # another session
    assert main_train(['--resume', '--out', str(folder), '--threads', '1']) is None
    assert made.count('train') == 2 * 8                     # the epoch that is skipped makes no scenes
    a, b = load_file(folder/'model.safetensors'), load_file(whole/'model.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    m, n = metrics(folder), metrics(whole)
    assert m['history'] == n['history'] and m['per_class'] == n['per_class'] and m['epochs'] == 3 and m['seconds'] > metrics(part)['seconds']
    assert files(folder) == FILES and config(folder) == config(whole)
    lines = capsys.readouterr().out.split('\n')
    assert lines[1] == 'going on after epoch 1' and [o.split()[0] for o in lines[2:5]] == ['epoch', '2', '3'] and lines[5].startswith('AP ')

def test_stopped_while_drawing(part, tmp_path, monkeypatch, capsys):
    "All epochs are done, the pictures are not: they are drawn when the run goes on."
    folder = copy(part, tmp_path/'a')
    def interrupt(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(T, 'draw_points', interrupt)
        assert main_train(['--resume', '--out', str(folder)]) == 130
    assert files(folder) == {'model.safetensors', 'config.json', 'metrics.json', 'resume.pt'} and metrics(folder)['epochs'] == 3
    monkeypatch.setattr(T.DetectorLearner, 'fit', interrupt)
    monkeypatch.setattr(T, 'draw_run', lambda *args: [Path(o).write_bytes(b'') for o in args[-1]])
    assert main_train(['--resume', '--out', str(folder)]) is None and files(folder) == FILES

def test_finished_run_is_kept_until_the_next_is_done(whole, tmp_path, monkeypatch, capsys):
    folder = copy(whole, tmp_path/'a')
    before = contents(folder)
    stop_in(monkeypatch, 0)
    assert main_train([*TINY, '--seed', '1', '--out', str(folder)]) == 130
    out = capsys.readouterr().out
    assert contents(folder) == before and 'holds a finished run: it is replaced when this one ends' in out and 'nothing is kept' in out
    stop_in(monkeypatch, 1)
    assert main_train([*TINY, '--seed', '1', '--out', str(folder)]) == 130
    after = contents(folder)
    assert after.pop('resume.pt') and after == before and 'still holds the finished run of before' in capsys.readouterr().out
    stop_in(monkeypatch, 0)
    assert main_train([*TINY, '--seed', '1', '--out', str(folder)]) == 130
    assert read_state(folder)['config']['seed'] == 1

def test_sigint(tmp_path):
    "A real Ctrl-C, to a process of its own."
    code = 'from deformlit.train import main_train; raise SystemExit(main_train())'
    args = [*TINY, '--epochs', '500', '--out', 'with space']
    p = subprocess.Popen([sys.executable, '-c', code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                         env={**os.environ, 'PYTHONPATH': str(Path(T.__file__).parents[1])},
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # jobs in the background start with Ctrl-C ignored
    while not p.stdout.readline().startswith('    1 '): assert p.poll() is None, p.stderr.read()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "go on with: deformlit-train --resume --out 'with space'\n" in out
    assert err == ''
    assert 1 <= metrics(tmp_path/'with space')['epochs'] < 500 and files(tmp_path/'with space') == {'model.safetensors', 'config.json', 'metrics.json', 'resume.pt'}

def test_replacing(tmp_path):
    (tmp_path/'a').write_text('old')
    with pytest.raises(ZeroDivisionError), replacing(tmp_path, 'a', 'b') as (a, b): a.write_text('new'); 1 / 0
    assert contents(tmp_path) == {'a': b'old'}
    with replacing(tmp_path, 'a', 'b') as (a, b): a.write_text('new'); b.write_text('too')
    assert contents(tmp_path) == {'a': b'new', 'b': b'too'}

def test_plain_survives_safe_loading(tmp_path):
    from fastcore.all import L
    from fastai.torch_core import TensorBase
    torch.save(plain(dict(a=np.float64(1.5), b=L(1, (2, L(np.int64(3)))), c=TensorBase([1.]), d=None)), tmp_path/'x')
    assert torch.load(tmp_path/'x', weights_only=True) == dict(a=1.5, b=[1, (2, [3])], c=torch.tensor([1.]), d=None)

@pytest.mark.slow
def test_compiled(tmp_path, monkeypatch):
    "The whole of a training is traced. Inductor's code is not the point here, and takes long to make."
    compile, seen = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: seen.append(compile(self, backend='aot_eager')))
    assert main_train([*TINY, '--epochs', '1', '--compile', '--out', str(tmp_path/'a')]) is None
    assert seen
    load_run(tmp_path/'a')

# ---- every model

SMALL = '--dim 16 --heads 2 --queries 8 --encoder-layers 1 --decoder-layers 2 --ffn 16 --widths 8 8 16 --dilated 1 --size 64 --items 8 --valid-items 4 --bs 4 --epochs 2 --threads 1'.split()
others = pytest.mark.parametrize('model', [o for o in MODELS if o != DEFAULTS['model']])

def names(model): return RUNNING | {'losses.png', 'predictions.png', 'attention.png' if model in T.DENSE else 'points.png'}
RUNNING = {'model.safetensors', 'config.json', 'metrics.json'}

@others
def test_every_model(model, tmp_path, capsys, monkeypatch):
    "Trains, is stopped, goes on to the same weights, draws, and finds digits in a picture."
    whole, part = tmp_path/'whole', tmp_path/'part'
    assert main_train([*SMALL, '--model', model, '--out', str(whole)]) is None
    assert files(whole) == names(model)
    for name in names(model) - RUNNING:
        with Image.open(whole/name) as f: assert min(f.size) > 200 and np.asarray(f).std() > 5
    with monkeypatch.context() as m:
        stop_in(m, 1)
        assert main_train([*SMALL, '--model', model, '--out', str(part)]) == 130
    torch.manual_seed(123); np.random.seed(5)
    assert main_train(['--resume', '--out', str(part), '--threads', '1']) is None
    a, b = load_file(part/'model.safetensors'), load_file(whole/'model.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    m, n, c = metrics(part), metrics(whole), config(whole)
    assert m['history'] == n['history'] and len(m['times']) == 2 and m['times'][0] <= m['times'][1] <= m['seconds'] + .1
    assert m['history'][0]['train_loss'] != m['history'][1]['train_loss'] and config(part) == c and set(c) == {*DEFAULTS, 'vocab'}
    assert ('proposals' in m['history'][0]) == model.endswith('two_stage') and (m['backend'] is None) == (model in T.DENSE)
    for k in T.UNUSED.get(model, ()): assert c[k] is None
    assert m['parameters'] == sum(o.numel() for o in build_model(c).parameters())
    Image.fromarray(DigitScenes(4, 'valid')[1].image).save(tmp_path/'a.png')
    assert main_detect([str(whole), str(tmp_path/'a.png'), '--threshold', '0']) is None
    said = json.loads((tmp_path/'a.boxes.json').read_text())['found']
    assert len(said) == 8 and [o['score'] for o in said] == sorted((o['score'] for o in said), reverse=True)

def test_weights_move(tmp_path):
    "In every model every part learns, the proposals' network too."
    for model in MODELS:
        c = with_options({**DEFAULTS, 'vocab': DigitScenes.vocab}, dict(model=model, dim=16, heads=2, queries=8, decoder_layers=2, ffn=16, widths=[8, 8, 16], size=64, items=8, valid_items=4, bs=4, epochs=2))
        before = {k: v.clone() for k, v in build_learner(c).model.named_parameters()}
        train(c, tmp_path, out=io.StringIO(), pictures=False)
        after = load_file(tmp_path/'model.safetensors')
        still = [k for k in before if torch.equal(before[k], after[k])]
        assert not [k for k in still if not k.endswith('bias')], (model, still)

def test_another_model_in_the_same_folder(tmp_path, capsys):
    "Pictures of the model that was there before do not stay."
    for model in ('detr', 'deformable_detr', 'dab_detr'):
        assert main_train([*SMALL, '--epochs', '1', '--model', model, '--out', str(tmp_path)]) is None
        assert files(tmp_path) == names(model)

def test_options_from_model_to_model():
    base = {**DEFAULTS, 'vocab': DigitScenes.vocab}
    dense = with_options(base, dict(model='detr', rates=dict(heads=2.)))
    assert [dense[k] for k in T.UNUSED['detr']] == [None] * 4 and dense['rates'] == dict(backbone=1., heads=2.)
    again = with_options(dense, dict(model='deformable_detr', points=3))
    assert again['points'] == 3 and again['levels'] == DEFAULTS['levels'] and again['rates'] == {**DEFAULTS['rates'], 'heads': 2.}
    check_config(dense); check_config(again)
    with pytest.raises(ArgumentError, match='--points'): check_config({**dense, 'points': 2})

def test_narrow_backbones(tmp_path):
    "torch 2.15 writes past its memory in a strided 1x1 convolution of few channels that lie last: a process of its own lives."
    args = '--dim 16 --heads 2 --queries 8 --decoder-layers 1 --ffn 16 --widths 8 8 --maps 2 --levels 2 --items 80 --valid-items 4 --bs 8 --epochs 1 --threads 1 --out a'.split()
    r = subprocess.run([sys.executable, '-c', 'from deformlit.train import main_train; raise SystemExit(main_train())', *args], capture_output=True, text=True, cwd=tmp_path,
                       env={**os.environ, 'PYTHONPATH': str(Path(T.__file__).parents[1])})
    assert r.returncode == 0, r.stderr

@pytest.mark.parametrize('model', ['dab_detr', 'deformable_detr_two_stage'])
def test_speed(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main_train([*SMALL, '--model', model, '--speed', '.1']) is None
    assert re.fullmatch(rf'{model}: [\d.]+ images/s in training, [\d.]+ in validation \(cpu, 1 threads\)\n', capsys.readouterr().out)
    assert not list(tmp_path.iterdir())

def test_workers_change_nothing(tmp_path):
    c = with_options({**DEFAULTS, 'vocab': DigitScenes.vocab}, dict(model='detr', dim=16, heads=2, queries=8, decoder_layers=1, ffn=16, widths=[8, 8], size=64, items=8, valid_items=4, bs=4, epochs=2))
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    a, b = train(c, tmp_path/'a', out=io.StringIO(), pictures=False), train(c, tmp_path/'b', out=io.StringIO(), pictures=False, num_workers=1)
    assert a['history'] == b['history']

# ---- what is refused, before any work

@pytest.fixture
def idle(monkeypatch):
    "Nothing may be trained."
    def work(*args, **kwargs): raise AssertionError('work was begun')
    monkeypatch.setattr(T, 'train', work)

BAD = [(['--epochs', '0'], '--epochs'), (['--epochs', 'x'], '--epochs'), (['--epochs', '1.5'], '--epochs'), (['--bs', '0'], '--bs'), (['--items', '8', '--bs', '9'], '--items'), (['--lr', '0'], '--lr'),
       (['--lr', 'nan'], '--lr'), (['--lr', 'inf'], '--lr'), (['--heads', '3'], '--heads'), (['--dim', '18'], '--dim'), (['--dim', '-4'], '--dim'), (['--model', 'yolo'], '--model'), (['--seed', '-1'], '--seed'),
       (['--widths', '8', '0'], '--widths'), (['--widths'], '--widths'), (['--maps', '5'], '--maps'), (['--levels', '2'], '--levels'), (['--size', '40'], '--size'), (['--pct-start', '1'], '--pct-start'),
       (['--drop', '1'], '--drop'), (['--clip', '0'], '--clip'), (['--moms', '.9', '.9'], '--moms'), (['--rates', 'trunk=1'], '--rates'), (['--rates', 'backbone'], '--rates'), (['--rates', 'backbone=-1'], '--rates'),
       (['--opt', 'adahessian'], '--opt'), (['--backend', 'fast'], '--backend'), (['--threads', '0'], '--threads'), (['--epoch', '1'], '--epoch'), (['--valid-items', '0'], '--valid-items'), (['more'], 'more'),
       (['--dilated', '4'], '--dilated'), (['--dilated', '-1'], '--dilated'), (['--digit-px', '20'], '--digit-px'), (['--digit-px', '40', '20'], '--digit-px'), (['--digit-px', '20', '200'], '--size'),
       (['--max-digits', '-1'], '--max-digits'), (['--device', 'cude'], '--device'), (['--device', 'meta:3x'], '--device'), (['--workers', '-1'], '--workers'), (['--speed', '0'], '--speed'), (['--speed', 'nan'], '--speed'),
       (['--model', 'deformable_detr_two_stage', '--size', '56', '--queries', '70'], '--queries'),
       *((['--model', m, *o.split()], o.split()[0]) for m in T.DENSE for o in ('--points 2', '--maps 3', '--levels 3', '--backend native', '--rates offsets=0.1'))]

@pytest.mark.parametrize('args,name', BAD, ids=lambda o: ' '.join(o) if isinstance(o, list) else '')
def test_bad_options(args, name, tmp_path, capsys, idle):
    refused(capsys, main_train, [*args, '--out', tmp_path/'a'], name)
    assert not (tmp_path/'a').exists()

def test_bad_folders(tmp_path, capsys, idle, monkeypatch):
    (tmp_path/'file').write_text('')
    refused(capsys, main_train, ['--out', tmp_path/'file'], '--out', str(tmp_path/'file'), 'File exists')
    refused(capsys, main_train, ['--out', tmp_path/'file'/'below'], '--out', 'Not a directory')
    (tmp_path/'run'/'model.safetensors').mkdir(parents=True)
    refused(capsys, main_train, ['--out', tmp_path/'run'], '--out', 'model.safetensors is a folder')
    def full(*args, **kwargs): raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(T.tempfile, 'TemporaryFile', full)  # root may write anywhere
    refused(capsys, main_train, ['--out', tmp_path/'b'], '--out', str(tmp_path/'b'), 'Read-only file system')

@pytest.mark.skipif(not Path('/proc/self').exists(), reason='no /proc')
def test_read_only_folder(capsys, idle):
    for o in ('/proc', '/proc/run'): refused(capsys, main_train, ['--out', o], '--out', f"'{o}'")

def test_bad_resume(part, whole, tmp_path, capsys, idle):
    refused(capsys, main_train, ['--resume', '--out', tmp_path/'none'], '--resume', 'resume.pt')
    assert not (tmp_path/'none').exists()
    refused(capsys, main_train, ['--resume', '--out', whole], '--resume', 'that run is finished')
    for args, word in ((['--epochs', '4'], '--epochs'), (['--dim', '32'], '--dim'), (['--rates', 'heads=2'], '--rates'), (['--compile'], '--compile'), (['--widths', '8', '8'], '--widths')):
        refused(capsys, main_train, ['--resume', *args, '--out', part], word, 'with which the run began')
    folder = copy(part, tmp_path/'a')
    (folder/'resume.pt').write_bytes(b'no torch file')
    refused(capsys, main_train, ['--resume', '--out', folder], '--resume', 'resume.pt', 'cannot be read')

def test_same_options_may_be_said_again(part):
    given = dict(out=str(part), resume=True, threads=None, epochs=3, widths=[8, 8, 16], rates=[('backbone', DEFAULTS['rates']['backbone'])])
    assert T.prepare(given)[1] == config(part)

@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_broken_runs(name, whole, tmp_path, capsys):
    photo = tmp_path/'a.png'
    Image.new('RGB', (20, 20)).save(photo)
    folder = copy(whole, tmp_path/'run')
    (folder/name).write_bytes(b'{"dim": 3')
    refused(capsys, main_detect, [folder, photo], name)
    (folder/name).unlink()
    refused(capsys, main_detect, [folder, photo], name)
    refused(capsys, main_detect, [tmp_path/'nowhere', photo], 'nowhere')
    assert files(tmp_path) == {'a.png', 'run'}

def test_config_of_another_model(whole, tmp_path):
    folder, c = copy(whole, tmp_path/'run'), config(whole)
    for wrong, word in ((dict(dim=32), 'model.safetensors'), (dict(dim='x'), '--dim'), (dict(model='yolo'), '--model'), (dict(heads=5), '--heads')):
        (folder/'config.json').write_text(json.dumps({**c, **wrong}))
        with pytest.raises(ArgumentError, match=word): load_run(folder)
    for wrong in ([], 3, {k: v for k, v in c.items() if k != 'queries'}, {k: v for k, v in c.items() if k != 'vocab'}):
        (folder/'config.json').write_text(json.dumps(wrong))
        with pytest.raises(ArgumentError, match='config'): load_run(folder)

# ---- finding digits

def test_detect(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(DigitScenes(4, 'valid')[1].image).resize((300, 150)).save('wide.png')
    Image.new('L', (5, 200), 128).save('grey.jpg')
    Image.new('RGBA', (64, 64), (9, 9, 9, 9)).save('clear.png')
    assert main_detect([str(whole), 'wide.png', 'grey.jpg', 'clear.png', '--threshold', '0', '--size', '96']) is None
    assert files(tmp_path) == {'wide.png', 'grey.jpg', 'clear.png'} | {f'{a}.boxes.{b}' for a in ('wide', 'grey', 'clear') for b in ('png', 'json')}
    for name, (w, h) in dict(wide=(300, 150), grey=(5, 200), clear=(64, 64)).items():
        said = json.loads(Path(f'{name}.boxes.json').read_text())
        assert (said['width'], said['height'], len(said['found'])) == (w, h, 8)            # 8 queries, a name for each
        for o in said['found']:
            l, t, r, b = o['box']
            assert 0 <= l <= r <= w and 0 <= t <= b <= h and o['label'] in DigitScenes.vocab and 0 <= o['score'] <= 1
        assert [o['score'] for o in said['found']] == sorted((o['score'] for o in said['found']), reverse=True)
    with Image.open('wide.boxes.png') as f: assert f.size[0] >= 300
    assert capsys.readouterr().out.count('\n') == 3
    assert main_detect([str(whole), 'wide.png', '--threshold', '1', '--out', 'new/folder']) is None
    assert json.loads(Path('new/folder/wide.boxes.json').read_text())['found'] == [] and files('new/folder') == {'wide.boxes.png', 'wide.boxes.json'}

class Fixed(torch.nn.Module):
    "Always the same answer; remembers what it saw."
    def forward(self, images):
        self.saw = images.shape
        logits = torch.full((1, 1, 2, 10), -9.)
        logits[0, 0, 0, 7] = 2.
        return logits, torch.tensor([[[[.5, .5, .5, .5], [.1, .1, .4, .1]]]])

def test_boxes_are_mapped_back():
    model, c = Fixed(), dict(size=64, vocab=DigitScenes.vocab)
    found = find_digits(model, c, np.zeros((100, 200, 3), np.uint8))
    assert_close(found.boxes, torch.tensor([[50., 25, 150, 75]]))
    assert found.labels == ['7'] and model.saw == (1, 3, 32, 64)
    assert_close(found.scores, torch.tensor([2.]).sigmoid())
    found = find_digits(model, c, np.zeros((90, 30, 3), np.uint8), threshold=0, size=300)
    assert model.saw == (1, 3, 300, 100) and len(found.labels) == 2
    assert found.boxes.min() == 0                           # cut at the edge

def test_bad_pictures(whole, tmp_path, capsys):
    good, text, cut = tmp_path/'good.png', tmp_path/'text.png', tmp_path/'cut.png'
    Image.fromarray(DigitScenes(1, 'valid')[0].image).save(good)
    text.write_text('not a picture')
    cut.write_bytes(good.read_bytes()[:3000])
    (tmp_path/'file').write_text('')
    for bad in (text, cut, tmp_path/'none.png', tmp_path): refused(capsys, main_detect, [whole, good, bad], str(bad), 'cannot be read')
    refused(capsys, main_detect, [whole, good, '--out', tmp_path/'file'], '--out', 'file')
    refused(capsys, main_detect, [whole, good, good], str(good), 'different names')
    for args, word in ((['--threshold', '2'], '--threshold'), (['--size', '3'], '--size'), (['--threshold', 'x'], '--threshold')): refused(capsys, main_detect, [whole, good, *args], word)
    refused(capsys, main_detect, [whole], 'photo')
    assert files(tmp_path) == {'good.png', 'text.png', 'cut.png', 'file'}

def test_keep_memory_is_harmless(): assert keep_memory() in (True, False)
