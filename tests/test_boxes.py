"""Boxes: what is too long or too dull for the page."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from deformlit.core import ArgumentError
from deformlit.boxes import *

unit = st.floats(0, 1)
side = st.sampled_from([0., 1e-30, 1e-12, 1e-4]) | unit
coarse = st.integers(0, 10**6).map(lambda o: o / 10**6)
def lists(place, side): return st.lists(st.tuples(place, place, side, side), min_size=1, max_size=5)
def tensor(rows, dtype=torch.float64): return xywh_to_xyxy(torch.tensor(rows, dtype=dtype))

@settings(max_examples=60, deadline=None)
@given(lists(coarse, coarse), lists(coarse, coarse))
def test_scores_match_the_loops(first, second):
    a, b = tensor(first), tensor(second)
    for fast, loop in ((box_iou, iou_loop), (generalized_box_iou, giou_loop)):
        assert_close(fast(a, b), loop(a, b))
        assert_close(fast(a, b), fast(b, a).T)

@settings(max_examples=60, deadline=None)
@given(lists(unit, side), st.sampled_from([torch.float32, torch.float64]))
def test_scores_and_gradients_are_finite(rows, dtype):
    a = tensor(rows, dtype).requires_grad_()
    b = tensor(rows[::-1], dtype)
    iou, giou = box_iou(a, b), generalized_box_iou(a, b)
    (iou + giou).sum().backward()
    assert iou.isfinite().all() and giou.isfinite().all() and a.grad.isfinite().all()
    assert (iou >= 0).all() and (iou <= 1 + 1e-6).all() and (giou >= -1 - 1e-6).all() and (giou <= iou + 1e-6).all()

def random_boxes(*shape, seed=0):
    return xywh_to_xyxy(torch.rand(*shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.01)

def test_torchvision():
    tv = pytest.importorskip('torchvision.ops')
    a, b = random_boxes(30, seed=1), random_boxes(20, seed=2)
    assert_close(box_iou(a, b), tv.box_iou(a, b))
    assert_close(generalized_box_iou(a, b), tv.generalized_box_iou(a, b))
    assert_close(box_area(a), tv.box_area(a))
    assert_close(1 - paired_giou(a[:20], b), tv.generalized_box_iou_loss(a[:20], b), rtol=1e-5, atol=1e-5)
    for source, target, f in (('cxcywh', 'xyxy', cxcywh_to_xyxy), ('xyxy', 'cxcywh', xyxy_to_cxcywh), ('xywh', 'xyxy', xywh_to_xyxy), ('xyxy', 'xywh', xyxy_to_xywh)):
        assert_close(f(a), tv.box_convert(a, source, target))

@pytest.mark.parametrize('f', [paired_iou, paired_giou])
def test_gradcheck(f):
    a, b = random_boxes(6, seed=3).requires_grad_(), random_boxes(6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(f, (a, b))

def test_shapes_and_dtypes():
    a, b = random_boxes(2, 7).float(), random_boxes(2, 3).float()
    for f in (box_iou, generalized_box_iou): assert f(a, b).shape == (2, 7, 3) and f(a, b).dtype == torch.float32
    for f in (paired_iou, paired_giou):
        assert f(a, a).shape == (2, 7)
        assert f(a[:, :1], a).shape == (2, 7) and f(a[0, 0], a).shape == (2, 7)
    assert box_iou(a[0, :0], b[0]).shape == (0, 3) and generalized_box_iou(a[0], b[0, :0]).shape == (7, 0)
    assert iou_loop(a[0, :0], b[0]).shape == (0, 3) and giou_loop(a[0], b[0]).dtype == torch.float32
    assert cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)

def test_scores_do_not_depend_on_the_scale():
    a, b = random_boxes(5, seed=5), random_boxes(5, seed=6)
    assert_close(box_iou(a * 640, b * 640), box_iou(a, b))
    stretch = torch.tensor([640., 480, 640, 480], dtype=torch.float64)
    assert_close(generalized_box_iou(a * stretch, b * stretch), generalized_box_iou(a, b))

def test_nan_is_not_hidden():
    a = torch.tensor([0.1, 0.1, math.nan, 0.4])
    assert paired_iou(a, torch.rand(4)).isnan() and paired_giou(a, torch.rand(4)).isnan()
    assert inverse_sigmoid(a).isnan().tolist() == [False, False, True, False]

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inverse_sigmoid(dtype):
    x = torch.tensor([-1., 0, 0.25, 0.5, 0.75, 1, 2], dtype=dtype)
    for eps in (1e-5, 1e-3):
        y = inverse_sigmoid(x, eps)
        assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all()
        assert_close(y[2:5].sigmoid(), x[2:5])
        assert_close(y.flip(0), -y, rtol=1e-2, atol=1e-2)
        assert abs(y[0].item() + math.log(1 / eps)) < 0.05

def test_compiles_to_one_graph():
    def loss(a, b): return (1 - paired_giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))).sum() + inverse_sigmoid(a).sum()
    a, b = torch.rand(5, 4), torch.rand(5, 4)
    assert_close(torch.compile(loss, backend='eager', fullgraph=True)(a, b), loss(a, b))

@pytest.mark.parametrize('f', [cxcywh_to_xyxy, xyxy_to_cxcywh, xywh_to_xyxy, xyxy_to_xywh, box_area, check_boxes])
@pytest.mark.parametrize('x', [torch.rand(3, 5), torch.tensor(1.), torch.ones(3, 4, dtype=torch.int64), [[0.5, 0.5, 0.1, 0.1]], None])
def test_bad_boxes(f, x):
    with pytest.raises(ArgumentError, match='`boxes`'): f(x)

@pytest.mark.parametrize('f', [box_iou, generalized_box_iou, paired_iou, paired_giou])
def test_bad_pairs(f):
    good = torch.rand(3, 4)
    with pytest.raises(ArgumentError, match='`a`.*int64'): f(good.long(), good)
    with pytest.raises(ArgumentError, match=r'`b`.*\(3, 2\)'): f(good, good[:, :2])
    with pytest.raises(ArgumentError, match='`b`.*meta'): f(good, good.to('meta'))
    with pytest.raises(ArgumentError, match='`[ab]`'): f(torch.rand(2, 3, 4), torch.rand(5, 3, 4))

def test_single_box_is_no_list():
    with pytest.raises(ArgumentError, match='`a`.*number of boxes'): box_iou(torch.rand(4), torch.rand(3, 4))

@pytest.mark.parametrize('x, eps, name', [(torch.tensor([1, 0]), 1e-5, 'x'), (0.5, 1e-5, 'x'), (torch.rand(2), 0., 'eps'), (torch.rand(2), 0.5, 'eps')])
def test_bad_inverse_sigmoid(x, eps, name):
    with pytest.raises(ArgumentError, match=f'`{name}`'): inverse_sigmoid(x, eps)

good = [0.5, 0.5, 0.2, 0.2]
@pytest.mark.parametrize('bad, expected', [
    ([math.nan, 0.5, 0.2, 0.2], 'finite'), ([0.5, 0.5, math.inf, 0.2], 'finite'), ([120., 80, 40, 30], 'pixels'), ([0.5, 0.5, 0., 0.2], 'above 0'),
    ([0.5, 0.5, 0.2, -0.1], 'above 0'), ([0.95, 0.5, 0.2, 0.2], 'inside'), ([0.5, 0.05, 0.2, 0.2], 'inside'), ([-0.1, 0.5, 0.2, 0.2], 'inside')])
def test_check_boxes(bad, expected):
    with pytest.raises(ArgumentError, match=rf'`targets`.*{expected}.*targets\[1\]'): check_boxes(torch.tensor([good, bad]), 'targets')
    with pytest.raises(ArgumentError, match=r'boxes\[0, 1\]'): check_boxes(torch.tensor([[good, bad]]))
    with pytest.raises(ArgumentError, match=r'boxes = \('): check_boxes(torch.tensor(bad))

def test_check_boxes_accepts():
    for x in ([good], [[0.5, 0.5, 1, 1]], [[0.5, 0.5, 1.00015, 1]], [[0.05, 0.95, 0.1, 0.1]]):
        for dtype in (torch.float32, torch.float64): assert check_boxes(torch.tensor(x, dtype=dtype), slack=2e-4) is None
    check_boxes(torch.zeros(2, 0, 4))
