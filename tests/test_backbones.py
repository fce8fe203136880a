"""What does not belong on the page of `20 backbones`: parity with torchvision for every name, loading, other libraries."""
import pytest, torch, torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor
from deformlit.backbones import *
from deformlit.core import ArgumentError
from deformlit.layers import FrozenBatchNorm2d, LayerNorm2d

LAYERS = ['layer1', 'layer2', 'layer3', 'layer4']


def torchvision_model(name, **kwargs):
    "A torchvision model with random weights, and statistics that are not those of a fresh norm."
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(**kwargs).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2); nn.init.normal_(m.running_mean, std=0.2); nn.init.normal_(m.bias, std=0.2); nn.init.uniform_(m.weight, 0.2, 0.6)
    return model


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
@pytest.mark.parametrize('norm', ['frozen', 'batch'])
def test_maps_equal_torchvisions(name, norm):
    theirs = torchvision_model(name)
    ours = create_backbone(name, norm=norm, out_indices=(0, 1, 2, 3), pretrained=theirs.state_dict()).eval()
    x = torch.randn(2, 3, 75, 96)
    with torch.no_grad(): got, expected = ours(x), create_feature_extractor(theirs, LAYERS)(x)
    assert [m.shape[1] for m in got] == ours.channels and ours.strides == [4, 8, 16, 32]
    for m, layer in zip(got, LAYERS): assert_close(m, expected[layer], atol=1e-5, rtol=1e-5)


def test_dilated_equals_torchvisions():
    theirs = torchvision_model('resnet50', replace_stride_with_dilation=[False, False, True])
    ours = create_backbone('resnet50', dilated=True, out_indices=(2, 3), pretrained=theirs.state_dict())
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad(): got, expected = ours(x), create_feature_extractor(theirs, ['layer3', 'layer4'])(x)
    for m, e in zip(got, expected.values()): assert_close(m, e, atol=1e-5, rtol=1e-5)
    assert ours.strides == [16, 16] and got[0].shape[2:] == got[1].shape[2:]


@pytest.mark.parametrize('name', list(RESNETS))
def test_keys_shapes_and_counts_equal_torchvisions(name):
    with torch.device('meta'): ours, theirs = create_backbone(name), getattr(torchvision.models, name)()
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(ours) == count(theirs) - count(theirs.fc)


def test_stages_after_the_last_are_not_built_and_still_load():
    theirs = torchvision_model('resnet18')
    ours = create_backbone('resnet18', out_indices=(1,), pretrained=theirs.state_dict())
    assert not hasattr(ours, 'layer3') and ours.channels == [128] and ours.strides == [8]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert_close(ours(x)[0], create_feature_extractor(theirs, ['layer2'])(x)['layer2'], atol=1e-5, rtol=1e-5)


def test_loads_as_a_part_of_a_model():
    theirs = torchvision_model('resnet18')
    model = nn.ModuleDict(dict(body=create_backbone('resnet18', norm='frozen')))
    state = {f'body.{k}': v for k, v in theirs.state_dict().items()}
    model.load_state_dict(state)
    assert_close(model['body'].layer4[1].bn2.running_var, theirs.layer4[1].bn2.running_var)
    assert 'body.fc.weight' in state   # the caller's dict is left alone


def test_pretrained_true_asks_torchvision(monkeypatch):
    theirs, asked = torchvision_model('resnet18'), []
    monkeypatch.setattr(torchvision.models, 'get_model', lambda name, weights: asked.append((name, weights)) or theirs)
    ours = create_backbone('resnet18', pretrained=True)
    assert asked == [('resnet18', 'DEFAULT')] and isinstance(ours.bn1, FrozenBatchNorm2d)
    assert_close(ours.conv1.weight, theirs.conv1.weight)


@pytest.mark.parametrize('norm, kind', [(None, nn.BatchNorm2d), ('batch', nn.BatchNorm2d), ('frozen', FrozenBatchNorm2d), ('group', nn.GroupNorm), (LayerNorm2d, LayerNorm2d)])
def test_norms(norm, kind):
    for name in ('resnet18', 'convnet'):
        model = create_backbone(name, norm=norm)
        norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm))]
        assert norms and all(isinstance(m, kind) for m in norms)
        check_backbone(model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize('dim, groups', [(64, 32), (48, 16), (24, 8), (7, 1)])
def test_group_norm_divides(dim, groups): assert group_norm(dim).num_groups == groups


@pytest.mark.parametrize('widths, depth, num_maps', [((8,), 1, 1), ((8, 16), 2, 1), ((8, 12, 16, 20), 1, 4)])
def test_convnet(widths, depth, num_maps):
    model = ConvNet(widths, depth, in_chans=1, num_maps=num_maps)
    assert model.channels == list(widths[-num_maps:]) and model.strides[-1] == 2 ** (len(widths) + 1)
    check_backbone(model, torch.randn(2, 1, 52, 36))
    maps = model(torch.randn(2, 1, 52, 36))
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_gets_a_gradient():
    model = create_backbone('resnet18', out_indices=(0, 2))
    sum(m.mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_feature_extractor_of_timm_and_plain_modules():
    timm = pytest.importorskip('timm')
    body = timm.create_model('resnet18', features_only=True, out_indices=(2, 3, 4))
    model = create_backbone(FeatureExtractor(body))
    assert model.channels == body.feature_info.channels() and model.strides == body.feature_info.reduction()
    one = FeatureExtractor(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)), size=32)
    assert one.channels == [8] and one.strides == [2] and one.body.training
    assert (one.body[1].num_batches_tracked == 0) and len(one(torch.randn(1, 3, 8, 8))) == 1


# --- timm

TINY = ['test_resnet', 'test_convnext', 'test_efficientnet', 'test_mambaout', 'test_vit', 'test_nfnet']

@pytest.mark.parametrize('name', TINY)
def test_timm_keeps_the_contract_at_any_size(name):
    pytest.importorskip('timm')
    torch.manual_seed(0)
    model = create_backbone(name)
    assert len(model.channels) == 3 and model.training
    for size in ((64, 64), (101, 75), (33, 97)): check_backbone(model.eval(), torch.randn(2, 3, *size))


@pytest.mark.parametrize('name', TINY)
def test_timm_maps_are_timms(name):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model, x = create_backbone(name).eval(), torch.randn(1, 3, 64, 96)
    theirs = timm.create_model(name, features_only=True, out_indices=3).eval()
    theirs.load_state_dict(model.body.state_dict())
    with torch.no_grad(): got, expected = model(x), theirs(x)
    for a, e, c in zip(got, expected, model.channels):
        assert_close(a, e if e.shape[1] == c else e.movedim(-1, 1))
    assert model.channels == theirs.feature_info.channels() and model.strides == theirs.feature_info.reduction()


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256', 'vit_tiny_patch16_224', 'hrnet_w18_small'])
def test_timm_models_of_fixed_size_read_any(name):
    pytest.importorskip('timm')
    kwargs = dict(depths=(1, 1, 1, 1)) if 'swin' in name else dict(depth=3) if 'vit' in name else {}
    model = create_backbone(name, **kwargs).eval()
    maps = check_backbone(model, torch.randn(1, 3, 90, 61))(torch.randn(1, 3, 90, 61))
    assert [m.shape[1] for m in maps] == model.channels and model.multiple == max(model.strides)


@pytest.mark.parametrize('name', TINY)
def test_timm_in_a_detector(name):
    pytest.importorskip('timm')
    from deformlit.deformable_detr import deformable_detr
    torch.manual_seed(0)
    backbone = create_backbone(name, freeze=('stem_conv1', 'stem_conv2') if name == 'test_nfnet' else ())
    model = deformable_detr(3, backbone, dim=32, num_heads=2, num_levels=4, num_points=2, num_queries=5, num_encoder_layers=1, num_decoder_layers=1, dim_ffn=32, groups=8)
    images, mask = torch.randn(2, 3, 75, 101), torch.zeros(2, 75, 101, dtype=torch.bool)
    mask[1, 50:], mask[1, :, 64:] = True, True
    before = images.clone()
    logits, boxes = model(images, mask)
    (logits.sum() + boxes.sum()).backward()
    assert logits.shape == (2, 1, 5, 3) and boxes.isfinite().all() and torch.equal(images, before)
    for n, p in backbone.named_parameters():
        if p.requires_grad: assert p.grad is not None and p.grad.isfinite().all(), n
        else: assert p.grad is None and n.startswith(('body.stem_conv1', 'body.stem_conv2')), n


def test_timm_takes_further_arguments():
    pytest.importorskip('timm')
    model = create_backbone('test_resnet', out_indices=(1, 4), in_chans=1)
    assert model.strides == [4, 32] and check_backbone(model, torch.randn(2, 1, 40, 40))
    assert create_backbone('test_resnet', out_indices=(-1,)).strides == [32]
    assert create_backbone('test_resnet.r160_in1k').channels == create_backbone('test_resnet').channels


def test_prefix_asks_timm_for_a_name_of_ours():
    pytest.importorskip('timm')
    assert isinstance(create_backbone('timm/resnet18'), TimmFeatures) and isinstance(create_backbone('resnet18'), ResNet)


def test_timm_and_torchvision_resnets_are_one():
    pytest.importorskip('timm')
    theirs = torchvision_model('resnet18')
    timms = create_backbone('timm/resnet18', pretrained=theirs.state_dict()).eval()
    ours, x = create_backbone('resnet18', pretrained=theirs.state_dict()).eval(), torch.randn(1, 3, 75, 96)
    with torch.no_grad():
        for a, b in zip(timms(x), ours(x)): assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in timms.modules())      # frozen, since pretrained


def test_timm_norms():
    pytest.importorskip('timm')
    live = lambda m: sum(isinstance(o, nn.BatchNorm2d) for o in m.modules())
    torch.manual_seed(0)
    x, free = torch.randn(2, 3, 64, 64), create_backbone('test_resnet')
    assert live(free) == live(create_backbone('test_resnet', norm='batch')) > 0
    free(x)                                                                   # in training: the statistics move
    with torch.no_grad(): expected = free.eval()(x)
    frozen = freeze_norms(free).train()
    assert live(frozen) == 0
    with torch.no_grad():
        for a, e in zip(frozen(x), expected): assert_close(a, e, atol=1e-5, rtol=1e-5)
    assert live(create_backbone('test_resnet', norm='frozen')) == 0


def test_no_timm_is_said(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ArgumentError, match='pip install timm'): create_backbone('convnext_atto')
    assert create_backbone('resnet18').channels == [128, 256, 512]


def test_timm_is_imported_only_when_asked():
    import subprocess, sys
    says = "import sys; from deformlit.backbones import *; create_backbone('resnet18', freeze=('layer1',)); print('timm' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', says], capture_output=True, text=True, check=True).stdout.strip() == 'False'


@pytest.mark.parametrize('name, near', [('resnet51', 'resnet50'), ('convnext_ato', 'convnext_atto'), ('swin_tiny', 'swin')])
def test_unknown_names_suggest_near_ones(name, near):
    pytest.importorskip('timm')
    with pytest.raises(ArgumentError, match=near): create_backbone(name)


@pytest.mark.parametrize('argument, call', [
    ('name', lambda: create_backbone('hiera_tiny_224')),           # one size only
    ('name', lambda: create_backbone('inception_v3')),             # convolutions without padding: maps off their grid
    ('foo', lambda: create_backbone('test_resnet', foo=1)),
    ('name', lambda: create_backbone('test_resnet', out_indices=(9,))),
    ('norm', lambda: create_backbone('test_resnet', norm='group')),
    ('norm', lambda: create_backbone('test_resnet', norm=nn.BatchNorm2d)),
    ('norm', lambda: create_backbone('test_vit', norm='frozen')),
])
def test_timm_errors_name_the_argument(argument, call):
    pytest.importorskip('timm')
    with pytest.raises(ArgumentError) as e: call()
    assert e.value.argument == argument


# --- freezing

OFFICIAL = ('conv1', 'bn1', 'layer1')

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'timm/resnet18'])
@pytest.mark.parametrize('norm', ['frozen', 'batch'])
def test_official_freezing(name, norm):
    if 'timm' in name: pytest.importorskip('timm')
    model = create_backbone(name, norm=norm, freeze=OFFICIAL)
    for n, p in model.named_parameters():
        assert p.requires_grad == any(stage in n for stage in ('layer2', 'layer3', 'layer4')), n
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sum(m.mean() for m in model.train()(torch.randn(2, 3, 64, 64))).backward()
    for k, v in model.state_dict().items():                                   # statistics in the frozen parts stay too
        if k.removeprefix('body.').startswith(OFFICIAL): assert_close(v, before[k])
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_freezing_loads_and_keeps_the_weights():
    theirs = torchvision_model('resnet18')
    model = create_backbone('resnet18', norm='batch', pretrained=theirs.state_dict(), freeze=OFFICIAL).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert_close(model(x)[0], create_feature_extractor(theirs, ['layer2'])(x)['layer2'], atol=1e-5, rtol=1e-5)
    model.load_state_dict(theirs.state_dict())                                # `num_batches_tracked` of a frozen norm does not disturb


def test_freezing_within_parts_and_finished_modules():
    model = create_backbone(ConvNet((8, 8), num_maps=1), freeze=('stem', 'stages.0'))
    assert {n.split('.')[1] for n, p in model.named_parameters() if p.requires_grad} == {'1'}
    assert all(p.requires_grad for p in create_backbone('convnet').parameters())


class Lies(nn.Module):
    channels, strides = [8], [4]
    def forward(self, x): return [x]


@pytest.mark.parametrize('argument, call', [
    ('name', lambda: create_backbone('resnet51')),
    ('name', lambda: create_backbone(ConvNet(), norm='group')),
    ('backbone', lambda: create_backbone(nn.Conv2d(3, 8, 3))),
    ('backbone', lambda: check_backbone(Lies(), torch.randn(1, 3, 8, 8))),
    ('norm', lambda: create_backbone('resnet18', norm='layer')),
    ('freeze', lambda: create_backbone('resnet18', freeze='layer1')),
    ('freeze', lambda: create_backbone('resnet18', freeze=('layer7',))),
    ('freeze', lambda: create_backbone('resnet18', freeze=('',))),
    ('name', lambda: create_backbone(18)),
    ('out_indices', lambda: create_backbone('resnet18', out_indices=())),
    ('out_indices', lambda: create_backbone('resnet18', out_indices=(2, 1))),
    ('out_indices', lambda: create_backbone('resnet18', out_indices=(4,))),
    ('width', lambda: create_backbone('convnet', width=3)),
    ('num_maps', lambda: ConvNet(num_maps=0)),
    ('depth', lambda: ConvNet(depth=0)),
    ('widths', lambda: ResNet(widths=(8, 8))),
    ('pretrained', lambda: create_backbone('convnet', pretrained=True)),
    ('pretrained', lambda: create_backbone('resnet18', pretrained='weights.pth')),
    ('pretrained', lambda: create_backbone('resnet18', pretrained=ResNet(BasicBlock, (2, 2, 2, 2), widths=(8, 8, 8, 8)).state_dict())),
    ('body', lambda: FeatureExtractor(nn.Flatten())),
])
def test_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError) as e: call()
    assert e.value.argument == argument
