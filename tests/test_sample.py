"""Sampling: more cases than fit on the page."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from deformlit.core import ArgumentError
from deformlit.sample import *

fast = sample_gather, sample
forms = sample_loop, *fast

def data(b=2, c=3, h=5, w=6, k=8, dtype=torch.float64, seed=0, spread=0.3):
    random = torch.Generator().manual_seed(seed)
    maps = torch.randn(b, c, h, w, dtype=torch.float64, generator=random)
    points = torch.rand(b, k, 2, dtype=torch.float64, generator=random) * (1 + 2*spread) - spread
    return maps.to(dtype), points.to(dtype)

def gradients(f, maps, points, grad):
    maps, points = maps.clone().requires_grad_(), points.clone().requires_grad_()
    return torch.autograd.grad(f(maps, points), (maps, points), grad)

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.lists(st.tuples(st.floats(-3, 4), st.floats(-3, 4)), min_size=1, max_size=6))
def test_values_agree(h, w, rows):
    maps, _ = data(1, 2, h, w)
    points = torch.tensor([rows], dtype=torch.float64)
    for f in fast: assert_close(f(maps, points), sample_loop(maps, points), atol=1e-12, rtol=1e-9)

@pytest.mark.parametrize('h, w', [(1, 1), (1, 6), (5, 1), (4, 4), (5, 6)])
@pytest.mark.parametrize('spread', [0, 0.3, 2])
def test_gradients_agree(h, w, spread):
    maps, points = data(2, 3, h, w, 12, spread=spread, seed=h*w)
    grad = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = sample_grad_loop(maps, points, grad)
    for f in fast: assert_close(gradients(f, maps, points, grad), truth)

@pytest.mark.parametrize('f', fast)
def test_gradcheck(f):
    maps, points = data(k=5)
    assert gradcheck(f, (maps.requires_grad_(), points.requires_grad_()))

def test_differentiable_twice():
    maps, points = data(1, 2, 3, 4, 4)
    assert gradgradcheck(sample_gather, (maps.requires_grad_(), points.requires_grad_()))

def test_value_is_the_sum_of_tents():
    "The formula over all pixels, not only the four around the point."
    maps, points = data()
    h, w = maps.shape[2:]
    def tents(p, n): return (1 - (p[..., None] * n - 0.5 - torch.arange(n)).abs()).clamp(min=0)
    assert_close(sample_loop(maps, points), torch.einsum('bchw,bkh,bkw->bck', maps, tents(points[..., 1], h), tents(points[..., 0], w)))

@pytest.mark.parametrize('n', [3, 5, 6, 7, 11, 13, 25])
def test_on_centres_the_slope_is_one_of_two(n):
    "Rounding may put a centre into the cell on its left or right; the value does not notice."
    maps = torch.randn(1, 1, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    points, grad = torch.stack([x, torch.full_like(x, 0.5)], -1)[None], torch.ones(1, 1, n, dtype=torch.float64)
    row = torch.nn.functional.pad(maps[0, 0, 0], (1, 1))
    left, right = (row[1:-1] - row[:-2]) * n, (row[2:] - row[1:-1]) * n
    slopes = [sample_grad_loop(maps, points, grad)[1], *(gradients(f, maps, points, grad)[1] for f in fast)]
    for f in forms: assert_close(f(maps, points)[0, 0], maps[0, 0, 0])
    for slope in slopes: assert torch.minimum((slope[0, :, 0] - left).abs(), (slope[0, :, 0] - right).abs()).max() < 1e-9

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype):
    maps, points = data(dtype=dtype)
    for f in forms:
        out = f(maps, points)
        assert out.shape == (2, 3, 8) and out.dtype == dtype
        assert f(maps, points[:, :0]).shape == (2, 3, 0)
    to_maps, to_points = sample_grad_loop(maps, points, torch.ones(2, 3, 8, dtype=dtype))
    assert to_maps.shape == maps.shape and to_points.shape == points.shape and to_maps.dtype == to_points.dtype == dtype

def test_corners():
    index, weights = corners(torch.rand(3, 2, 7, 2, generator=torch.Generator().manual_seed(0)), 4, 5)
    assert index.shape == weights.shape == (3, 2, 7, 4) and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() < 20 and (weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-6).all()
    index, _ = corners(torch.tensor([0.5, 0.5], dtype=torch.bfloat16), 64, 64)      # places do not pass through the points' dtype
    assert index.tolist() == [31*64 + 31, 31*64 + 32, 32*64 + 31, 32*64 + 32]

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_points_that_are_not_finite(value):
    maps, points = data(1, 2, 4, 4, 3)
    good = sample_loop(maps, points)
    points[0, 1, 0] = value
    for f in fast:
        out = f(maps, points)
        assert out[..., 1].isnan().all()
        assert_close(out[..., ::2], good[..., ::2])
    for f in (sample_loop, lambda m, p: sample_grad_loop(m, p, torch.ones(1, 2, 3, dtype=m.dtype))):
        with pytest.raises(ArgumentError, match=r'points\[0, 1, 0\]'): f(maps, points)
    assert check_finite(torch.rand(2, 3)) is None

def test_far_away_reads_zero():
    maps = torch.ones(1, 1, 4, 4)
    for x in (1e30, -1e30, 1e9, -7.): assert all(f(maps, torch.tensor([[[x, 0.5]]])).item() == 0 for f in forms)

@pytest.mark.parametrize('f', forms)
@pytest.mark.parametrize('maps, points, name', [
    (torch.rand(1, 2, 4), torch.rand(1, 3, 2), 'maps'), (torch.rand(1, 2, 4, 4), torch.rand(1, 3, 3), 'points'), (torch.rand(1, 2, 4, 4), torch.rand(3, 2), 'points'),
    (torch.rand(1, 2, 4, 4), torch.rand(2, 3, 2), 'points'), (torch.ones(1, 2, 4, 4).long(), torch.rand(1, 3, 2), 'maps'), (torch.rand(1, 2, 4, 4), torch.ones(1, 3, 2).long(), 'points'),
    (torch.rand(1, 2, 4, 4), torch.rand(1, 3, 2).double(), 'points'), (torch.rand(1, 2, 0, 4), torch.rand(1, 3, 2), 'maps'), (torch.rand(1, 2, 4, 4), torch.rand(1, 3, 2, device='meta'), 'points'),
    ([[1.]], torch.rand(1, 3, 2), 'maps'), (torch.rand(1, 2, 4, 4), [[[0.5, 0.5]]], 'points')])
def test_bad_input(f, maps, points, name):
    with pytest.raises(ArgumentError, match=f'^`{name}`'): f(maps, points)

def test_bad_gradient():
    maps, points = data()
    with pytest.raises(ArgumentError, match='^`grad`'): sample_grad_loop(maps, points, torch.ones(2, 3, 7, dtype=torch.float64))

def test_autocast_finds_a_common_dtype():
    maps, points = data(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        for f in fast: assert_close(f(maps.bfloat16(), points).float(), f(maps, points).float(), rtol=0.02, atol=0.02)

@pytest.mark.parametrize('f', fast)
def test_compiles_to_one_graph(f):
    maps, points = data(dtype=torch.float32)
    assert_close(torch.compile(f, backend='eager', fullgraph=True)(maps, points), f(maps, points))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda():
    maps, points = data()
    grad = torch.ones(2, 3, 8, dtype=torch.float64)
    truth = sample_loop(maps, points), *sample_grad_loop(maps, points, grad)
    for f in fast:
        got = f(maps.cuda(), points.cuda()), *gradients(f, maps.cuda(), points.cuda(), grad.cuda())
        assert_close([o.cpu() for o in got], list(truth))
