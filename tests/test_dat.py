"""DAT and DAT++ beyond the golden files: counts, formula weights of the full size, sizes, types, compilation, checkpointing, official files."""
import functools, math, pickle, sys, types

import formula, pytest, torch
from torch import nn
from torch.testing import assert_close
from deformlit.backbones import *
from deformlit.checkpoints import WeightsError, entries, load_weights, save_weights, to_layout
from deformlit.core import ArgumentError
from deformlit.dat import *
from deformlit.deformed_keys import *
from deformlit.relative_bias import *
from deformlit.windows import *

# dims and heads small, all kinds of layers
FIRST = dict(parts=FirstRelease, dims=(8, 16, 24, 48), depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6), num_groups=(1, 1, 3, 6), strides=(1, 1, 1, 1), window_size=4, img_size=64, num_classes=5)
PP = dict(dims=(8, 16, 24, 48), depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6), num_groups=(1, 2, 3, 6), window_size=3, img_size=64, num_classes=5)
BOTH = pytest.mark.parametrize('args', [FIRST, PP], ids=['first', 'pp'])
def small(args, **more):
    torch.manual_seed(0)
    model = dat(**args | more).eval()
    for n, p in model.named_parameters():                # tables that say something
        if n.endswith('table'): nn.init.normal_(p, std=.5)
    return model

# ---- counts

# of the whole model; stem, stages, downs, norm, head; tensors, official keys, numbers in buffers; products in G by fvcore
COUNTS = dict(
    dat_tiny=(28319138, 4896, (224694, 891756, 10690632, 14185648), (74112, 295680, 1181184), 1536, 769000, (209, 219, 211288), 4.5889),
    dat_small=(49700402, 4896, (224694, 891756, 32071896, 14185648), (74112, 295680, 1181184), 1536, 769000, (419, 435, 225694), 9.0084),
    dat_base=(87881632, 6528, (397896, 1582224, 56906784, 25205056), (131584, 525312, 2099200), 2048, 1025000, (419, 435, 225694), 15.7876),
    dat_base_384=(88178272, 6528, (400776, 1587984, 57171744, 25228096), (131584, 525312, 2099200), 2048, 1025000, (419, 435, 1949184), 49.7719),
    dat_pp_tiny=(23962876, 19584, (136852, 851152, 14528016, 6363168), (73984, 295424, 1180672), 1024, 513000, (589, 589, 0), 4.2877),
    dat_pp_small=(53127366, 43200, (279006, 1866552, 32417496, 14264240), (166272, 664320, 2655744), 1536, 769000, (589, 589, 0), 9.4256),
    dat_pp_base=(93690640, 76032, (464808, 3268256, 57350304, 25307456), (295424, 1180672, 4720640), 2048, 1025000, (589, 589, 0), 16.5595),
    dat_pp_base_384=(93690640, 76032, (464808, 3268256, 57350304, 25307456), (295424, 1180672, 4720640), 2048, 1025000, (589, 589, 0), 49.7341))

def count(m): return sum(p.numel() for p in m.parameters())
def empty(name, **args):
    with torch.device('meta'): return getattr(sys.modules['deformlit.dat'], name)(**args)

@pytest.mark.parametrize('name', COUNTS)
def test_counts(name, parity):
    whole, stem, stages, downs, norm, head, (tensors, keys, buffers), macs = COUNTS[name]
    model = empty(name)
    found = count(model), count(model.stem), tuple(map(count, model.stages)), tuple(map(count, model.downs)), count(model.norm), count(model.head)
    parity.same('DAT', 'official statements', 'numbers of parameters, of all parts', found, (whole, stem, stages, downs, norm, head), numbers=11)
    official = to_layout(model, 'official')
    assert len(list(model.parameters())) == tensors and len(official) == keys
    assert sum(t.numel() for t in official.values()) - whole == buffers
    assert abs(count_macs(model, 384 if '384' in name else 224) / 1e9 / macs - 1) < .005
    assert model.default_cfg['input_size'] == ((3, 384, 384) if '384' in name else (3, 224, 224))

OPTIONS = dict(no_off=(23856138, dict(bias=lambda p: NoBias(), offsets=NoOffsets, read=PooledKeys())), dwc_pe=(23892618, dict(bias=lambda p: DepthwiseBias(p.dim))),
               fixed_pe=(25239114, dict(bias=lambda p: FixedBias(p.num_heads, p.size, [o // p.stride for o in p.size]))), log_cpb=(23858378, dict(bias=lambda p: LogCPB(p.num_heads, p.num_groups))))
def variant(base, **options):
    "A release whose deformed attentions have other parts."
    other = lambda f: functools.partial(f, **options) if f in (deformed, first_deformed) else f
    return type('Variant', (base,), dict(attns=tuple(tuple(map(other, o)) for o in base.attns)))

@pytest.mark.parametrize('name', OPTIONS)
def test_options_counts(name):
    total, parts = OPTIONS[name]
    model = empty('dat_pp_tiny', parts=variant(PlusPlus, **parts))
    assert count(model) == total
    if name == 'no_off': assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 23824650
    if name == 'dwc_pe': assert count(empty('dat_tiny', parts=variant(FirstRelease, **parts))) == 28308038

def test_384_counts():
    assert count(empty('dat_tiny', img_size=384, window_size=12)) == 28409138 and count(empty('dat_pp_tiny', img_size=384)) == 24177276

# ---- options that crash in the official code

@pytest.mark.parametrize('base, args', [(FirstRelease, FIRST), (PlusPlus, PP)], ids=['first', 'pp'])
@pytest.mark.parametrize('name', [*OPTIONS, 'no_off_sampled', 'no_off_depthwise'])
def test_options_run(base, args, name):
    options = OPTIONS[name][1] if name in OPTIONS else dict(offsets=NoOffsets) if name.endswith('sampled') else dict(offsets=NoOffsets, read=PooledKeys(), bias=OPTIONS['dwc_pe'][1]['bias'])
    model = small(args, parts=variant(base, **options))
    for size in ((64, 64), (40, 96), (32, 32)):
        x = torch.randn(1, 3, *size)
        y = model(x)
        assert y.shape == (1, 5) and y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert entries(model, 'official')                    # has official names too

# ---- formula weights: numbers that the official code gave, for weights that a formula makes

GOLDEN = dict(
    dat_tiny=dict(first=(.57833042, -.74029338, 1.03095177), last=-.26425670, mean=-6.4053336957e-02, l2=3.2145410567e+01, argmax=572,
        stages=(8.3664910484e+02, 6.2330667384e+02, 8.0316929548e+02, 3.7530813248e+02), stage_first=((-.42757059, -.80172511, .23285759), (-1.89914767, .15663858, -.66284764), (-1.79056815, .57019664, .65689374), (1.10503918, .75901399, 1.01117911)),
        pos=((3.6540304781e-02, 2.0013421912e+01, (-.90016673, -.93884241, -.91938901), 1.05373161), (4.9770441726e-02, 1.4394456986e+01, (-.72042743, -.78855776, -.84687301), 1.11916457)),
        loss=516.6637102720, grad=3055.459580690, grads={'patch_proj.0.weight': 4.4336828816e+01, 'stages.2.attns.1.conv_offset.0.weight': 3.1358869780, 'stages.2.attns.1.rpe_table': 9.5248982747e-02,
            'stages.0.attns.1.relative_position_bias_table': 6.4765647620e-01, 'stages.3.attns.1.proj_k.weight': 4.3146603598, 'cls_head.weight': 8.7306310433e+02}),
    dat_pp_tiny=dict(first=(.14447298, .21383316, 1.15837917), last=-.45306224, mean=1.7212813330e-02, l2=1.6671080182e+01, argmax=928,
        stages=(1.2657565109e+03, 1.9035395584e+03, 7.0360283971e+04, 4.0880610146e+02), stage_first=((-4.07153479, .15250014, -1.36511828), (9.06839667, 3.78477368, 4.54639993), (21.82443719, -50.1520279, -4.65839409), (4.35281894, -.50717891, -2.13863081)),
        pos=((1.0185810444e-01, 7.0474207227, (-.16532701, -1., -1.), .90654900), (6.9544310698e-03, 1.9557029207e+01, (-.17960784, -1., -1.), 1.)),
        loss=138.9624572223, grad=3370.637957570, grads={'patch_proj.0.weight': 5.0737018372e+02, 'stages.0.attns.0.rpb': 1.4420683775e+01, 'stages.0.attns.1.conv_offset.3.weight': 6.3421447878e+02,
            'stages.2.attns.1.rpe_table': 6.3290111754e-01, 'stages.3.attns.1.proj_v.weight': 1.1625448672e+02, 'cls_head.weight': 1.8488934922e+02}))

def formula_model(name, dtype):
    model = getattr(sys.modules['deformlit.dat'], name)().to(dtype).eval()
    state = model.state_dict()
    load_weights(model, formula.weights({e.theirs[0]: state[e.ours[0]] for e in entries(model, 'official')}), 'official')
    return model, formula.image(1, 3, 224, 224).to(dtype)

def near_to(got, want, tolerance=1e-4): assert abs(float(got) - want) <= tolerance * max(1, abs(want)), (float(got), want)

@pytest.mark.slow
@pytest.mark.parametrize('name', GOLDEN)
def test_formula_weights(name):
    want, (model, x) = GOLDEN[name], formula_model(name, torch.float64)
    maps, points = [], []
    hooks = [m.register_forward_hook(lambda m, a, y: maps.append(y.detach())) for m in model.stages]
    hooks += [m.grid.register_forward_hook(lambda m, a, y: points.append((y.detach() * torch.tensor(a[1][::-1]) - .5) / (torch.tensor(a[1][::-1]) - 1) * 2 - 1)) for m in model.modules() if isinstance(m, DeformedKeysAttention)]
    y = model(x)
    logits = y.detach()[0]
    rows = [(logits[i], want['first'][i]) for i in range(3)] + [(logits[-1], want['last']), (logits.mean(), want['mean']), (logits.norm(), want['l2'])]
    rows += [(m.norm(), o) for m, o in zip(maps, want['stages'])] + [(m.flatten()[i], o[i]) for m, o in zip(maps, want['stage_first']) for i in range(3)]
    for p, (mean, l2, first, last) in zip((points[0], points[-1]), want['pos']):
        p = p.flip(-1)                                   # (y, x)
        rows += [(p.mean(), mean), (p.norm(), l2), (p.flatten()[-1], last)] + [(p.flatten()[i], first[i]) for i in range(3)]
    assert logits.argmax() == want['argmax']
    loss = y.square().sum() / 2
    loss.backward()
    grads = {e.theirs[0]: model.get_parameter(e.ours[0]).grad for e in entries(model, 'official')}
    assert all(g is not None for g in grads.values())
    rows += [(loss.detach(), want['loss']), (torch.stack([g.norm() for g in grads.values()]).norm(), want['grad'])] + [(grads[n].norm(), o) for n, o in want['grads'].items()]
    for got, o in rows: near_to(got, o)

# ---- any size, any type

@BOTH
def test_any_rectangle(args):
    model = small(args)
    for h, w in ((64, 64), (1, 1), (32, 32), (3, 200), (65, 47), (96, 40), (33, 33)):
        x = torch.randn(2, 3, h, w)
        before = x.clone()
        y, maps = model(x), model.forward_intermediates(x)[1]
        assert y.isfinite().all() and torch.equal(x, before)
        assert [tuple(o.shape[2:]) for o in maps] == [(-(-h // s), -(-w // s)) for s in (4, 8, 16, 32)]
        assert_close(model(x[:1]), y[:1], atol=1e-4, rtol=1e-4)          # images of a batch do not meet

@BOTH
def test_transposed(args):
    "An image on its side, with weights on their side, gives the same answer: no x stands for a y."
    model, x = small(args).double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for m in twin.modules():
            if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1): m.weight.copy_(m.weight.mT.clone())
            if isinstance(m, (InterpolatedBias, NeighbourTable)): m.table.copy_(m.table.mT.clone())
            if isinstance(m, WindowTable): m.table.copy_(m.table.unflatten(0, (2 * m.window_size[0] - 1, -1)).transpose(0, 1).flatten(0, 1).clone())
            if isinstance(m, OffsetNetwork): m.out.weight.copy_(m.out.weight.flip(0).clone())
    assert_close(twin(x.mT), model(x))

@BOTH
def test_types_and_layouts(args):
    model, x = small(args), torch.randn(2, 3, 64, 80)
    y = model(x)
    assert_close(model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), y, atol=1e-5, rtol=1e-4)
    with torch.autocast('cpu', torch.bfloat16): assert (model(x).float() - y).norm() < .1 * y.norm()
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - y).norm() < .1 * y.norm()
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

TWO = dict(dims=(8, 16), num_heads=(1, 2), num_groups=(1, 2), kernel_sizes=(5, 3), window_size=3)    # symbols of four stages take minutes
@pytest.mark.slow
@pytest.mark.parametrize('base, args', [(FirstRelease, dict(depths=(2, 1), strides=(1, 1))), (PlusPlus, dict(depths=(2, 1), strides=(2, 1)))], ids=['first', 'pp'])
def test_compiles_whole(base, args):
    "One graph for all sizes, gradients too."
    kinds = base.attns[0], base.attns[-1][-1:]
    model, x = small(TWO, parts=type('Two', (base,), dict(attns=kinds)), **args), torch.randn(2, 3, 40, 56)
    torch._dynamo.reset()
    compiled = []
    run = torch.compile(model, backend=lambda gm, inputs: compiled.append(gm) or gm.forward, fullgraph=True, dynamic=True)
    for h, w in ((40, 56), (64, 48)): assert_close(run(torch.ones(2, 3, h, w)), model(torch.ones(2, 3, h, w)), atol=1e-4, rtol=1e-4)
    assert len(compiled) <= 2             # sizes that blocks divide may get a graph of their own
    torch._dynamo.reset()
    run = torch.compile(model, backend='aot_eager', fullgraph=True)
    grads = [torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (run, model)]
    assert_close(*grads, atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()

@BOTH
def test_checkpointing(args):
    model, x = small(args), torch.randn(2, 3, 64, 64)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    assert_close(*grads)

@BOTH
def test_drop_path(args):
    model = small(args, drop_path_rate=.6)
    rates = [layer.drop_path.drop for stage in model.stages for layer in stage]
    assert rates[0] == 0 and rates[-1] == .6 and rates == sorted(rates)
    x = torch.randn(8, 3, 64, 64)
    assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), model(x))

# ---- where it looks

@BOTH
def test_look(args):
    model, x = small(args).train(), torch.randn(2, 3, 50, 90)
    looks = model.look(x)
    assert model.training and all(not m._forward_hooks for m in model.modules())
    assert [o.stage for o in looks] == ([2, 3] if args is FIRST else [0, 1, 2, 3, 3])
    for o in looks:
        m, s = model.get_submodule(o.name), model.strides[o.stage]
        assert o.size == (-(-50 // s), -(-90 // s)) and o.points.shape[:2] == (2, m.num_groups) and o.weights.shape == (2, m.num_heads, math.prod(o.size), o.points.shape[2])
        assert_close(o.weights.sum(-1), torch.ones_like(o.weights[..., 0])) and not o.weights.requires_grad
    with pytest.raises(ArgumentError): show_attended(x[0], [])

# ---- official files

@BOTH
def test_official_file(args, tmp_path, monkeypatch):
    "The layout of a checkpoint of the official training: weights under 'model', settings of yacs beside them."
    yacs, config = types.ModuleType('yacs'), types.ModuleType('yacs.config')
    class CfgNode(dict):
        def __init__(self, **o): super().__init__(**o); self.__dict__['__immutable__'] = False
    CfgNode.__module__, CfgNode.__qualname__, config.CfgNode, yacs.config = 'yacs.config', 'CfgNode', CfgNode, config
    with monkeypatch.context() as patch:
        for m in (yacs, config): patch.setitem(sys.modules, m.__name__, m)
        model = small(args)
        torch.save(dict(model=to_layout(model, 'official'), config=CfgNode(MODEL=CfgNode(TYPE='dat')), max_accuracy=82., epoch=299, lr_scheduler={}), tmp_path/'dat.pth')
    again = small(args)
    for p in again.parameters(): nn.init.zeros_(p)
    report = load_weights(again, tmp_path/'dat.pth')
    assert report.layout == 'official' and not report.new and not report.resized
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    save_weights(model, tmp_path/'out.pth', 'official')
    assert load_weights(again, tmp_path/'out.pth').kept == report.kept

def test_stale_buffers():
    model = small(FIRST)
    weights = to_layout(model, 'official') | {'stages.2.attns.1.q_grid': torch.zeros(2), 'stages.2.attns.1.reference': torch.zeros(2)}
    assert len(load_weights(model, weights).kept) == len(model.state_dict())
    with pytest.raises(WeightsError, match='stages.2.attns.1.more'): load_weights(model, weights | {'stages.2.attns.1.more': torch.zeros(2)})

@BOTH
def test_resized_tables(args):
    "Tables go to another size by bicubic interpolation, as official code does it."
    old, new = small(args), small(args, img_size=96, window_size=5)
    for model in (old, new): nn.init.normal_(model.head.weight)
    report = load_weights(new, to_layout(old, 'official'))
    tables = [n for n in old.state_dict() if n.endswith('table')]
    assert report.resized == [n for n in report.kept if n in tables] and set(report.resized) == set(tables)
    for n in tables:
        part, mine, theirs = new.get_submodule(n.rpartition('.')[0]), new.state_dict()[n], old.state_dict()[n]
        if isinstance(part, WindowTable):
            side, big = math.isqrt(len(theirs)), math.isqrt(len(mine))
            theirs, mine = (o.T.reshape(-1, s, s) for o, s in ((theirs, side), (mine, big)))
        assert_close(mine, nn.functional.interpolate(theirs[None], mine.shape[1:], mode='bicubic', align_corners=False)[0])
    others = [n for n in old.state_dict() if n not in tables]
    assert all(torch.equal(old.state_dict()[n], new.state_dict()[n]) for n in others)
    with pytest.raises(WeightsError): load_weights(small(args, num_heads=(2, 2, 3, 6), num_groups=(1, 1, 3, 6)), to_layout(old, 'official'))

def test_layer_scale():
    parts = type('Scaled', (PlusPlus,), dict(scale=functools.partial(BranchScale, init=.1)))
    model = small(PP, parts=parts)
    names = to_layout(model, 'official')
    assert {'stages.0.layer_scales.0.weight', 'stages.3.layer_scales.3.weight'} <= names.keys()
    assert (model.stages[0][1].scale2.weight == .1).all()

# ---- as others use it

@BOTH
def test_as_a_model_of_images(args):
    torch.manual_seed(0)
    model, x = dat(**args | dict(num_classes=0, in_chans=1)), torch.randn(2, 1, 70, 64)
    assert model(x).shape == (2, 48) and model.num_features == 48
    assert dat(**args | dict(num_classes=0, in_chans=1, global_pool=''))(x).shape == (2, 48, 3, 2)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and {n for n in model.no_weight_decay()} == {n for n, _ in model.named_parameters() if n.endswith('table')}
    maps = check_backbone(FeatureMaps(model, (1, 3)), x)
    assert maps.channels == [16, 48] and maps.strides == [8, 32]
    parts = depth_splitter(model)
    assert sum(len(o) for o in parts) == len(list(model.parameters()))

def test_by_name():
    assert set(COUNTS) <= set(list_models())
    model = create_model('dat', num_classes=7, dims=(8, 16, 16, 32), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), num_groups=(1, 1, 1, 2), strides=(1, 1, 1, 1), parts='FirstRelease')
    assert isinstance(model, DAT) and model(torch.zeros(1, 3, 40, 40)).shape == (1, 7)
    with torch.device('meta'): assert count(create_model('dat_base_384')) == COUNTS['dat_base_384'][0]
    with pytest.raises(ArgumentError, match='LeapLabTHU'): create_model('dat_tiny', pretrained=True)

REFUSED = dict(num_heads=(1, 2, 3), num_groups=(1, 1, 2, 6), depths=(2, 2), kernel_sizes=(3, 3, 3, 3), window_size=(3, 3), drop_path_rate=1., dims=(8, 16))
@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    with pytest.raises(ArgumentError): dat(**PP | {name: REFUSED[name]})
