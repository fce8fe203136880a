"""Classifiers: folders of images, groups and decay, fastai's methods one by one, and the command with its files."""
import io, json, sys
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn as nn
from PIL import Image
from safetensors.torch import load_file
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.vision.all import ClassificationInterpretation, Interpretation, vision_learner
import deformlit.classify as C
import deformlit.train as T
from deformlit.classify import *
from deformlit.core import *
from deformlit.learner import *
from deformlit.train import *
from deformlit.backbones import create_model, depth_splitter

@pytest.fixture(autouse=True, scope='module')
def no_screen():
    import matplotlib
    matplotlib.use('agg')
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

@pytest.fixture(autouse=True)
def quiet():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')

def draw(path, i=0, size=(12, 9)):
    "A file with a picture that depends on `i`."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)

def folder_of(root, sets=('',), classes=('ant', 'bee'), n=6):
    for s in sets:
        for j, k in enumerate(classes):
            for i in range(n): draw(root/s/k/f'{i}.png', 10 * j + i)
    return root

def few(n=16, m=8):
    images = digit_images()
    def some(o, n): return [o[i] for i in np.linspace(0, len(o) - 1, n).astype(int)]
    return ImageSet(some(images.train, n), some(images.valid, m), images.vocab)

def few_dls(bs=4, size=32, **kwargs): return classify_dls(few(), size, bs, device='cpu', **kwargs)

TINY = dict(
    dat=partial(create_model, 'dat', parts='FirstRelease', dims=(8, 16, 24, 32), depths=(1, 2, 2, 2), num_heads=(1, 2, 2, 2), num_groups=(1, 1, 1, 1), strides=(1, 1, 1, 1), kernel_sizes=(3, 3, 3, 3), window_size=3),
    dat_pp=partial(create_model, 'dat', dims=(8, 16, 24, 32), depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 2), num_groups=(1, 1, 1, 1), strides=(2, 1, 1, 1), kernel_sizes=(3, 3, 3, 3), window_size=3),
    dilateformer=partial(create_model, 'dilateformer', dims=(12, 12, 24, 24), depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3)))
kinds = pytest.mark.parametrize('kind', TINY)

def tiny(kind, **kwargs):
    torch.manual_seed(0)
    return TINY[kind](num_classes=10, img_size=32, **kwargs)

# ---- data

def test_digits():
    images = digit_images()
    assert images.vocab == [str(i) for i in range(10)] and len(images.train) == 1437 and len(images.valid) == 360
    for part in images[:2]: assert {o.label for o in part} == set(images.vocab) and all(o.image.shape == (8, 8) and o.image.dtype == np.uint8 for o in part)
    assert not {o.image.tobytes() + o.label.encode() for o in images.train} & {o.image.tobytes() + o.label.encode() for o in images.valid}

def test_folder_every_fifth(tmp_path):
    folder_of(tmp_path, n=11)
    draw(tmp_path/'.hidden'/'0.png'); draw(tmp_path/'stray.png'); draw(tmp_path/'bee'/'more'/'z.png')
    (tmp_path/'bee'/'notes.txt').write_text('no picture')
    images = folder_images(tmp_path)
    assert images.vocab == ['ant', 'bee'] and [len(o) for o in images[:2]] == [8 + 9, 3 + 3]
    assert [o.image.name for o in images.valid if o.label == 'ant'] == ['0.png', '4.png', '9.png']         # in the order of names: 0 1 10 2 3 4 5 ...
    assert str(folder_images(str(tmp_path)).train) == str(images.train)

@pytest.mark.parametrize('name', ['valid', 'val', 'test'])
def test_folder_with_sets(tmp_path, name):
    folder_of(tmp_path, ('train', name))
    images = folder_images(tmp_path)
    assert [len(o) for o in images[:2]] == [12, 12] and {o.image.parts[-3] for o in images.valid} == {name}

def test_a_class_called_train(tmp_path):
    assert folder_images(folder_of(tmp_path, classes=('bus', 'train'))).vocab == ['bus', 'train']

def test_train_without_valid(tmp_path):
    images = folder_images(folder_of(tmp_path, ('train',)))
    assert images.vocab == ['ant', 'bee'] and len(images.valid) == 4

def spoil(folder, how):
    if how == 'nowhere': return folder/'nowhere'
    if how == 'a file': (folder/'f').write_text(''); return folder/'f'
    if how == 'no classes': draw(folder/'0.png'); return folder
    folder_of(folder, ('train', 'valid') if how in ('stranger', 'nothing valid') else ('',), n=2)
    if how == 'one class': return folder_of(folder/'x', classes=('ant',))
    if how == 'empty class': (folder/'cat').mkdir()
    if how == 'one image': draw(folder/'cat'/'0.png')
    if how == 'stranger': draw(folder/'valid'/'cat'/'0.png')
    if how == 'nothing valid': [o.unlink() for o in (folder/'valid').glob('*/*')]
    if how == 'no image': (folder/'ant'/'1.png').write_text('this is no picture')
    return folder

BAD = {'nowhere': 'no folder', 'a file': 'no folder', 'no classes': 'at least two', 'one class': 'at least two', 'empty class': 'cat', 'one image': 'cat', 'stranger': "'cat'",
       'nothing valid': 'valid', 'no image': '1.png'}

@pytest.mark.parametrize('how', BAD)
def test_bad_folders(tmp_path, how):
    with pytest.raises(ArgumentError, match=BAD[how]) as e: folder_images(spoil(tmp_path, how))
    assert e.value.argument in ('data', 'image')

def test_bad_dls(tmp_path):
    with pytest.raises(ArgumentError, match='`bs`'): few_dls(bs=17)
    with pytest.raises(ArgumentError, match='writing'): few_dls(augment='fog')

def test_a_bad_picture_is_named_in_training(tmp_path):
    folder_of(tmp_path)
    (tmp_path/'ant'/'3.png').write_text('no picture')
    with pytest.raises(ArgumentError, match='3.png'): [None for _ in classify_dls(tmp_path, 16, 2, device='cpu').train]

def test_batches(tmp_path):
    dls = few_dls()
    x, y = dls.one_batch()
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 and y.shape == (4,) and list(dls.vocab) == digit_images().vocab and dls.c == 10
    a, b = (torch.cat([x for x, _ in dls.valid]) for _ in range(2))
    assert torch.equal(a, b) and (a[0] - prepare_image(few().valid[0].image, 32)).abs().max() < 1e-5
    folder_of(tmp_path)
    photos = classify_dls(tmp_path, 16, 4, device='cpu')
    assert photos.one_batch()[0].shape == (4, 3, 16, 16)
    item = folder_images(tmp_path).valid[0]
    assert (photos.valid.one_batch()[0][0] - prepare_image(item.image, 16)).abs().max() < 1e-5

def test_nothing_is_varied():
    dls = few_dls(augment='none')
    i, seen = 0, torch.cat([x for x, _ in dls.train.new(shuffle=False)])
    for i, o in enumerate(few().train): assert (seen[i] - prepare_image(o.image, 32)).abs().max() < 1e-5

# ---- the loss

def test_smoothed_loss():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    for smooth in (0., .1, 1.):
        for o, y in zip(logits, (0, 1, 2, 6, 3)):
            theirs = nn.functional.cross_entropy(o[None], torch.tensor([y]), label_smoothing=smooth)
            torch.testing.assert_close(torch.tensor(smooth_loss_loop(o.tolist(), y, smooth), dtype=torch.float64), theirs)

# ---- groups and decay

@kinds
def test_every_parameter_in_one_group(kind):
    model = tiny(kind)
    learn = image_learner(few_dls(), model)
    groups = learn.splitter(model)
    ids = [id(p) for g in groups for p in g]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert [id(p) for p in groups[-1]] == [id(p) for p in model.get_classifier().parameters()] or {id(p) for p in model.get_classifier().parameters()} <= {id(p) for p in groups[-1]}
    learn.freeze()
    assert [len(g) for g in learn.splitter(model)] == [len(g) for g in groups]          # what is frozen now stays in its group
    assert not model.stem.training or not next(model.stem.parameters()).requires_grad
    learn.unfreeze()
    assert all(p.requires_grad for g in groups for p in g)

def test_named_parts_stand_apart():
    model = tiny('dat')
    groups = DepthSplitter(model, ['offsets']).named(model)
    apart = [k for k in groups if k.endswith('offsets')]
    names = {id(p): k for k, p in model.named_parameters()}
    assert apart and all('.offsets.' in names[id(p)] for k in apart for p in groups[k])
    assert not any('.offsets.' in names[id(p)] for k in groups if k not in apart for p in groups[k]) and list(groups)[-1] not in apart
    with pytest.raises(ArgumentError, match='offset_net'): image_learner(few_dls(), model, rates=dict(offset_net=.1))

def frozen_step(learn, wd=.1):
    "One step with gradients of zero; the share by which each parameter shrank."
    learn.create_opt()
    learn.opt.set_hyper('wd', wd); learn.opt.set_hyper('lr', 1.)
    before = {k: p.detach().clone() for k, p in learn.model.named_parameters()}
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    moved = {k: (before[k] - p.detach()).abs().sum() / before[k].abs().sum().clamp(min=1e-12) for k, p in learn.model.named_parameters()}
    return {k: round(float(v), 4) for k, v in moved.items()}

@pytest.mark.parametrize('opt', ['adamw', Adam])
def test_tables_do_not_decay(opt):
    model = tiny('dat')
    tables = model.no_weight_decay()
    assert tables and all(dict(model.named_parameters())[k].ndim > 1 for k in tables)
    moved = frozen_step(image_learner(few_dls(), model, opt_func=opt))
    for k, p in model.named_parameters():
        if k in tables: assert moved[k] == 0, k
        elif p.ndim > 1: assert moved[k] == .1, k
        elif opt == 'adamw': assert moved[k] == 0, k
    plain = Learner(few_dls(), tiny('dat'), CrossEntropyLossFlat(), opt_func=Adam, lr=1e-3)
    moved = frozen_step(plain)
    assert all(moved[k] > 0 for k in tables if dict(model.named_parameters())[k].abs().sum() > 0)     # fastai alone does not know
    spare_tables(plain)
    before = {k: dict(plain.model.named_parameters())[k].detach().clone() for k in tables}
    for p in plain.model.parameters(): p.grad = torch.zeros_like(p)
    plain.opt.step()
    assert all(torch.equal(v, dict(plain.model.named_parameters())[k]) for k, v in before.items())

def test_tables_stay_out_when_biases_decay():
    model = tiny('dat')
    moved = frozen_step(image_learner(few_dls(), model, wd_bn_bias=True))
    for k, p in model.named_parameters():
        if k in model.no_weight_decay(): assert moved[k] == 0
        elif p.detach().abs().sum() > 0: assert moved[k] == .1, k

def test_tables_inside_fastais_model():
    "Names are found in a part of the model, too."
    class Body(nn.Module):
        def __init__(self): super().__init__(); self.model = tiny('dat')
        def forward(self, x): return self.model(x)
    body = Body()
    assert {id(p) for p in undecayed(body)} == {id(p) for p in undecayed(body.model)} != set()

def test_spare_keeps_hypers_and_state():
    a, b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 2))
    opt = optimizer('adamw')([[a], [b]], lr=.1)
    opt.set_hyper('wd', .5); opt.set_hyper('lr', [.1, .2])
    opt.spare([b])
    assert [h['lr'] for h in opt.hypers] == [.1, .2] and [h['wd'] for h in opt.hypers] == [.5, .5] and [len(g['params']) for g in opt.opt.param_groups] == [1, 0, 0, 0, 0, 1]
    for p in (a, b): p.grad = torch.zeros_like(p)
    opt.step()
    assert abs(a[0, 0].item() - .95) < 1e-6 and b[0, 0] == 1
    state = opt.state_dict()
    opt.clear_state(); opt.load_state_dict(state)
    assert [len(g['params']) for g in opt.opt.param_groups] == [1, 0, 0, 0, 0, 1] and opt.opt.param_groups[-1]['weight_decay'] == 0

def test_rates_and_slices():
    learn = image_learner(few_dls(), tiny('dat'), rates=dict(offsets=.1), lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-4, 1e-3))
    got, groups = learn.own_rates.lrs, list(learn.own_rates.lrs)
    expected = np.geomspace(1e-4, 1e-3, len(groups))
    for k, e in zip(groups, expected): np.testing.assert_allclose(got[k], e * (.1 if k.endswith('offsets') else 1), rtol=1e-5)

# ---- fastai's methods

@pytest.fixture(params=TINY)
def learn(request, tmp_path):
    "Trained for a few steps."
    learn = image_learner(few_dls(path=tmp_path), tiny(request.param), cbs=Repeatable(0))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    return learn

def test_methods(learn, tmp_path):
    with learn.no_bar(), learn.no_logging():
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.lr_find(num_it=12, show_plot=False)
        assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in before.items())
        learn.fine_tune(1, 1e-3)
        loss, accuracy = learn.validate()
        assert np.isfinite(loss) and 0 <= accuracy <= 1
        probs, labels, losses = learn.get_preds(with_loss=True)
        assert probs.shape == (8, 10) and torch.allclose(probs.sum(1), torch.ones(8)) and losses.shape == (8,)
        inter = ClassificationInterpretation.from_learner(learn)
        top, at = inter.top_losses(3)
        torch.testing.assert_close(top, losses[at])
        assert inter.confusion_matrix().sum() == 8
        inter.plot_top_losses(3); inter.plot_confusion_matrix()
        learn.show_results(max_n=4); learn.dls.show_batch(max_n=4)
        answer = learn.predict(few().valid[2].image)
        assert answer[0] in learn.dls.vocab and torch.allclose(answer[2], probs[2], atol=1e-5)
        learn.export('a.pkl'); learn.save('b'); learn.load('b')
    Image.fromarray(few().valid[2].image).save(tmp_path/'x.png')
    again = load_learner(tmp_path/'a.pkl', pickle_module=__import__('pickle')).predict(tmp_path/'x.png')
    assert again[0] == answer[0] and torch.allclose(again[2], answer[2], atol=1e-5)
    with pytest.raises(ArgumentError, match='nothing.png'): learn.predict('nothing.png')

def test_learns():
    learn = image_learner(few_dls(8, augment='none'), tiny('dat'), lr=3e-3, smooth=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit(12)
    assert learn.recorder.values[-1][0] < .5 * learn.recorder.values[0][0]

def test_nothing_is_still():
    "Every trainable parameter gets a gradient."
    for kind in TINY:
        torch.manual_seed(0)
        learn = image_learner(few_dls(size=64), TINY[kind](num_classes=10, img_size=64), lr=1e-2)
        before = {k: p.detach().clone() for k, p in learn.model.named_parameters()}
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        still = [k for k, p in learn.model.named_parameters() if p.requires_grad and torch.equal(p, before[k])]
        assert not still, (kind, still)

def test_wrong_models():
    with pytest.raises(ArgumentError, match='10, those of the data'): image_learner(few_dls(), TINY['dat'](num_classes=7, img_size=32))
    with pytest.raises(ArgumentError, match='dat_tiny'): image_learner(few_dls(), 'dat_huge')

def test_any_module():
    "A model that is not ours, and one of timm."
    timm = pytest.importorskip('timm')
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    for model, groups in ((plain, 1), (timm.create_model('resnet10t', num_classes=10), 2)):
        learn = image_learner(few_dls(), model)
        assert len(learn.splitter(model)) == groups
        with learn.no_bar(), learn.no_logging(): learn.fit(1)

# ---- fastai's vision_learner, by timm's registry

def test_vision_learner(tmp_path):
    pytest.importorskip('timm')
    import deformlit
    dls = few_dls(2, path=tmp_path)
    torch.manual_seed(0)
    learn = vision_learner(dls, 'dat_tiny', pretrained=False)
    assert learn.model[0].needs_pool and len(learn.splitter(learn.model)) == 2
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-4)
        learn.lr_find(num_it=12, show_plot=False)
        inter = Interpretation.from_learner(learn)
        assert inter.top_losses(4)[0].shape == (4,)
        inter.plot_top_losses(2)
        from fastai.vision.core import PILImage
        assert learn.predict(PILImage.create(few().valid[0].image))[0] in dls.vocab
        deep = vision_learner(dls, 'dat_tiny', pretrained=False, splitter=depth_splitter)
        assert len(deep.splitter(deep.model)) == 6

@pytest.mark.parametrize('name', ['dat_tiny', 'dat_pp_tiny', 'dilateformer_tiny'])
def test_where_weights_are(name):
    pytest.importorskip('timm')
    import deformlit
    with pytest.raises(ArgumentError, match='path'): vision_learner(few_dls(2), name, pretrained=True)

# ---- the command

SHORT = '--size 32 --bs 8 --epochs 2 --threads 1'.split()
FILES = {'model.safetensors', 'config.json', 'metrics.json', 'losses.png', 'predictions.png'}

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return folder_of(tmp_path_factory.mktemp('photos'), n=12)

def files(folder): return {o.name for o in Path(folder).iterdir()}
def metrics(folder): return json.loads((folder/'metrics.json').read_text())

def stop_in(m, epoch):
    def after_batch(self):
        if self.training and self.epoch == epoch: raise KeyboardInterrupt
    m.setattr(T.Console, 'after_batch', after_batch)

@pytest.mark.parametrize('model,picture', [('dat', 'points.png'), ('dat_pp', 'points.png'), ('dilateformer', 'windows.png')])
def test_run(model, picture, photos, tmp_path, capsys, monkeypatch):
    "Trains, is stopped, goes on to the same weights, draws, and knows what it has seen."
    args = [*SHORT, '--model', model, '--data', str(photos)]
    assert main_train(['--task', 'classify', *args, '--out', str(tmp_path/'whole')]) is None
    lines = capsys.readouterr().out.split('\n')
    assert lines[0].startswith(f'{model}, ') and '2 epochs of 18 images of 2 classes, 6 to validate on' in lines[0]
    assert lines[1].split() == 'epoch train_loss valid_loss accuracy time'.split() and lines[-2].startswith('accuracy ') and picture in lines[-2]
    assert files(tmp_path/'whole') == FILES | {picture}
    for name in ('losses.png', 'predictions.png', picture):
        with Image.open(tmp_path/'whole'/name) as f: assert min(f.size) > 150 and np.asarray(f).std() > 5
    with monkeypatch.context() as m:
        stop_in(m, 1)
        assert main_classify([*args, '--out', str(tmp_path/'part')]) == 130
    assert files(tmp_path/'part') == {'model.safetensors', 'config.json', 'metrics.json', 'resume.pt'}
    torch.manual_seed(123); np.random.seed(5)
    assert main_train(['--resume', '--out', str(tmp_path/'part'), '--threads', '1']) is None     # the file says which task
    a, b = (load_file(tmp_path/o/'model.safetensors') for o in ('whole', 'part'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    m = metrics(tmp_path/'whole')
    assert m['history'] == metrics(tmp_path/'part')['history'] and set(m['per_class']) == {'ant', 'bee'} and m['history'][-1]['accuracy'] == m['accuracy'] and m['backend']
    net, c = load_run(tmp_path/'whole')
    assert c['data'] == str(photos.resolve()) and c['augment'] == 'photos' and set(c) == {*RECIPE, 'vocab'} and m['parameters'] == sum(p.numel() for p in net.parameters())
    answer = classify_image(net, c, photos/'ant'/'0.png')
    assert {o[0] for o in answer} == {'ant', 'bee'} and abs(sum(o[1] for o in answer) - 1) < 1e-5

def refused(capsys, args, *words):
    with pytest.raises(SystemExit) as e: main_train([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and err.startswith('deformlit-train: error: '), err
    for word in words: assert word in err, err

def test_refused(photos, tmp_path, capsys):
    task = ['--task', 'classify', '--out', str(tmp_path/'a')]
    refused(capsys, ['--task', 'count'], '--task', 'classify')
    refused(capsys, [*task, '--data', tmp_path/'nowhere'], '--data', 'nowhere')
    refused(capsys, [*task, '--model', 'dat_huge'], '--model', 'dat_tiny', 'dilateformer')
    refused(capsys, [*task, '--data', photos, '--bs', 99], '--bs', '18')
    refused(capsys, [*task, '--augment', 'fog'], '--augment', 'writing')
    refused(capsys, [*task, '--smooth', 1], '--smooth')
    refused(capsys, [*task, '--lr', 0], '--lr')
    refused(capsys, [*task, '--size', 0], '--size')
    refused(capsys, [*task, '--rates', 'offset_net=.1'], '--rates', 'offset_net')
    refused(capsys, [*task, '--device', 'nowhere'], '--device')
    refused(capsys, [*task, '--pretrained', tmp_path/'no.pth'], '--pretrained')
    refused(capsys, [*task, '--opt', 'best'], '--opt')
    refused(capsys, [*task, '--resume'], '--resume')
    refused(capsys, [*task, '--queries', 3], '--queries')
    refused(capsys, ['--data', photos], '--data')

def test_resume_of_another_task(photos, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        stop_in(m, 1)
        assert main_classify([*SHORT, '--data', str(photos), '--out', str(tmp_path)]) == 130
    refused(capsys, ['--task', 'detect', '--resume', '--out', tmp_path], '--task', 'classify, with which the run began')
    refused(capsys, ['--resume', '--out', tmp_path, '--points', 2], '--points')
    refused(capsys, ['--task', 'classify', '--resume', '--out', tmp_path, '--epochs', 5], '--epochs', '2, with which the run began')

def test_help(capsys):
    with pytest.raises(SystemExit) as e: main_train(['--task', 'classify', '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and '--speed' not in text
    for o in (*RECIPE, 'resume', 'threads', 'device', 'out'): assert f"--{o.replace('_', '-')} " in text, o
    with pytest.raises(SystemExit): main_train(['--help'])
    assert '--task' in capsys.readouterr().out

def test_recipe_is_complete():
    c = Classification().begin({})
    check_classify(c)
    assert set(C.HELP_RECIPE) | {'task'} == set(RECIPE) and json.loads(json.dumps(c)) == c and c['vocab'] == digit_images().vocab

def test_pictures_of_a_perfect_model(tmp_path):
    "A model that is never wrong has an empty row."
    class Perfect(nn.Module):
        def forward(self, x): return torch.eye(10)[[int(o.label) for o in few(m=len(x)).valid]] * 20
    fig = draw_answers(Perfect(), dict(data=few(m=8), size=32, vocab=digit_images().vocab))
    assert '(0 of 8 are)' in fig._suptitle.get_text()

def test_no_warnings():
    "No name of ours stands in the way of fastai's."
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for kind in TINY:
            learn = image_learner(few_dls(), tiny(kind))
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
