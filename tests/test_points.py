"Coordinates: random sizes, dtypes, and inside torch.compile."
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from deformlit.core import *
from deformlit.points import *

size = st.integers(2, 50)

@given(size, size, st.integers(0, 1000))
def test_round_trips(h, w, seed):
    p = torch.randn(2, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_close(from_pixels(to_pixels(p, h, w), h, w), p)
    assert_close(from_corners(to_corners(p, h, w), h, w), p)
    assert_close(from_signed(to_signed(p)), p)
    assert_close(swap_xy(swap_xy(p)), p)

@given(size, size)
def test_zero_offsets_return_the_image(h, w):
    x = torch.rand(1, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))
    p = pixel_centres(h, w, dtype=torch.float64)
    assert_close(F.grid_sample(x, to_signed(p)[None], align_corners=False), x)
    assert_close(F.grid_sample(x, to_corners(p, h, w)[None], align_corners=True), x)

@pytest.mark.parametrize('h,w', [(1, 1), (1, 5), (4, 6)])
def test_centres(h, w):
    p = pixel_centres(h, w, dtype=torch.float64)
    assert p.shape == (h, w, 2)
    assert_close(p, torch.tensor(pixel_centres_loop(h, w), dtype=torch.float64))
    assert pixel_centres(h, w).dtype == torch.float32
    assert_close(to_pixels(p, h, w)[..., 0], torch.arange(w).double().expand(h, w), atol=1e-12, rtol=0)

@pytest.mark.parametrize('h,w', [(1, 4), (4, 1), (1, 1)])
def test_one_pixel_has_no_corner_ruler(h, w):
    for f in (to_corners, from_corners):
        with pytest.raises(ArgumentError, match='`h, w`'): f(torch.zeros(3, 2), h, w)

@pytest.mark.parametrize('f', [lambda p: to_pixels(p, 2, 2), lambda p: from_pixels(p, 2, 2), lambda p: to_corners(p, 2, 2), lambda p: from_corners(p, 2, 2), swap_xy])
def test_last_dimension(f):
    with pytest.raises(ArgumentError, match='`points`'): f(torch.zeros(2, 4))

def test_valid_ratios():
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[0, :3, :4], mask[1] = False, False
    assert_close(valid_ratios(mask), torch.tensor([[4/6, 3/4], [1., 1]]))
    for bad in (mask.long(), mask[0]):
        with pytest.raises(ArgumentError, match='`mask`'): valid_ratios(bad)

@pytest.mark.parametrize('dynamic', [None, True])
def test_inside_compile(dynamic):
    def f(p, x):
        h, w = x.shape[-2:]
        return from_corners(to_corners(from_pixels(to_pixels(p, h, w), h, w), h, w), h, w) + swap_xy(from_signed(to_signed(p))) + pixel_centres(h, w).mean()
    torch._dynamo.reset()
    g = torch.compile(f, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for h, w in (3, 5), (4, 7), (6, 6):
        p, x = torch.rand(4, 2), torch.zeros(1, h, w)
        assert_close(g(p, x), f(p, x))
