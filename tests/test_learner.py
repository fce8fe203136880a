"""The learner: what is too slow, too thorough or too dull for the page of its chapter."""
import copy, os, random, warnings
from functools import partial
os.environ.setdefault('MPLBACKEND', 'agg')

import numpy as np, pytest, torch, torch_optimizer
import matplotlib.pyplot as plt
from PIL import Image
from torch import nn
from torch.testing import assert_close
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper

from deformlit.backbones import BasicBlock, ConvNet, ResNet
from deformlit.boxes import cxcywh_to_xyxy
from deformlit.core import ArgumentError
from deformlit.data import *
from deformlit.deformable_detr import RefiningHeads, SharedHead, deformable_detr, two_stage_detr
from deformlit.detr import DETR, Detector, PreNorm, detect, detect_softmax, detr
from deformlit.learner import *
from deformlit.metrics import coco_ap
from deformlit.set_loss import FocalLoss, NonFinitePredictions, SetLoss, SoftmaxLoss

pytestmark = pytest.mark.filterwarnings('ignore')

# ---- a tiny detector, and scenes: four with digits, one without

DIGITS = DigitScenes.vocab
ALL = [DigitScenes(8, size=32, digit_px=(10, 20), max_digits=3)[i] for i in range(8)]
SCENES = [s for s in ALL if len(s.labels)][:4] + [s for s in ALL if not len(s.labels)][:1]

@pytest.fixture(autouse=True)
def seeded():
    "fastai shuffles with Python's own generator."
    random.seed(0); np.random.seed(0); torch.manual_seed(0)

def make_dls(bs=2, path='.', scenes=SCENES): return DetectionDataLoaders.from_scenes(scenes, scenes, DIGITS, bs=bs, path=path)

def make_model(seed=0, heads=RefiningHeads, backbone=None):
    torch.manual_seed(seed)
    return deformable_detr(10, backbone or ConvNet((8, 8), num_maps=2), heads=heads, dim=16, num_heads=2, num_levels=2, num_points=2, num_queries=6,
                           num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16, drop=0., groups=4)

def make(path, seed=0, dls=None, **kwargs):
    learn = detr_learner(dls or make_dls(path=path), make_model(seed), path=path, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

class Spy(Callback):
    "The rates that the optimizer has at each step, and its weight decays."
    order = 70
    def before_fit(self): self.rates, self.decays = [], []
    def before_step(self):
        self.rates.append([float(h['lr']) for h in self.opt.hypers])
        self.decays.append([float(h['wd']) for h in self.opt.hypers])

def ratios(spy): return np.array(spy.rates) / np.array(spy.rates)[:, -1:]

WANTED = np.array(list(RATES.values()))

# ---- groups

@pytest.mark.parametrize('heads', (RefiningHeads, SharedHead))
def test_each_trainable_parameter_is_in_one_group(heads):
    model = make_model(heads=heads)
    groups = named_groups(model)
    assert list(groups) == list(RATES)
    ids = [id(p) for ps in groups.values() for p in ps]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in model.parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(('.offsets.' in names[id(p)] or '.reference.' in names[id(p)]) == (g == 'offsets') for g, ps in groups.items() for p in ps)

def test_frozen_norms_and_frozen_layers_are_in_no_group():
    backbone = ResNet(BasicBlock, (1, 1, 1), (8, 8, 8), 8, out_indices=(1, 2))       # frozen norms
    model = make_model(backbone=backbone)
    backbone.conv1.requires_grad_(False)
    groups = named_groups(model)
    ids = {id(p) for ps in groups.values() for p in ps}
    assert ids == {id(p) for p in model.parameters() if p.requires_grad} and id(backbone.conv1.weight) not in ids
    backbone.requires_grad_(False)
    assert list(named_groups(model)) == ['neck', 'decoder', 'offsets', 'heads']

def test_a_learner_without_a_backbone_to_train(tmp_path):
    dls, model = make_dls(path=tmp_path), make_model()
    model.backbone.requires_grad_(False)
    learn = detr_learner(dls, model)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-3, cbs=(spy := Spy()))
    np.testing.assert_allclose(ratios(spy), np.tile(WANTED[1:], (2, 1)))
    assert not any(p.requires_grad for p in model.backbone.parameters())

def test_wrapped_models_have_the_same_groups():
    model = make_model()
    for name in ('module', '_orig_mod'):                                 # of several GPUs, of torch.compile
        wrapped = nn.Module()
        setattr(wrapped, name, model)
        assert list(map(len, Splitter(model)(wrapped))) == list(map(len, Splitter(wrapped)(model))) == list(map(len, named_groups(model).values()))

def test_strange_models_are_refused():
    with pytest.raises(ArgumentError, match='0.weight'): named_groups(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ArgumentError, match='without trainable'): named_groups(make_model().requires_grad_(False))

def test_bad_arguments_are_refused():
    dls, model = make_dls(), make_model()
    with pytest.raises(ArgumentError, match='rates'): detr_learner(dls, model, rates=dict(head=1))
    with pytest.raises(ArgumentError, match='opt_func'): detr_learner(dls, model, opt_func='adahessian')
    with pytest.raises(ArgumentError, match='vocab'): detr_learner([1, 2], model)

# ---- rates

@pytest.mark.parametrize('opt_func', ('adamw', 'lookahead+radam', Adam, partial(OptimWrapper, opt=torch.optim.AdamW)), ids=('adamw', 'lookahead', 'Adam', 'OptimWrapper'))
def test_ratios_hold_at_every_step(opt_func, tmp_path):
    learn, spy = make(tmp_path, opt_func=opt_func), Spy()
    learn.fit(1, 1e-3, cbs=spy)
    assert_close(torch.tensor(spy.rates), 1e-3 * torch.tensor(WANTED, dtype=torch.float32).expand(2, 5).contiguous(), rtol=1e-6, atol=0)
    learn.fit(1, slice(1e-5, 1e-3), cbs=spy)
    np.testing.assert_allclose(spy.rates, [1e-3 * WANTED] * 2)
    learn.fit_one_cycle(2, slice(1e-5, 1e-3), cbs=spy)
    np.testing.assert_allclose(ratios(spy), [WANTED] * 4)
    assert len({r[-1] for r in spy.rates}) == 4                       # the schedule goes on below
    learn.fine_tune(1, 1e-3, cbs=spy)
    np.testing.assert_allclose(ratios(spy), [WANTED] * 2)

def test_frozen_epoch_of_fine_tune(tmp_path):
    learn = make(tmp_path)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    class Frozen(Spy):
        order, moved = 71, None
        def after_train(self): self.moved = self.moved or {group_of(n) for n, p in self.model.named_parameters() if p.ndim > 1 and not torch.equal(p, before[n])}
    spy = Frozen()
    learn.fine_tune(1, cbs=spy)
    assert spy.moved == {'heads'} and list(learn.splitter.named(learn.model)) == list(RATES)
    assert max(r[-1] for r in spy.rates) <= 1e-4                      # half of the learner's rate, not of fastai's 2e-3
    assert not any(torch.equal(p, before[n]) for n, p in learn.model.named_parameters() if p.ndim > 1)

def test_other_multipliers_do_not_pile_up(tmp_path):
    learn, spy = make(tmp_path, rates=dict(heads=.5, backbone=0.)), Spy()
    frozen = [p.detach().clone() for p in learn.model.backbone.parameters()]
    learn.fit(3, 1e-3, wd=.1, cbs=spy)
    np.testing.assert_allclose(spy.rates, [[0., 1e-3, 1e-3, 1e-4, 5e-4]] * 6)
    assert all(map(torch.equal, frozen, learn.model.backbone.parameters()))

def test_other_schedules(tmp_path):
    learn, spy = make(tmp_path), Spy()
    for fit in (partial(learn.fit_flat_cos, 2), partial(learn.fit_sgdr, 1, 2), partial(learn.fit_step, 5)):
        fit(cbs=spy)
        np.testing.assert_allclose(ratios(spy), [WANTED] * len(spy.rates))
    np.testing.assert_allclose([r[-1] for r in spy.rates], [2e-4] * 8 + [2e-5] * 2)
    learn.fit(3, 1e-3, cbs=[spy, ReduceLROnPlateau('AP', patience=1)])   # AP stays 0
    np.testing.assert_allclose([r[-1] for r in spy.rates], np.repeat([1e-3, 1e-3, 1e-4], 2))

# ---- optimizers

@pytest.mark.parametrize('decay_all', (False, True))
def test_training_is_the_recipe(decay_all, tmp_path):
    "The learner's steps are those of a loop with nothing of fastai."
    dls = DetectionDataLoaders(DetectionDL(SCENES[:4], DIGITS, bs=4), DetectionDL(SCENES[:4], DIGITS, bs=4))
    learn = make(tmp_path, dls=dls, wd=.1, wd_bn_bias=decay_all)
    model, loss = make_model(), SetLoss()
    opt = torch.optim.AdamW([dict(params=[p], lr=2e-4 * RATES[group_of(n)], weight_decay=.1 if decay_all or p.ndim > 1 else 0.) for n, p in model.named_parameters()], fused=True)   # keys' biases have no gradient but rounding: the same rounding, then
    learn.fit(3)
    batch = dls.train.one_batch()
    for _ in range(3):
        loss(model(*batch[:2]), *batch[2:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), .1)
        opt.step(); opt.zero_grad()
    for (n, p), q in zip(learn.model.named_parameters(), model.parameters()): assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda m: f'{n}: {m}')

NAMES = [o.__name__.lower() for o in vars(torch_optimizer).values() if isinstance(o, type) and issubclass(o, torch.optim.Optimizer)]
NAMES = sorted({'adamw', 'adam', 'sgd', *NAMES} - {'optimizer', 'lookahead', 'adahessian', 'a2gradexp', 'a2gradinc', 'a2graduni'})

def three_groups():
    g = torch.Generator().manual_seed(0)
    return [[nn.Parameter(torch.randn(3, 4, generator=g)), nn.Parameter(torch.randn(4, generator=g))] for _ in range(3)]

def walk(opt, groups, lrs, steps, start=0):
    for t in range(start, start + steps):
        opt.set_hyper('lr', lrs); opt.set_hyper('mom', .95 - .01 * t)
        for p in sum(groups, []): p.grad = torch.sin(3 * p.detach() + t)
        opt.step()

def where(groups): return [torch.cat([p.detach().flatten() for p in ps]) for ps in groups]

@pytest.mark.parametrize('name', NAMES + ['lookahead+' + o for o in NAMES])
def test_every_optimizer_keeps_groups_apart(name):
    lrs, build = [1e-3, 1e-2, 1e-2], optimizer(name)
    groups = three_groups()
    opt = build(groups, lr=1e-2)
    opt.set_hyper('wd', .01)
    walk(opt, groups, lrs, 12)
    for together, ps, lr in zip(where(groups), three_groups(), lrs):                       # as three optimizers of their own
        alone = build([ps], lr=1e-2)
        alone.set_hyper('wd', .01)
        walk(alone, [ps], lr, 12)
        assert_close(together, where([ps])[0])
    still = three_groups()                                                                    # who has no rate stands still
    walk(build(still, lr=1e-2), still, [0., 0., 1e-2], 3)
    assert_close(where(still)[:2], where(three_groups())[:2], atol=1e-4, rtol=0)       # MADGRAD adds 1e-6 to the rate
    state = copy.deepcopy(opt.state_dict())                                                                  # a copy that goes on is not told from the original
    copies = [[nn.Parameter(p.detach().clone()) for p in ps] for ps in groups]
    twin = build(copies, lr=1.)
    twin.load_state_dict(state)
    for o, ps in ((opt, groups), (twin, copies)): walk(o, ps, lrs, 6, 12)
    assert_close(where(groups), where(copies))
    assert not any(o.requires_grad for st in opt.opt.state.values() for o in st.values() if isinstance(o, torch.Tensor))   # no graph grows
    opt.clear_state()                                                                         # as `freeze` does
    walk(opt, groups, lrs, 2)
    assert all(p.isfinite().all() for p in where(groups))

def test_hypers_of_a_group_optimizer():
    groups = three_groups() + [[nn.Parameter(torch.ones(2, 2))], [nn.Parameter(torch.ones(2))]]    # groups without vectors, without matrices
    opt = optimizer('adamw')(groups, lr=.1)
    for ps in groups: opt.state[ps[-1]]['do_wd'] = ps[-1].ndim > 1
    opt.set_hypers(wd=.1, lr=slice(1e-5, 1e-1), mom=.8)
    assert [round(h['lr'], 8) for h in opt.hypers] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1] and {h['mom'] for h in opt.hypers} == {.8}
    assert [g['weight_decay'] for g in opt.opt.param_groups] == [.1, 0] * 3 + [.1, .1] + [.1, 0]     # the fourth group has no vectors
    opt.hypers[1]['lr'] = 7.
    assert [g['lr'] for g in opt.opt.param_groups][2:4] == [7., 7.]
    with pytest.raises(AssertionError): opt.set_hyper('lr', [1., 2.])
    with pytest.raises(KeyError): opt.set_hyper('nonsense', 1.)
    assert repr(optimizer('Lookahead+RAdam')) == "optimizer('Lookahead+RAdam')"

def test_options_of_an_optimizer():
    assert optimizer('adamw', betas=(.5, .6))(three_groups(), lr=.1).opt.param_groups[0]['betas'] == (.5, .6)

@pytest.mark.parametrize('opt_func', ('adamw', 'lookahead+radam'))
def test_saved_and_loaded_learners_go_on_alike(opt_func, tmp_path):
    dls = DetectionDataLoaders(DetectionDL(SCENES, DIGITS, bs=5), DetectionDL(SCENES, DIGITS, bs=5))
    one, two = make(tmp_path, dls=dls, opt_func=opt_func), make(tmp_path, 1, dls=dls, opt_func=opt_func)
    one.fit(3)
    one.save('half')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        two.load('half')
    for o in (one, two): o.fit_one_cycle(3, 1e-2)
    for p, q in zip(one.model.parameters(), two.model.parameters()): assert_close(p, q)

# ---- lr_find

@pytest.mark.parametrize('opt_func', ('lookahead+radam', Adam), ids=('lookahead', 'Adam'))
def test_lr_find_ends_in_peace(opt_func, tmp_path):
    learn = make(tmp_path, opt_func=opt_func)
    learn.fit(1)
    before, step = [p.clone() for p in learn.model.state_dict().values()], learn.loss_func.step
    found = learn.lr_find(start_lr=1e-5, end_lr=1e8, num_it=40, stop_div=False, show_plot=False)
    assert found.valley > 0 and len(learn.recorder.losses) < 40 and np.isfinite([float(o) for o in learn.recorder.losses]).all()
    assert all(map(torch.equal, before, learn.model.state_dict().values()))
    assert (learn.loss_func.nonfinite, learn.loss_func.step) == ('raise', step)
    assert not any((tmp_path/'models').iterdir())
    learn.fit_one_cycle(1, 1e-3, cbs=(spy := Spy()))                   # and the schedule is followed afterwards
    inner = getattr(learn.opt.opt, 'optimizer', learn.opt.opt) if hasattr(learn.opt, 'opt') else None
    assert inner is None or inner.param_groups is learn.opt.opt.param_groups
    np.testing.assert_allclose(ratios(spy), [WANTED] * 2)

def test_lr_find_that_ends_too_early_says_so(tmp_path):
    learn = make(tmp_path)
    with pytest.raises(ArgumentError, match='more steps'): learn.lr_find(1e10, 1e20, num_it=12, show_plot=False)
    assert learn.loss_func.nonfinite == 'raise' and all(p.isfinite().all() for p in learn.model.parameters())

def test_training_raises_where_lr_find_does_not(tmp_path):
    learn = make(tmp_path)
    with pytest.raises(NonFinitePredictions, match='step 2'): learn.fit(1, 1e30)

# ---- columns, predictions

def test_columns_and_history(tmp_path):
    learn = make(tmp_path)
    learn.fit(2)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'class', 'box', 'giou', 'AP', 'AP50', 'time']
    table = history(learn)
    assert len(table.rows) == 2 and 'time' not in table.header and len(table.rows[0]) == len(table.header)
    values = learn.validate()
    batches, loss, total = list(learn.dls.valid), SetLoss(), np.zeros(4)
    for b in batches:
        with torch.no_grad(): value = loss(learn.model(*b[:2]), *b[2:])                     # all layers
        total += len(b[0]) * np.array([float(o) for o in (value, *(loss.parts[k] for k in ('class', 'box', 'giou')))])
    np.testing.assert_allclose(values[:4], total / len(SCENES), rtol=1e-5)

def test_ap_is_that_of_the_predictions(tmp_path):
    learn = make(tmp_path)
    learn.metrics, metrics = [], learn.metrics
    learn.fit_one_cycle(16, 1e-2)
    learn.metrics = metrics
    values = learn.validate()
    (scores, labels, boxes), (true, classes) = learn.get_preds()
    pixels = lambda b: (cxcywh_to_xyxy(b) * 32).numpy()
    res = coco_ap([(pixels(b), s.numpy(), l.numpy()) for s, l, b in zip(scores, labels, boxes)],
                  [(pixels(b[c >= 0]), c[c >= 0].numpy()) for b, c in zip(true, classes)], 10)
    assert res.AP > 0 and values[-2] == pytest.approx(res.AP, abs=1e-6) and values[-1] == pytest.approx(res.AP50, abs=1e-6)

def test_get_preds(tmp_path):
    learn = make(tmp_path, dls=make_dls(1, tmp_path))                    # an image a batch: targets of different lengths
    most = max(len(s.labels) for s in SCENES)
    *_, losses = learn.get_preds(with_loss=True)                         # first of all calls: nothing is remembered yet
    inputs, dets, targets, decoded, again = learn.get_preds(with_input=True, with_loss=True, with_decoded=True)
    assert [tuple(o.shape) for o in dets] == [(5, 60), (5, 60), (5, 60, 4)] and dets[0].dtype == torch.float32
    assert [tuple(o.shape) for o in targets] == [(5, most, 4), (5, most)] and [tuple(o.shape) for o in inputs] == [(5, 3, 32, 32), (5, 32, 32)]
    assert [(c >= 0).sum().item() for c in targets[1]] == [len(s.labels) for s in SCENES]
    assert_close(losses, again)
    for i, s in enumerate(SCENES):
        b = collate([s])
        with torch.no_grad(): one = SetLoss()(learn.model(*b[:2]), *b[2:])
        assert_close(losses[i], one, rtol=1e-4, atol=1e-4)
    (scores, *_), _ = learn.get_preds(ds_idx=0)                          # the training set, in its order
    assert_close(scores, dets[0])
    preds, none = learn.get_preds(dl=learn.dls.test_dl([s.image for s in SCENES]))
    assert_close(preds[0], dets[0], rtol=1e-4, atol=1e-5)

def test_predictions_of_pictures_of_different_sizes(tmp_path):
    learn = make(tmp_path)
    images = [SCENES[0].image, np.kron(SCENES[1].image, np.ones((2, 1, 1), np.uint8)), SCENES[2].image[:20]]
    (_, _, boxes), _ = learn.get_preds(dl=learn.dls.test_dl(images))
    assert boxes.shape == (3, 60, 4) and boxes.isfinite().all()
    batch = learn.dls.test_dl(images, bs=3).one_batch()
    for i, image in enumerate(images):
        assert np.abs(picture(batch[0][i], batch[1][i]).permute(1, 2, 0).numpy() * 255 - image).max() < .01       # as it was, without the padding

def test_predict(tmp_path):
    learn = make(tmp_path)
    image = SCENES[0].image
    Image.fromarray(image).save(tmp_path/'a.png')
    ways = [image, tmp_path/'a.png', str(tmp_path/'a.png'), Image.fromarray(image), Image.fromarray(image).convert('RGBA'), np.dstack([image, image[..., :1]])]
    found = [learn.predict(o, 0.) for o in ways]
    for f in found:
        assert isinstance(f, Found) and f.boxes.shape == (60, 4) and f.scores.shape == (60,) and len(f.labels) == 60 and set(f.labels) <= set(DIGITS)
        for a, b in zip(f, found[0]): assert_close(a, b) if isinstance(a, torch.Tensor) else None
    assert (found[0].scores.diff() <= 0).all() and len(learn.predict(image, 1.).labels) == 0 and learn.predict(image, 1.).boxes.shape == (0, 4)
    for shape in ((5, 7, 3), (40, 90, 3), (33, 31)): assert learn.predict(np.zeros(shape, np.uint8), 0.).boxes.isfinite().all()
    wide = learn.predict(np.repeat(image, 3, 1), 0.).boxes              # pixels of the image: x to 96, y to 32
    assert wide[:, 0::2].max() > 40
    with pytest.raises(ArgumentError, match='threshold'): learn.predict(image, 50)

def test_open_image(tmp_path):
    turned = Image.fromarray(SCENES[0].image[:20])
    exif = turned.getexif()
    exif[0x0112] = 6                                                     # lies on its side
    turned.save(tmp_path/'turned.png', exif=exif)
    assert open_image(tmp_path/'turned.png').shape == (32, 20, 3)
    np.testing.assert_array_equal(open_image(tmp_path/'turned.png'), np.rot90(SCENES[0].image[:20], -1))
    Image.fromarray(SCENES[0].image).save(tmp_path/'whole.jpg')
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'whole.jpg').read_bytes()[:300])
    (tmp_path/'empty.png').touch()
    for name in ('cut.jpg', 'empty.png', 'nowhere.png', '.'):
        with pytest.raises(ArgumentError, match='image') as e: open_image(tmp_path/name)
        assert str(tmp_path/name) in str(e.value)
    for bad in (torch.zeros(3, 4, 4), np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), None, 3):
        with pytest.raises(ArgumentError, match='image'): open_image(bad)
    assert open_image(SCENES[0].image).flags.writeable and open_image(SCENES[0].image) is not SCENES[0].image

def test_pictures_and_interpretation(tmp_path):
    learn = make(tmp_path)
    learn.show_results(max_n=2)
    assert len(plt.gcf().axes) == 4
    learn.show_results(ds_idx=0, max_n=1, threshold=0., shuffle=True)
    losses, idxs = Interpretation.from_learner(learn).top_losses(2)      # fastai's own
    ours = DetectionInterpretation.from_learner(learn)
    assert_close(ours.top_losses(2)[0], losses)
    plt.close('all')
    ours.plot_top_losses(2)
    assert f'image {idxs[0]}, loss {losses[0]:.2f}' in plt.gcf().axes[0].get_title()
    ours.show_results([0, 4])
    inputs, dets, targets, decoded, own = ours[[1, 0]]
    assert dets[0].shape == (2, 60) and own.shape == (2,) and torch.equal(inputs[0][0], collate(SCENES[1:2])[0][0])
    plt.close('all')

def test_summary(tmp_path):
    learn = make(tmp_path)
    text = str(learn.summary())
    assert "optimizer('adamw')" in text and 'GroupRates' in text and 'MSDeformAttn' not in text.split('=')[0]

# ---- export, callbacks

@pytest.mark.parametrize('opt_func', ('lookahead+radam', Adam), ids=('lookahead', 'Adam'))
def test_export(opt_func, tmp_path):
    learn = make(tmp_path, opt_func=opt_func)
    learn.fit(1)
    learn.freeze()
    learn.export('x.pkl')
    assert len(learn.opt.param_lists) == 5 and len(learn.dls.valid_ds) == len(SCENES)
    again = load_learner(tmp_path/'x.pkl')
    assert not again.metrics[-1].collection.detections                   # what was validated does not travel
    assert_close(again.predict(SCENES[0].image, 0.).boxes, learn.predict(SCENES[0].image, 0.).boxes)
    again.dls = learn.dls                                                # and it can be trained on
    again.unfreeze()
    again.logger = lambda *_: None
    again.fit(1, 1e-3, cbs=(spy := Spy()))
    np.testing.assert_allclose(ratios(spy), [WANTED] * 2)
    assert all(p.requires_grad for p in again.model.parameters())

def test_callbacks_find_the_columns(tmp_path, capsys):
    learn = make(tmp_path)
    learn.fit(4, 0., cbs=[SaveModelCallback('AP'), EarlyStoppingCallback('AP50', patience=2)])
    assert len(learn.recorder.values) == 3 and (tmp_path/'models/model.pth').exists()

def test_gradient_accumulation(tmp_path):
    learn, spy = make(tmp_path), Spy()
    learn.fit(2, 1e-3, cbs=[GradientAccumulation(4), spy])
    assert len(spy.rates) == 2                                           # four batches of two
    np.testing.assert_allclose(ratios(spy), [WANTED] * 2)

@pytest.mark.parametrize('how', ('to_bf16', 'to_fp16'))
def test_mixed_precision_runs_on_the_cpu(how, tmp_path):
    learn = make(tmp_path)
    getattr(learn, how)()
    learn.fit_one_cycle(1, 1e-3, cbs=(spy := Spy()))
    np.testing.assert_allclose(ratios(spy), [WANTED] * 2)
    assert learn.predict(SCENES[0].image, 0.).boxes.isfinite().all()

def test_predictions_in_bfloat16_become_float(tmp_path):
    class Half(Callback):
        order = -20
        def before_batch(self): self.context = torch.autocast('cpu', torch.bfloat16); self.context.__enter__()
        def after_pred(self): assert self.pred[0].dtype == torch.bfloat16
        def after_loss(self): self.context.__exit__(None, None, None)
    learn = make(tmp_path)
    learn.fit(1, 1e-3, cbs=Half())
    assert np.isfinite(learn.recorder.values[0][:5]).all()

def test_epochs_are_counted_over_fits(tmp_path):
    class Scenes(list):
        def set_epoch(self, epoch): seen.append(epoch)
    seen, scenes = [], Scenes(SCENES)
    learn = make(tmp_path, dls=make_dls(4, tmp_path, scenes))
    learn.fit(2); learn.validate(); learn.get_preds(); learn.fine_tune(2)
    assert seen == [0, 1, 2, 3, 4]
    again = make(tmp_path, dls=make_dls(4, tmp_path, scenes))
    seen.clear()
    again.fit(3, start_epoch=2)                                          # goes on where another run was interrupted
    assert seen == [2]

def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    dls = DetectionDataLoaders.from_scenes(SCENES, SCENES, '0123456789abcdef', bs=2)
    with pytest.raises(ArgumentError, match='16, for the vocabulary'): make(tmp_path, dls=dls).validate()

def test_a_loss_of_ones_own(tmp_path):
    loss = DetectionLoss(detect=lambda preds, top: [o[:, :3] for o in __import__('deformlit.deformable_detr', fromlist='_').detect(preds, top)], giou_weight=3.)
    learn = make(tmp_path, loss_func=loss)
    learn.fit(1)
    assert learn.get_preds()[0][0].shape == (5, 3) and len(learn.metrics[-1].collection.detections[0][0]) == 3

# ---- what belongs to the model

def make_detr(num_classes=10): return detr(num_classes, ConvNet((8, 8), num_maps=1), dim=16, num_heads=2, num_queries=6, num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16, drop=0., residual=PreNorm)

def test_the_loss_is_the_models():
    loss = loss_of(make_detr())
    assert isinstance(loss.classify, SoftmaxLoss) and loss.classify is loss.matcher.classify and loss.classify.eos == 0.1 and loss.detect is detect_softmax
    assert (loss.matcher.class_cost, loss.matcher.box_cost, loss.matcher.giou_cost) == (1, 5, 2) and loss.weights == {'class': 1, 'box': 5, 'giou': 2}
    for model in (make_model(), nn.Linear(1, 1)):                        # a model that says nothing is treated as Deformable DETR
        loss = loss_of(model)
        assert isinstance(loss.classify, FocalLoss) and loss.detect is detect and loss.matcher.class_cost == 2 and loss.weights == {'class': 2, 'box': 5, 'giou': 2}
    class Half(DETR): loss = {**DETR.loss, 'class_weight': 0.5}
    half = make_detr(); half.__class__ = Half
    assert loss_of(half).weights['class'] == 0.5 and loss_of(half, class_weight=3.).weights['class'] == 3
    assert loss_of(nn.DataParallel(make_detr())).detect is detect_softmax and loss_of(torch.compile(make_detr(), backend='eager')).detect is detect_softmax
    assert 'classify' in Detector.loss                                   # what was read is not changed

def test_detr_learns(tmp_path):
    "All of the learner, with a softmax: no label is ever the class for no object."
    learn = detr_learner(make_dls(path=tmp_path), make_detr(), path=tmp_path)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    learn.fit(2)
    (scores, labels, boxes), _ = learn.get_preds()
    assert scores.shape == (5, 6) and labels.max() < 10 and (scores.diff(dim=1) <= 0).all() and (scores.sum(1) <= 6).all()
    assert learn.recorder.metric_names[3:6] == ['class', 'box', 'giou']
    learn.export('detr.pkl')
    again = load_learner(tmp_path/'detr.pkl')
    assert again.loss_func.detect is detect_softmax
    found = learn.predict(np.zeros((40, 50, 3), np.uint8), threshold=0.)
    assert len(found.labels) == 6 and set(found.labels) <= set(DIGITS)
    losses = learn.get_preds(with_loss=True)[-1]
    assert losses.shape == (5,) and losses.isfinite().all()

def test_a_given_loss_reads_as_the_model_does(tmp_path):
    classify = SoftmaxLoss(0.3)
    learn = detr_learner(make_dls(path=tmp_path), make_detr(), path=tmp_path, loss_func=DetectionLoss(classify=classify))
    assert learn.loss_func.detect is detect_softmax and learn.loss_func.classify is classify
    with pytest.raises(ArgumentError, match='for the vocabulary'):       # a sigmoid's loss has no class for nothing
        with learn.no_bar(), learn.no_logging(): detr_learner(make_dls(path=tmp_path), make_detr(), loss_func=DetectionLoss()).validate()

def test_recipe_loop_clips():
    far = {'heads': [dict(x=1., g=3., m=0., v=0., decays=False), dict(x=1., g=4., m=0., v=0., decays=True)]}
    recipe_loop(far, 1, .1, RATES)
    assert far['heads'][0]['m'] == pytest.approx(.1 * .06, rel=1e-4) and far['heads'][1]['m'] == pytest.approx(.1 * .08, rel=1e-4)   # length 5 became 0.1

# ---- two stages: a third field of predictions

def make_two(path, **kwargs):
    torch.manual_seed(0)
    model = two_stage_detr(10, ConvNet((8, 8), num_maps=2), dim=16, num_heads=2, num_levels=2, num_points=2, num_queries=6,
                           num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16, drop=0., groups=4)
    learn = detr_learner(make_dls(path=path), model, path=path, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

def test_two_stages_train_validate_and_predict(tmp_path):
    learn, parts = make_two(tmp_path), []
    class Seen(Callback):
        order = 90
        def after_loss(self):
            if not self.training: parts.append((dict(self.learn.loss_func.parts), len(self.learn.pred), [o.shape[1] for o in self.learn.pred]))
    before = learn.model.queries.token_proj.weight.detach().clone(), learn.model.heads.heads[-1].box[-1].weight.detach().clone()
    learn.fit(1, 1e-3, cbs=Seen())
    names = list(learn.recorder.metric_names)
    assert names[:7] == ['epoch', 'train_loss', 'valid_loss', 'class', 'box', 'giou', 'proposals'] and all(np.isfinite(learn.recorder.values[0][:6]))
    assert len(parts) and all(n == 2 and layers == [1, 1] for _, n, layers in parts)                    # outside training the proposals go no farther than the loss
    assert all(p['proposals'] > 0 for p, _, _ in parts)
    sizes = [len(SCENES) % 2 if i == len(parts) - 1 else 2 for i in range(len(parts))]
    assert_close(learn.recorder.values[0][names.index('proposals') - 1], sum(float(p['proposals']) * n for (p, _, _), n in zip(parts, sizes)) / len(SCENES), rtol=1e-4, atol=1e-5)
    assert not torch.equal(learn.model.queries.token_proj.weight, before[0]) and not torch.equal(learn.model.heads.heads[-1].box[-1].weight, before[1])
    assert {group_of(n) for n, _ in learn.model.named_parameters() if n.startswith('heads')} == {'heads'} and group_of('queries.token_proj.weight') == 'decoder'
    assert len(learn.validate()) == len(learn.metrics) + 1
    (scores, labels, boxes), targets, losses = learn.get_preds(with_loss=True)
    assert scores.shape == (5, 60) and boxes.shape == (5, 60, 4)
    for i, s in enumerate(SCENES):
        b = collate([s])
        with torch.no_grad(): one = SetLoss()(learn.model(*b[:2]), *b[2:])                              # with its proposals
        assert_close(losses[i], one, rtol=1e-4, atol=1e-4)
    assert isinstance(learn.predict(SCENES[0].image, 0.), Found)
    learn.show_results(max_n=1); plt.close('all')
    assert 'ProposalQueries' not in str(learn.summary()).split('=')[0]

def test_two_stages_freeze_fine_tune_and_lr_find(tmp_path):
    learn = make_two(tmp_path)
    learn.fine_tune(1, 1e-3)
    learn.lr_find(num_it=20, end_lr=1e6, show_plot=False)                  # explodes, and ends in peace

@pytest.mark.parametrize('how', ('to_bf16', 'to_fp16'))
def test_two_stages_in_mixed_precision(how, tmp_path):
    learn = make_two(tmp_path)
    getattr(learn, how)()
    learn.fit(1, 1e-3)
    assert learn.predict(SCENES[0].image, 0.).boxes.isfinite().all()

def test_two_stages_travel(tmp_path):
    learn = make_two(tmp_path)
    learn.fit(1, 1e-3)
    learn.export('x.pkl')
    again = load_learner(tmp_path/'x.pkl')
    assert_close(again.predict(SCENES[0].image, 0.).boxes, learn.predict(SCENES[0].image, 0.).boxes)
    again.dls, again.logger = learn.dls, lambda *_: None
    again.fit(1, 1e-3)
    assert_close(DetectionInterpretation.from_learner(learn).losses, learn.get_preds(with_loss=True)[-1], rtol=1e-4, atol=1e-4)
