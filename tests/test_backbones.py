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


class Lies(nn.Module):
    channels, strides = [8], [4]
    def forward(self, x): return [x]


@pytest.mark.parametrize('argument, call', [
    ('name', lambda: create_backbone('resnet51')),
    ('name', lambda: create_backbone(ConvNet(), norm='group')),
    ('backbone', lambda: create_backbone(nn.Conv2d(3, 8, 3))),
    ('backbone', lambda: check_backbone(Lies(), torch.randn(1, 3, 8, 8))),
    ('norm', lambda: create_backbone('resnet18', norm='layer')),
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
