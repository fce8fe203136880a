"""What does not belong on the page of `06 layers`: fuzzing, parity with peers, edges."""
import math, pytest, torch, torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from deformlit.core import ArgumentError
from deformlit.layers import *


@settings(max_examples=30, deadline=None)
@given(x=st.floats(-20, 20), half=st.integers(1, 8), temperature=st.sampled_from([20., 100., 10000.]))
def test_sine_encoding_is_the_loop(x, half, temperature):
    got = sine_encoding(torch.tensor(x, dtype=torch.float64), 2 * half, temperature)
    assert got.shape == (2 * half,)
    assert_close(got, torch.tensor(sine_encoding_loop(x, 2 * half, temperature), dtype=torch.float64))


def test_sine_encoding_keeps_shape_and_dtype():
    for dtype in (torch.float32, torch.float64):
        e = sine_encoding(torch.zeros(2, 3, 4, dtype=dtype), 6)
        assert e.shape == (2, 3, 4, 6) and e.dtype == dtype
        assert_close(e, torch.tensor([0., 1.] * 3, dtype=dtype).expand(2, 3, 4, 6))


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
       offset=st.sampled_from([0., -0.5]), temperature=st.sampled_from([20., 10000.]), eps=st.sampled_from([1e-6, 1e-3]))
def test_sine_position_is_the_loop(h, w, cut, offset, temperature, eps):
    mask = torch.zeros(2, h, w, dtype=torch.bool)
    mask[1, max(1, h - cut[0]):], mask[1, :, max(1, w - cut[1]):] = True, True
    got = SinePosition(12, temperature, offset, eps)(mask)
    assert got.shape == (2, 12, h, w) and got.dtype == torch.float32
    for m, g in zip(mask, got):
        truth = sine_position_loop(m, 12, temperature, offset, eps)
        assert_close(g[:, ~m], truth[:, ~m], atol=1e-5, rtol=1e-5)


def test_sine_position_ends():
    "Offset 0 ends at a full turn, -0.5 is symmetric about half a turn; y features come first."
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    edges, centres = SinePosition(8)(mask)[0], SinePosition(8, offset=-0.5)(mask)[0]
    assert_close(edges[0, :, 0], torch.tensor([math.sin(2 * math.pi * i / 4) for i in (1, 2, 3, 4)]), atol=1e-5, rtol=0)
    assert_close(centres[4, 0], torch.tensor([math.sin(2 * math.pi * (i + 0.5) / 6) for i in range(6)]), atol=1e-5, rtol=0)
    assert (edges[:4] == edges[:4, :, :1]).all() and (edges[4:] == edges[4:, :1]).all()


def test_sine_position_of_padding_is_finite():
    for offset in (0., -0.5): assert SinePosition(8, offset=offset)(torch.ones(1, 3, 3, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize('num_layers', [1, 2, 4])
def test_mlp_layers(num_layers):
    mlp = MLP(3, 5, 2, num_layers)
    linears = [m for m in mlp if isinstance(m, nn.Linear)]
    assert len(linears) == num_layers and isinstance(mlp[-1], nn.Linear)
    assert (linears[0].in_features, linears[-1].out_features) == (3, 2)
    assert list(mlp.state_dict()) == [f'{2 * i}.{n}' for i in range(num_layers) for n in ('weight', 'bias')]
    assert mlp(torch.randn(2, 7, 3)).shape == (2, 7, 2)


@pytest.mark.parametrize('act', [nn.ReLU, nn.GELU, nn.PReLU])
def test_feed_forward(act):
    torch.manual_seed(0)
    ffn, x = FeedForward(6, 10, act=act).double(), torch.randn(2, 4, 6, dtype=torch.float64)
    assert_close(ffn(x), nn.functional.layer_norm(x + ffn.linear2(ffn.act(ffn.linear1(x))), (6,), ffn.norm.weight, ffn.norm.bias))


def test_feed_forward_drops_only_in_training():
    ffn, x = FeedForward(6, 10, drop=0.5), torch.randn(2, 4, 6)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert_close(ffn(x), ffn(x))


@pytest.mark.parametrize('eps', [1e-5, 1e-3])
def test_frozen_batch_norm(eps):
    torch.manual_seed(0)
    live = nn.BatchNorm2d(5, eps=eps)
    for p in (live.weight, live.bias, live.running_mean): nn.init.normal_(p)
    nn.init.uniform_(live.running_var, 0.1, 4)
    ours, theirs, x = FrozenBatchNorm2d(5, eps), torchvision.ops.FrozenBatchNorm2d(5, eps), torch.randn(2, 5, 3, 4)
    ours.load_state_dict(live.state_dict()), theirs.load_state_dict(live.state_dict())
    assert_close(ours(x), live.eval()(x))
    assert_close(ours(x), theirs(x))
    assert_close(ours.train()(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict()) and not list(ours.parameters())


def test_frozen_batch_norm_still_wants_all_its_numbers():
    with pytest.raises(RuntimeError, match='running_var'): FrozenBatchNorm2d(2).load_state_dict({k: torch.ones(2) for k in ('weight', 'bias', 'running_mean')})
    state = nn.BatchNorm2d(2).state_dict()
    FrozenBatchNorm2d(2).load_state_dict(state)
    assert 'num_batches_tracked' in state   # the caller's dict is left alone


def test_layer_norm_2d():
    norm, x = LayerNorm2d(6, eps=1e-6), torch.randn(2, 6, 3, 5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    same = nn.LayerNorm(6, eps=1e-6)
    same.load_state_dict(norm.state_dict())
    assert norm(x).shape == x.shape
    assert_close(norm(x), same(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_drop_path():
    torch.manual_seed(0)
    x, drop = torch.randn(1000, 2, 3), DropPath(0.2)
    kept = drop(x).flatten(1).ne(0).all(1)
    assert_close(drop(torch.ones(1000, 1)).unique(), torch.tensor([0., 1.25]))
    assert 0.75 < kept.float().mean() < 0.85
    assert DropPath(0.).train()(x) is x and drop.eval()(x) is x


@pytest.mark.parametrize('argument, call', [
    ('dim', lambda: SinePosition(6)),
    ('dim', lambda: SinePosition(0)),
    ('dim', lambda: sine_encoding(torch.zeros(2), 3)),
    ('x', lambda: sine_encoding(torch.zeros(2, dtype=torch.long), 4)),
    ('mask', lambda: SinePosition(8)(torch.zeros(2, 3, dtype=torch.bool))),
    ('mask', lambda: SinePosition(8)(torch.zeros(1, 2, 3))),
    ('num_layers', lambda: MLP(3, 4, 5, 0)),
    ('drop', lambda: DropPath(-0.1)),
    ('drop', lambda: DropPath(1.)),
])
def test_errors_name_the_argument(argument, call):
    with pytest.raises(ArgumentError) as e: call()
    assert e.value.argument == argument
