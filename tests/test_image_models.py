"""Models of images, whatever their family: what timm's and fastai's users expect of them. A family joins by a line in `FAMILIES`."""
import json, os, pickle, subprocess, sys

import pytest, torch
from torch import nn
from torch.testing import assert_close

from deformlit.backbones import *
from deformlit.checkpoints import WeightsError, from_config, layouts, load_pretrained, load_weights, save_weights, to_layout
from deformlit.core import ArgumentError
from deformlit.detr import *
from deformlit.deformable_detr import *
from deformlit.dab_detr import *
from notebooks import root

# a family and arguments that make a small model of it, four stages
FAMILIES = dict(dilateformer=dict(dims=(12, 24, 48, 96), depths=(1, 1, 2, 1), num_heads=(3, 3, 6, 6)),
                dat=dict(dims=(12, 24, 48, 96), depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4), num_groups=(1, 1, 2, 2), img_size=64))
TWO_STAGES = dict(dilateformer=dict(dims=(12, 24), depths=(1, 1), num_heads=(3, 3), dilated=(True, False)))      # where four would take long (DAT is compiled in tests of its own)
NAMED = dict(dilateformer='dilateformer_tiny', dat='dat_tiny')

def small(family, seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_model(family, **FAMILIES[family] | dict(num_classes=5, img_size=64) | kwargs)

each = pytest.mark.parametrize('family', FAMILIES)
def photos(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
def params(model): return sum(p.numel() for p in model.parameters())

# ---- the functions that timm's models have

@each
@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_other_channels(family, channels):
    "Weights for colour images serve images with any number of channels, as timm has it."
    timm = pytest.importorskip('timm')
    colour = small(family).eval()
    m = small(family, seed=1, in_chans=channels, pretrained=colour.state_dict()).eval()
    first = f"{m.default_cfg['first_conv']}.weight"
    assert m.report.resized == [first] and not m.report.new
    assert_close(m.state_dict()[first], timm.models.adapt_input_conv(channels, colour.state_dict()[first]))
    if channels in (1, 6):
        x = photos(2, 1, 64, 64)
        assert_close(m(x.expand(-1, channels, -1, -1)), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    again = small(family, seed=2, in_chans=channels, pretrained=m.state_dict())
    assert not again.report.resized and again.state_dict()[first].equal(m.state_dict()[first])
    bad = {**colour.state_dict(), first: colour.state_dict()[first][..., 1:]}
    with pytest.raises(WeightsError, match=first.replace('.', r'\.')): small(family, in_chans=channels, pretrained=bad)

@each
def test_shapes_and_features(family):
    m, x = small(family).eval(), photos(2, 3, 64, 96)
    with torch.no_grad():
        last, logits = m.forward_features(x), m(x)
        assert logits.shape == (2, 5) and last.shape == (2, 96, 2, 3)
        assert_close(m.forward_head(last), logits)
        assert_close(m.forward_head(last, pre_logits=True), last.mean((2, 3)))
        assert_close(m.get_classifier()(m.forward_head(last, pre_logits=True)), logits)
    assert m.num_features == m.head_hidden_size == 96 and m.num_classes == 5

@each
def test_intermediates(family):
    m, x = small(family).eval(), photos(1, 3, 64, 96)
    with torch.no_grad():
        last, maps = m.forward_intermediates(x)
        assert [tuple(o.shape[1:]) for o in maps] == [(12, 16, 24), (24, 8, 12), (48, 4, 6), (96, 2, 3)]
        assert_close(last, m.forward_features(x)); assert_close(m.norm(maps[-1]), last)
        for indices, take in ((2, [2, 3]), ([0, 2], [0, 2]), ((-1,), [3]), ([-4, 1], [0, 1])):
            for early in (False, True):
                final, found = m.forward_intermediates(x, indices, stop_early=early)
                assert len(found) == len(take) and all(a.equal(maps[i]) for a, i in zip(found, take))
                assert_close(final, last if not early or 3 in take else maps[max(take)])
                assert all(a.equal(b) for a, b in zip(found, m.forward_intermediates(x, indices, stop_early=early, intermediates_only=True)))
        assert_close(m.forward_intermediates(x, 1, norm=True, intermediates_only=True)[0], last)
    for bad in (0, 5, [4], [-5], [1, 1]):
        with pytest.raises(ArgumentError, match='`indices`'): m.forward_intermediates(x, bad)
    with pytest.raises(ArgumentError, match='NCHW'): m.forward_intermediates(x, output_fmt='NHWC')

@each
def test_feature_info(family):
    m = small(family)
    assert m.feature_info.channels() == [12, 24, 48, 96] and m.feature_info.reduction() == [4, 8, 16, 32]
    assert m.feature_info[1] == dict(num_chs=24, reduction=8, module='stages.1') and m.feature_info.channels([0, 2]) == [12, 48]
    assert m.feature_info.get_dicts(['num_chs'])[0] == dict(num_chs=12) and m.feature_info.reduction(3) == 32
    modules = dict(m.named_modules())
    seen = {}
    for i, name in enumerate(m.feature_info.module_name()): modules[name].register_forward_hook(lambda _, x, y, i=i: seen.update({i: y}))
    _, maps = m.eval().forward_intermediates(photos(1, 3, 64, 64))
    assert all(seen[i].equal(o) for i, o in enumerate(maps))        # the module that is named gives the map

@each
def test_reset_classifier(family):
    m, x = small(family).eval(), photos(1, 3, 64, 64)
    m.reset_classifier(7)
    assert m(x).shape == (1, 7) and m.num_classes == 7
    m.reset_classifier(0)
    assert m(x).shape == (1, 96) and isinstance(m.get_classifier(), nn.Identity)
    m.reset_classifier(0, '')
    assert m(x).shape == (1, 96, 2, 2)
    for bad in (dict(num_classes=3, global_pool=''), dict(num_classes=3, global_pool='max')):
        with pytest.raises(ArgumentError, match='`global_pool`'): m.reset_classifier(**bad)
    m.double().reset_classifier(3, 'avg')
    assert m(x.double()).dtype == torch.float64

@each
def test_default_cfg(family):
    m = small(family, img_size=(64, 96), in_chans=1)
    cfg = m.default_cfg
    assert cfg is m.pretrained_cfg and cfg['input_size'] == (1, 64, 96) and cfg['pool_size'] == (2, 3) and cfg['num_classes'] == 5 and cfg['url'] == ''
    assert len(cfg['mean']) == len(cfg['std']) == 3 and {'interpolation', 'crop_pct'} <= cfg.keys()
    parts = dict(m.named_modules())
    assert isinstance(parts[cfg['first_conv']], nn.Conv2d) and parts[cfg['first_conv']].in_channels == 1 and parts[cfg['classifier']] is m.head

@each
def test_checkpointed_gradients(family):
    x, grads = photos(2, 3, 64, 64), []
    for enable in (False, True):
        m = small(family, drop_path_rate=0.).double()
        m.set_grad_checkpointing(enable)
        x_ = x.double().requires_grad_()
        m(x_).square().sum().backward()
        grads.append([x_.grad, *(p.grad for p in m.parameters())])
    assert_close(*grads)
    m = small(family, drop_path_rate=.5)
    grads = []
    for enable in (False, True):                # the same branches are dropped the second time
        m.set_grad_checkpointing(enable); torch.manual_seed(3)
        grads.append(torch.autograd.grad(m(x).square().sum(), list(m.parameters()), allow_unused=True))
    assert_close(*grads, rtol=1e-4, atol=1e-5)

@each
def test_no_weight_decay(family):
    m = small(family)
    names = m.no_weight_decay()
    assert names == {n for n, _ in m.named_parameters() if n.endswith('.table')}

@each
def test_rates_by_depth(family):
    m = small(family)
    groups = depth_splitter(m)
    assert len(groups) == 6 and [id(p) for g in groups for p in g].sort() == [id(p) for p in m.parameters()].sort() and all(groups)
    assert {id(p) for p in groups[0]} == {id(p) for p in m.stem.parameters()} and {id(p) for p in groups[-1]} == {id(p) for p in m.head.parameters()}
    assert sum(len(g) for g in groups) == len({id(p) for g in groups for p in g}) == len(list(m.parameters()))
    body = small(family, num_classes=0)
    wrapped = nn.Sequential(nn.Sequential(body), nn.Linear(96, 3))
    assert [len(g) for g in depth_splitter(wrapped)][:-1] == [len(g) for g in groups][:-1] and len(depth_splitter(wrapped)[-1]) == 2
    with pytest.raises(ArgumentError, match='stages'): depth_splitter(nn.Linear(2, 2))

@each
def test_groups_of_timm(family):
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay
    m = small(family)
    for coarse in (False, True):
        groups = group_parameters(m, m.group_matcher(coarse), reverse=True)
        depth = {n: groups[n] for n, _ in m.named_parameters()}
        order = [depth[next(n for n in depth if n.startswith(o))] for o in ('stem', 'stages.0', 'downs.0', 'stages.1', 'stages.2', 'downs.2', 'stages.3', 'norm')]
        assert order == sorted(order) and order[0] == 0 and order[1] > 0 and depth['head.weight'] >= order[-1]
    assert sum(len(g['params']) for g in param_groups_layer_decay(m, no_weight_decay_list=m.no_weight_decay())) == len(list(m.parameters()))

# ---- any image

@each
@pytest.mark.parametrize('size', [(1, 1), (1, 40), (33, 7), (64, 64), (101, 75)])
def test_any_size(family, size):
    m = small(family).eval()
    x = photos(2, 3, *size)
    before = x.clone()
    last, maps = m.forward_intermediates(x)
    for o, s in zip(maps, m.strides): assert o.shape[2:] == (-(-size[0] // s), -(-size[1] // s)) and o.isfinite().all()
    assert m(x).isfinite().all() and x.equal(before)
    m(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

@each
def test_each_image_for_itself(family):
    m = small(family).eval()
    x = photos(3, 3, 40, 56)
    with torch.no_grad(): assert_close(torch.cat([m(o[None]) for o in x]), m(x), rtol=1e-4, atol=1e-5)

@each
def test_trains_in_float32(family):
    m, x = small(family), photos(8, 3, 32, 32)
    y, opt, losses = torch.arange(8) % 5, torch.optim.AdamW(m.parameters(), 2e-3), []
    for _ in range(12):
        loss = nn.functional.cross_entropy(m(x), y)
        opt.zero_grad(); loss.backward()
        assert all(p.grad is not None for p in m.parameters())
        opt.step(); losses.append(loss.item())
    assert losses[-1] < losses[0] * .8

@each
def test_half_precision(family):
    m, x = small(family).eval(), photos(2, 3, 64, 40)
    with torch.no_grad():
        want = m(x)
        with torch.autocast('cpu', torch.bfloat16): assert_close(m(x).float(), want, rtol=.1, atol=.05)
        out = m.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), want, rtol=.1, atol=.1)

@each
def test_channels_last(family):
    m, x = small(family).eval(), photos(2, 3, 64, 40)
    with torch.no_grad():
        want = m(x)
        assert_close(m.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)

@pytest.mark.slow
@pytest.mark.parametrize('family', TWO_STAGES)
def test_one_graph_for_all_sizes(family):
    m = small(family, **TWO_STAGES[family]).eval()
    torch._dynamo.reset()
    graphs = []
    def count(graph, inputs): graphs.append(graph); return graph
    f = torch.compile(m, fullgraph=True, dynamic=True, backend=count)
    for size in ((32, 32), (48, 20), (17, 35)):
        x = photos(2, 3, *size)
        with torch.no_grad(): assert_close(f(x), m(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2, f'{len(graphs)} graphs'
    torch._dynamo.reset()
    f = torch.compile(m, fullgraph=True, backend='aot_eager')
    x = photos(1, 3, 32, 40)
    grads = [torch.autograd.grad(o(x).square().sum(), list(m.parameters())) for o in (m, f)]
    assert_close(*grads, rtol=1e-3, atol=1e-5)

@each
def test_pickles(family):
    m, x = small(family).eval(), photos(1, 3, 32, 32)
    assert pickle.loads(pickle.dumps(m))(x).equal(m(x))

# ---- backbones

@each
def test_backbone(family):
    m, x = small(family).eval(), photos(1, 3, 101, 75)
    for indices, take in ((None, (0, 1, 2, 3)), (2, (2, 3)), ((1, 2), (1, 2)), ((-3, -1), (1, 3))):
        b = check_backbone(FeatureMaps(m, indices), x)
        assert b.out_indices == take and b.channels == [m.dims[i] for i in take] and b.strides == [m.strides[i] for i in take] and len(b.stages) == take[-1] + 1 == len(b.downs) + 1
        assert b.feature_info.channels() == b.channels and b.feature_info.module_name() == [f'stages.{i}' for i in take]
        for a, i in zip(b(x), take): assert a.equal(m.forward_intermediates(x)[1][i])
    for bad in (0, 5, (), (4,)):
        with pytest.raises(ArgumentError): FeatureMaps(m, bad)

@each
def test_backbone_takes_the_whole_models_weights(family):
    m, b = small(family).eval(), create_model(family, **FAMILIES[family], features_only=True, out_indices=(0, 1)).eval()
    state = m.state_dict()
    assert not any(b.load_state_dict(state)) and len(state) == len(m.state_dict())
    x = photos(1, 3, 64, 64)
    assert b(x)[1].equal(m.forward_intermediates(x)[1][1])
    outer = nn.ModuleDict(dict(backbone=b))
    outer.load_state_dict({f'backbone.{n}': o for n, o in state.items()})
    with pytest.raises(RuntimeError, match='stages.1'): b.load_state_dict({n: o for n, o in state.items() if not n.startswith('stages.1')})

DETECTORS = dict(detr=(detr, (3,)), deformable_detr=(deformable_detr, (1, 2, 3)), two_stage=(two_stage_detr, (1, 2, 3)), dab_detr=(dab_detr, (3,)), dab_deformable=(dab_deformable_detr, (1, 2, 3)), two_stage_dab=(two_stage_dab_deformable_detr, (1, 2, 3)))

@each
@pytest.mark.parametrize('name', DETECTORS)
def test_inside_every_detector(family, name):
    make, indices = DETECTORS[name]
    torch.manual_seed(0)
    backbone = create_backbone(family, **FAMILIES[family], out_indices=indices)
    model = make(4, backbone, dim=32, num_heads=4, num_queries=5, num_encoder_layers=1, num_decoder_layers=1, dim_ffn=16)
    p = model(photos(2, 3, 70, 52))
    assert p.boxes.shape[-2:] == (5, 4) and p.boxes.isfinite().all()
    (p.boxes.sum() + p.logits.sum()).backward()
    assert all(o.grad is not None for o in backbone.stem.parameters())

@each
def test_create_backbone(family):
    b = create_backbone(family, **FAMILIES[family], norm='frozen', freeze=('stem', 'stages.0')) if family == 'dilateformer' else create_backbone(family, **FAMILIES[family], freeze=('stem', 'stages.0'))
    assert b.strides == [8, 16, 32] and not any(p.requires_grad for p in b.stem.parameters()) and all(p.requires_grad for p in b.stages[1].parameters())
    assert not any(type(o) is nn.BatchNorm2d for o in b.modules()) if family == 'dilateformer' else True
    with torch.device('meta'): assert create_backbone(NAMED[family]).strides == [8, 16, 32]
    with pytest.raises(ArgumentError, match='out_indices|indices'): create_backbone(family, **FAMILIES[family], out_indices=(4,))

# ---- by name

def test_list_models():
    assert list_models() == [f'dat_{o}' for o in ('tiny', 'small', 'base', 'base_384')] + [f'dat_pp_{o}' for o in ('tiny', 'small', 'base', 'base_384')] + [f'dilateformer_{o}' for o in ('tiny', 'small', 'base')]
    assert list_models('dilate') == list_models('dilate*') == [f'dilateformer_{o}' for o in ('tiny', 'small', 'base')] and len(list_models('*_tiny')) == 3 and list_models('*_pp') == []

@each
def test_arguments(family):
    assert small(family, drop_path_rate=.4).stages[-1][-1].drop_path.drop == pytest.approx(.4)
    assert small(family, in_chans=1)(photos(2, 1, 32, 32)).shape == (2, 5)
    assert small(family, num_classes=0)(photos(2, 3, 32, 32)).shape == (2, 96)
    assert small(family, drop_rate=.5).head_drop.p == .5
    for bad, words in ((dict(name='dilateformer_huge'), '`name`'), (dict(name=family, no_such=1), '`no_such`: expected an argument of'), (dict(name=family, out_indices=(1,)), '`out_indices`'), (dict(name=family, vocab=['a']), '`vocab`'),
                       (dict(name=family, num_classes=-1), '`num_classes`'), (dict(name=family, features_only=True, out_indices=(9,)), 'indices`'), (dict(name=NAMED[family], pretrained=True), 'github.com'), (dict(name=5), '`name`')):
        with pytest.raises(ArgumentError, match=words): create_model(**FAMILIES[family] | bad)
    with pytest.raises(ArgumentError, match='shape'): small(family)(photos(1, 4, 32, 32))
    with pytest.raises(ArgumentError, match='shape'): small(family)(photos(3, 32, 32))

@each
def test_a_family_of_ones_own(family, monkeypatch):
    import types
    home = types.ModuleType('my_models')
    home.my_model = lambda num_classes=2, in_chans=3, img_size=8, width=4: HierarchicalModel(PatchConv(in_chans, width, 4), [nn.Sequential(nn.Identity())], [], nn.Identity(), (width,), (4,), num_classes, in_chans, img_size)
    monkeypatch.setitem(sys.modules, 'my.models', home)
    monkeypatch.setattr('deformlit.backbones.MODELS', dict(MODELS))
    register_model('my_model', 'my.models')
    assert create_model('my_model', num_classes=3, width=8)(photos(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(ArgumentError, match='`depth`'): create_model('my_model', depth=8)

# ---- weights

@each
def test_files_in_every_layout(family, tmp_path):
    m, x = small(family).eval(), photos(1, 3, 64, 64)
    assert set(layouts(m)) >= {'ours', 'official'}
    for layout in layouts(m):
        for suffix in ('safetensors', 'pth'):
            path = tmp_path/f'w.{suffix}'
            save_weights(m, path, layout)
            other = small(family, 1, pretrained=path).eval()
            assert other(x).equal(m(x)) and other.report.layout == layout and not other.report.wrong
    assert small(family, 1, pretrained=m.state_dict()).eval()(x).equal(m(x))

@each
def test_another_number_of_classes(family):
    m, x = small(family).eval(), photos(1, 3, 64, 64)
    weights = to_layout(m, 'official')
    seven = small(family, 1, num_classes=7, pretrained=weights).eval()
    assert seven(x).shape == (1, 7) and seven.forward_features(x).equal(m.forward_features(x)) and seven.report.new == ['head.weight', 'head.bias']
    none = small(family, 1, num_classes=0, pretrained=weights).eval()
    assert none(x).equal(m.forward_head(m.forward_features(x), pre_logits=True))
    maps = small(family, 1, pretrained=weights, features_only=True, out_indices=(0, 3)).eval()
    assert maps(x)[1].equal(m.forward_intermediates(x)[1][3])
    maps = create_backbone(family, **FAMILIES[family], pretrained=weights).eval()
    assert_close(maps(x)[-1], m.forward_intermediates(x)[1][3])
    with pytest.raises(WeightsError, match='new_classes=True'): load_weights(small(family, num_classes=7), weights)
    with pytest.raises(WeightsError, match='missing'): small(family, pretrained={n: o for n, o in weights.items() if 'stages.1' not in n})

@each
def test_folder(family, tmp_path):
    m, x = small(family, vocab=list('abcde'), drop_path_rate=.3).eval(), photos(1, 3, 64, 64)
    m.save_pretrained(tmp_path/'m')
    again = type(m).from_pretrained(tmp_path/'m')
    assert again(x).equal(m(x)) and again.config == m.config and again.config['vocab'] == list('abcde') and not again.training
    assert HierarchicalModel.from_pretrained(tmp_path/'m', num_classes=2)(x).shape == (1, 2)
    three, report = load_pretrained(tmp_path/'m', 3)
    assert 'vocab' not in three.config and report.new == ['head.weight', 'head.bias']
    with pytest.raises(ArgumentError, match='Detr|DETR|Detector'): Detector.from_pretrained(tmp_path/'m')
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    assert config['architecture'] == family and params(from_config(config)) == params(m)
    m.config = m.config | dict(num_classes=6, vocab=None)
    with pytest.raises(ArgumentError, match='`config`'): m.save_pretrained(tmp_path/'n')

# ---- timm and fastai, each in a process of its own

def fresh(code):
    r = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()

USE = '''
import torch
m = timm.create_model('dilateformer_tiny', num_classes=7, drop_path_rate=.2, features_only=False)
assert m.num_classes == 7 and type(m).__name__ == 'DilateFormer' and m.stages[-1][-1].drop_path.drop == .2
b = timm.create_model('dilateformer_tiny', features_only=True, out_indices=(0, 2), in_chans=1)
assert b.feature_info.channels() == [72, 288] and [tuple(o.shape) for o in b.eval()(torch.zeros(1, 1, 32, 64))] == [(1, 72, 8, 16), (1, 288, 2, 4)]
assert 'dilateformer_tiny' in timm.list_models('dilate*') and len(timm.list_models('dilate*')) == 3 and timm.is_model('dat_tiny')
assert timm.create_model('dilateformer_tiny', num_classes=0, global_pool='').eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 576, 1, 1)
assert timm.data.resolve_data_config(model=m)['input_size'] == (3, 224, 224)
again = timm.create_model('dilateformer_tiny', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(state_dict=m.state_dict()))
assert again.num_classes == 3 and again.norm.weight.equal(m.norm.weight) and again.stages[0][0].attn.qkv.weight.equal(m.stages[0][0].attn.qkv.weight)
try: timm.create_model('dilateformer_tiny', pretrained=True)
except ValueError as e: assert 'github.com' in str(e)
else: assert False
from deformlit import *
from deformlit.backbones import *
print('ok')
'''

@pytest.mark.parametrize('imports', ['import timm, deformlit', 'import deformlit, timm', 'from deformlit.backbones import *\nfrom timm.models import create_model\nimport timm'])
def test_timm_in_both_orders(imports):
    assert fresh(f'import warnings; warnings.simplefilter("error", UserWarning)\n{imports}\n{USE}') == 'ok'

def test_deformlit_does_not_import_timm():
    assert fresh('import sys, deformlit; print([o for o in sys.modules if o.split(".")[0] in ("timm", "torch")])') == '[]'
    assert fresh('import sys, deformlit; from deformlit import create_model, list_models; print([o for o in sys.modules if o.split(".")[0] == "timm"], len(list_models()))') == '[] 11'

def test_timm_that_changed_is_only_a_warning():
    code = 'import deformlit, deformlit.backbones as b, warnings\ndef no(): raise RuntimeError("changed")\nb.tell_timm = no\nwith warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter("always"); import timm\nprint(any("changed" in str(o.message) for o in w), timm.is_model("resnet18"))'
    assert fresh(code) == 'True True'

VISION = '''
from fastai.vision.all import *
import deformlit, torch
items = [(torch.rand(3, 32, 32), i % 2) for i in range(8)]
dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4)); dls.c = 2
learn = vision_learner(dls, 'dilateformer_tiny', pretrained=False, loss_func=nn.CrossEntropyLoss(), normalize=False, splitter=deformlit.depth_splitter)
learn.fit(1, slice(1e-5, 1e-3))
assert len(learn.opt.param_groups) == 6 and learn.recorder.values
try: vision_learner(dls, 'dilateformer_tiny', loss_func=nn.CrossEntropyLoss())
except ValueError as e: assert 'github.com' in str(e)
else: assert False
print('ok')
'''
@pytest.mark.slow
def test_fastai(): assert fresh(VISION).splitlines()[-1] == 'ok'

# ---- multiplications

@each
def test_macs_follow_the_size(family):
    m = small(family)
    a, b = count_macs(m, 64), count_macs(m, (64, 128))
    assert 1.9 < b / a < 2.6 and count_macs(small(family, in_chans=1), 64) < a
    by = macs_by_module(m, 64)
    assert sum(by.values()) == a and {n.split('.')[0] for n in by} >= {'stem', 'stages', 'downs', 'norm', 'head'}
    assert all(p.device.type == 'cpu' for p in m.parameters()) and m.training

# published by the papers' counter for an image of the model's size, in G
PUBLISHED = dict(dilateformer_tiny=(3.1772, 224), dilateformer_small=(4.6134, 224), dilateformer_base=(9.9618, 224))

@pytest.mark.parametrize('name', PUBLISHED)
def test_macs_as_published(name, parity):
    published, size = PUBLISHED[name]
    with torch.device('meta'): m = create_model(name)
    parity.record('DilateFormer', 'official statements', 'multiplications', abs(count_macs(m, size) / 1e9 - published) / published, .005)
