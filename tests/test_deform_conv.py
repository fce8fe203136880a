"""Deformable convolution: beside torchvision's, at the edges, in half precision, through compilers, and what no page shows."""
import json, math, re, shutil, subprocess
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torchvision.ops import deform_conv2d as theirs

from deformlit.core import *
from deformlit.deform_conv import *
from deformlit.deform_conv import _Bags, _deform, _plain

def inputs(b=2, c=4, o=6, hw=(5, 6), kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, g=1, mask=True, bias=True, far=2., dtype=torch.float64, seed=0):
    "x, offset, weight, bias, mask and the options."
    r = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=r, dtype=torch.float64).to(dtype)
    oh, ow = conv_size(*hw, kernel_size, stride, padding, dilation)
    k = math.prod(kernel_size)
    return ([rand(b, c, *hw), far * rand(b, 2 * g * k, oh, ow), rand(o, c // groups, *kernel_size), rand(o) if bias else None, rand(b, g * k, oh, ow).sigmoid() if mask else None],
            dict(stride=stride, padding=padding, dilation=dilation))

def grads(f, args, **options):
    args = [o if o is None else o.detach().clone().requires_grad_() for o in args]
    out = f(*args[:4], **options, mask=args[4])
    mix = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * mix).sum(), [o for o in args if o is not None])

CASES = {
    'plain': dict(), 'v1': dict(mask=False), 'no bias': dict(bias=False), 'bare': dict(mask=False, bias=False),
    'stride': dict(stride=(2, 3), padding=(1, 2)), 'dilation': dict(dilation=(2, 1), padding=(2, 1)), 'padding alone': dict(padding=(3, 4)),
    'rectangle': dict(kernel_size=(1, 4), hw=(7, 5), padding=(0, 1)), 'tall': dict(kernel_size=(5, 2), hw=(9, 3)), 'one tap': dict(kernel_size=(1, 1)),
    'even': dict(kernel_size=(2, 2), hw=(7, 9), stride=(2, 2)), 'groups': dict(groups=2), 'offset groups': dict(g=2), 'both': dict(groups=2, g=4, padding=(1, 1)),
    'other groups': dict(c=12, o=6, groups=3, g=2), 'depthwise': dict(groups=4, o=4, g=4), 'depthwise, one offset group': dict(groups=4, o=8),
    'far': dict(far=50.), 'very far': dict(far=1e12), 'one image': dict(b=1), 'one pixel': dict(hw=(1, 1), padding=(1, 1)), 'one row': dict(hw=(1, 7), padding=(1, 1)), 'one column': dict(hw=(6, 1), padding=(1, 1)),
}
def by_bags(x, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    "The eager form as large maps take it."
    return _Bags.apply(_plain, (tuple(weight.shape[2:]), stride, padding, dilation), x, offset, weight, bias, mask)

forms = pytest.mark.parametrize('f', [deform_conv2d_gather, by_bags, deform_conv2d], ids=['gather', 'bags', 'op'])

@forms
@pytest.mark.parametrize('case', CASES)
def test_equals_torchvision(case, f):
    args, options = inputs(**CASES[case])
    assert_close(grads(f, args, **options), grads(theirs, args, **options))

@forms
@pytest.mark.parametrize('case', CASES)
def test_on_pixels(case, f):
    "Where all taps stand on pixels there is a kink: the slope on the right is taken, as by torchvision. A new layer is such a case, border included."
    args, options = inputs(**CASES[case])
    for offset in (torch.zeros_like(args[1]), args[1].clamp(-9, 9).round()):
        args[1] = offset
        assert_close(grads(f, args, **options), grads(theirs, args, **options))

@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=25)
def test_equals_the_loop(h, w, kh, kw, stride, padding, dilation, grouped, mask, seed):
    options = dict(kernel_size=(kh, kw), stride=(stride, 1), padding=(padding, 1), dilation=(1, dilation))
    if min(conv_size(h, w, **options)) < 1: return
    args, options = inputs(1, 2, 2, (h, w), **options, groups=1 + grouped, g=1 + mask, mask=mask, far=1.5, seed=seed)
    truth = deform_conv2d_loop(*args[:4], **options, mask=args[4])
    for f in (deform_conv2d_gather, by_bags): assert_close(f(*args[:4], **options, mask=args[4]), truth)

def test_gradients_of_the_loop():
    args, options = inputs(1, 2, 2, (3, 3), (2, 2), g=2)
    truth = grads(deform_conv2d_loop, args, **options)
    for f in (deform_conv2d_gather, by_bags, theirs): assert_close(grads(f, args, **options), truth)

@forms
@pytest.mark.parametrize('case', CASES)
def test_without_offsets_a_convolution(case, f):
    args, options = inputs(**{**CASES[case], 'mask': False})
    x, offset, weight, bias, _ = args
    want = F.conv2d(x, weight, bias, **options, groups=x.shape[1] // weight.shape[1])
    assert_close(f(x, torch.zeros_like(offset), weight, bias, **options), want)

@forms
@pytest.mark.parametrize('dy, dx', [(0, 1), (2, 0), (-1, -2), (9, 9)])
def test_whole_pixels_shift_the_map(dy, dx, f):
    (x, offset, weight, bias, _), options = inputs(groups=2, g=2, padding=(1, 1), mask=False)
    offset = torch.tensor([dy, dx], dtype=x.dtype).view(1, 2, 1, 1).repeat(2, 18, *offset.shape[2:])
    h, w, at = 5, 6, 12
    shifted = F.pad(x, (at,) * 4)[..., at + dy - 1:at + dy + h + 1, at + dx - 1:at + dx + w + 1]      # the padding moves with the map: what comes into it is read
    assert_close(f(x, offset, weight, bias, **options), F.conv2d(shifted, weight, bias, groups=2))

def test_gradcheck():
    args, options = inputs(1, 2, 2, (3, 3), (2, 2), g=2)
    args = [o.requires_grad_() for o in args]
    f = lambda x, offset, weight, bias, mask: deform_conv2d(x, offset, weight, bias, **options, mask=mask)
    assert gradcheck(f, args) and gradgradcheck(f, args) and _deform.ran == 'eager'
    f = lambda x, offset, weight, bias, mask: by_bags(x, offset, weight, bias, **options, mask=mask)
    assert gradcheck(f, args) and gradgradcheck(f, args)

@pytest.mark.parametrize('asked', range(5))
def test_one_gradient_at_a_time(asked):
    "Who asks for one gradient alone gets what he gets among all."
    args, options = inputs(groups=2, g=2)
    args = [o.requires_grad_(i == asked) for i, o in enumerate(args)]
    f = lambda f: torch.autograd.grad(f(*args[:4], **options, mask=args[4]).sum(), args[asked])[0]
    assert_close(f(by_bags), f(theirs))

@forms
def test_no_gradient_asked(f):
    args, options = inputs()
    with torch.no_grad(): assert_close(f(*args[:4], **options, mask=args[4]), theirs(*args[:4], **options, mask=args[4]))
    with torch.inference_mode(): assert_close(f(*args[:4], **options, mask=args[4]), theirs(*args[:4], **options, mask=args[4]))

def test_empty_batch():
    args, options = inputs(b=0)
    assert deform_conv2d(*args[:4], **options, mask=args[4]).shape == (0, 6, 3, 4)

def test_any_layout_of_memory():
    args, options = inputs(dtype=torch.float32, g=2, padding=(1, 1))
    want = grads(deform_conv2d, args, **options)
    last = [o if o is None or o.ndim < 4 else o.to(memory_format=torch.channels_last) for o in args]
    assert_close(grads(deform_conv2d, last, **options), want, check_stride=False)
    wide = [o if o is None else torch.stack([o, o], -1)[..., 0] for o in args]
    assert_close(grads(deform_conv2d, wide, **options), want, check_stride=False)

def test_nothing_given_is_changed():
    args, options = inputs()
    before = [o.clone() for o in args]
    for way in 'loop', 'eager':
        with backend(way): grads(deform_conv2d, args, **options)
        for o, p in zip(args, before): assert torch.equal(o, p)

# ---- numbers that are not finite, and other types

@forms
def test_nan_stays_where_it_is(f):
    args, options = inputs(padding=(1, 1), dtype=torch.float32)
    want = f(*args[:4], **options, mask=args[4])
    args[1][1, 7, 2, 3] = math.nan
    got = f(*args[:4], **options, mask=args[4])
    assert got.isnan().any(1).nonzero().tolist() == [[1, 2, 3]]
    assert_close(got.nan_to_num(), want.masked_fill(got.isnan(), 0))
    back = grads(f, args, **options)
    assert back[2].isnan().any() and all(o.shape == a.shape for o, a in zip(back[1:], args))

def test_torchvision_never_sees_nan():
    "Its kernel would read beside the map and bring the process down."
    args, options = inputs(padding=(1, 1), dtype=torch.float32)
    args[1][1, 7, 2, 3] = math.nan
    with backend('native'): got = grads(deform_conv2d, args, **options)
    assert _deform.ran == 'native' and got[0].isnan().any(1).nonzero().tolist() == [[1, 2, 3]]
    with backend('eager'): assert_close(got[0], deform_conv2d(*args[:4], **options, mask=args[4]), equal_nan=True)

@forms
def test_endless_offsets_read_nothing(f):
    args, options = inputs(padding=(1, 1), bias=False)
    args[1][...] = torch.tensor([math.inf, -math.inf], dtype=torch.float64).repeat(9).view(1, 18, 1, 1)
    assert (f(*args[:4], **options, mask=args[4]) == 0).all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half(dtype):
    args, options = inputs(dtype=dtype)
    out = deform_conv2d(*args[:4], **options, mask=args[4])
    assert out.dtype == dtype
    assert_close(out, deform_conv2d(*(o.float() for o in args[:4]), **options, mask=args[4].float()).to(dtype))

def test_mixed_types():
    args, options = inputs(dtype=torch.float32)
    want = deform_conv2d(*args[:4], **options, mask=args[4])
    out = deform_conv2d(args[0].double(), *args[1:4], **options, mask=args[4])
    assert out.dtype == torch.float64; assert_close(out.float(), want)
    assert deform_conv2d(args[0], args[1].bfloat16(), *args[2:4], **options, mask=args[4]).dtype == torch.float32

def test_autocast():
    torch.manual_seed(0)
    m = DeformConv2d(8, 6, padding=1, offset_groups=2)
    nn.init.normal_(m.branch.conv.weight, std=.1)
    x = torch.randn(1, 8, 9, 7, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): out = m(x)
    assert out.dtype == torch.float32
    want = m(x)
    assert_close(out, want, rtol=.1, atol=.1)
    with torch.autocast('cpu', torch.bfloat16): got = torch.autograd.grad(m(x).sum(), [x, *m.parameters()])
    for a, b in zip(got, torch.autograd.grad(want.sum(), [x, *m.parameters()])): assert a.dtype == b.dtype and (a - b).norm() <= .25 * b.norm()    # a tap that crosses a pixel has another slope
    args, options = inputs(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16): assert_close(deform_conv2d(*args[:4], **options, mask=args[4]), theirs(*args[:4], **options, mask=args[4]))

# ---- the ways

def test_ways():
    args, options = inputs(groups=2, g=2)
    truth = grads(theirs, args, **options)
    for way in 'loop', 'eager', 'native':
        with backend(way): assert_close(grads(deform_conv2d, args, **options), truth)
        assert _deform.ran == way

def test_order():
    "On the CPU ours first, the compiled one for large inputs; torchvision's elsewhere and for what is tiny."
    def order(b, c, h, w, grad=False, device='cpu'):
        x, offset = torch.zeros(b, c, h, w, device=device, requires_grad=grad), torch.zeros(b, 18, h, w, device=device)
        return _deform.order(x, offset, torch.zeros(4, c, 3, 3), None, (1, 1), (1, 1), (1, 1), None)
    assert order(1, 4, 5, 5) == ('native', 'eager') and order(1, 4, 5, 5, True) == ('eager', 'native')
    assert order(1, 64, 28, 28) == ('eager', 'native') and order(600, 4, 5, 5, True) == ('eager', 'native')
    assert order(1, 64, 56, 56) == order(4, 64, 28, 28, True) == ('compiled', 'eager', 'native')
    assert order(1, 64, 56, 56, device='meta') == ('native', 'eager')

def test_without_torchvision(monkeypatch):
    "A torchvision that cannot be imported is no obstacle on the CPU, and is named where it is asked for."
    from deformlit import core, deform_conv as module
    monkeypatch.setitem(__import__('sys').modules, 'torchvision.ops', None)
    module._needs_torchvision.cache_clear()
    try:
        assert 'torchvision cannot be imported' in backends('deform_conv2d')['deform_conv2d']['native']
        args, options = inputs()
        core._said.discard(('deform_conv2d', 'eager'))
        with pytest.warns(BackendWarning, match='torchvision cannot be imported'): deform_conv2d(*args[:4], **options, mask=args[4])
        with backend('native'), pytest.raises(BackendError, match='torchvision'): deform_conv2d(*args[:4], **options, mask=args[4])
    finally:
        monkeypatch.undo()
        module._needs_torchvision.cache_clear()
        backends('deform_conv2d')

def test_torch_func():
    "`vmap` and `grad` of torch.func go through the plain form."
    (x, offset, weight, bias, mask), options = inputs(b=3)
    f = lambda x, offset, mask: deform_conv2d(x[None], offset[None], weight, bias, **options, mask=mask[None])[0]
    assert_close(torch.vmap(f)(x, offset, mask), deform_conv2d(x, offset, weight, bias, **options, mask=mask))
    got = torch.func.grad(lambda o: deform_conv2d(x, o, weight, bias, **options, mask=mask).sum())(offset)
    assert_close(got, torch.autograd.grad(deform_conv2d(x, o := offset.clone().requires_grad_(), weight, bias, **options, mask=mask).sum(), o)[0])

@pytest.mark.parametrize('branch', [OffsetBranch, MaskedOffsetBranch])
def test_traced_once_for_all_sizes(branch):
    m = DeformConv2d(4, 6, stride=2, padding=1, groups=2, offset_groups=2, branch=branch)
    nn.init.normal_(m.branch.conv.weight, std=.3)
    f = torch.compile(m, backend='aot_eager', dynamic=True, fullgraph=True)
    back = lambda m, x: (m(x).detach(), *torch.autograd.grad(m(x).pow(2).sum(), [x, *m.parameters()]))
    for b, h, w in (2, 5, 7), (3, 8, 6), (2, 14, 9):
        x = torch.randn(b, 4, h, w, requires_grad=True)
        assert_close(back(f, x), tuple(back(m, x)), rtol=1e-4, atol=1e-4)

def test_export():
    m, x = DeformConv2d(4, 6, padding=1).eval(), torch.randn(2, 4, 5, 7)
    nn.init.normal_(m.branch.conv.weight, std=.3)
    h, w = torch.export.Dim('h', min=3), torch.export.Dim('w', min=3)
    exported = torch.export.export(m, (x,), dynamic_shapes=({2: h, 3: w},))
    y = torch.randn(2, 4, 9, 4)
    assert_close(exported.module()(y), m(y))

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
def test_compiled():
    for case in 'plain', 'bare', 'both', 'stride', 'one row', 'far':
        args, options = inputs(**CASES[case], dtype=torch.float32)
        with backend('compiled'): got = grads(deform_conv2d, args, **options)
        assert _deform.ran == 'compiled'
        with backend('eager'): assert_close(got, grads(deform_conv2d, args, **options), rtol=1e-4, atol=1e-4)

# ---- the layer

@pytest.mark.parametrize('branch', [OffsetBranch, MaskedOffsetBranch])
@pytest.mark.parametrize('options', [dict(), dict(kernel_size=(1, 3), padding=(0, 1)), dict(stride=2, padding=1), dict(dilation=2, padding=2), dict(groups=2), dict(offset_groups=4, bias=False)], ids=str)
def test_new_layer_is_a_convolution(options, branch):
    m, x = DeformConv2d(8, 6, **options, branch=branch).double(), torch.randn(2, 8, 7, 9).double()
    share = {OffsetBranch: 1, MaskedOffsetBranch: .5}[branch]
    assert_close(m(x), F.conv2d(x, m.weight * share, m.bias, m.stride, m.padding, m.dilation, m.groups))
    m(x).pow(2).sum().backward()
    assert all(o.grad.abs().max() > 0 for o in m.parameters())

@pytest.mark.parametrize('hw', [(1, 1), (1, 5), (4, 1)])
def test_tiny_maps(hw):
    m, x = DeformConv2d(4, 6, padding=1), torch.randn(2, 4, *hw, requires_grad=True)
    nn.init.normal_(m.branch.conv.weight, std=.3)
    m(x).pow(2).sum().backward()
    assert m(x).shape == (2, 6, *hw) and all(o.grad.isfinite().all() for o in [x, *m.parameters()])

def test_layer_equals_torchvisions():
    from torchvision.ops import DeformConv2d as Theirs
    m = DeformConv2d(8, 6, 3, 2, 1, 1, groups=2, offset_groups=4)
    nn.init.normal_(m.branch.conv.weight, std=.3)
    other = Theirs(8, 6, 3, 2, 1, 1, groups=2)
    other.load_state_dict(dict(weight=m.weight, bias=m.bias))
    x = torch.randn(2, 8, 9, 10)
    assert_close(m(x), other(x, *m.branch(x)), rtol=1e-4, atol=1e-4)

def test_masks_are_the_last_third():
    "Offsets first, then masks, as in the official module, whose `conv_offset` has the same channels."
    branch, x = MaskedOffsetBranch(4, offset_groups=2, padding=1), torch.randn(1, 4, 5, 5)
    nn.init.normal_(branch.conv.weight)
    a, b, m = branch.conv(x).chunk(3, 1)
    assert torch.equal(branch(x)[0], torch.cat([a, b], 1)) and torch.equal(branch(x)[1], m.sigmoid())

def test_same_random_weights_as_a_convolution():
    "The kernel is drawn as that of `nn.Conv2d`."
    m, other = DeformConv2d(64, 32), nn.Conv2d(64, 32, 3)
    for a, b in ((m.weight, other.weight), (m.bias, other.bias)):
        assert abs(a.std() / b.std() - 1) < .3 and abs(a.abs().max() / b.abs().max() - 1) < .1

def test_look():
    m, x = DeformConv2d(4, 6, stride=2, padding=1, offset_groups=2), torch.randn(2, 4, 8, 10)
    nn.init.normal_(m.branch.conv.weight, std=.3)
    points, masks = m.look(x)
    assert points.shape == (2, 20, 2, 1, 9, 2) and masks.shape == (2, 20, 2, 1, 9)
    offset, mask = m.branch(x)
    group, tap, row, col = 1, 5, 2, 3
    dy, dx = offset[0, 18 + 2 * tap:20 + 2 * tap, row, col]
    at = points[0, row * 5 + col, group, 0, tap] * torch.tensor([10, 8]) - .5
    assert_close(at, torch.stack([dx + 2 * col - 1 + 2, dy + 2 * row - 1 + 1]))
    assert masks[0, row * 5 + col, group, 0, tap] == mask[0, 9 + tap, row, col]
    assert DeformConv2d(4, 6, branch=OffsetBranch).look(x)[1].unique().tolist() == [1]

def test_any_branch():
    "A branch is whatever gives offsets and masks."
    class Bounded(OffsetBranch):
        def forward(self, x): return 3 * super().forward(x)[0].tanh(), None
    m = DeformConv2d(4, 6, branch=Bounded)
    nn.init.normal_(m.branch.conv.weight, std=9)
    x = torch.randn(1, 4, 8, 8)
    assert m.branch(x)[0].abs().max() <= 3 and m(x).isfinite().all()

def test_it_learns_where_to_look():
    "From zero offsets a layer learns to read two pixels to the right of a smooth map."
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(4, 2, 5, 5), (20, 20), mode='bicubic', align_corners=False)
    target = F.pad(x, (0, 2))[..., 2:]
    m = DeformConv2d(2, 2, 1, branch=OffsetBranch)
    with torch.no_grad(): m.weight.copy_(torch.eye(2).view(2, 2, 1, 1)); m.bias.zero_()
    opt = torch.optim.Adam(m.branch.parameters(), .1)
    for _ in range(60):
        loss = (m(x) - target)[..., :-3].pow(2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert_close(m.branch.conv.bias.detach(), torch.tensor([0., 2.]), atol=.15, rtol=0)

# ---- bad input

def test_bad_arguments():
    (x, offset, weight, bias, mask), options = inputs()
    call = lambda **o: deform_conv2d(**{**dict(x=x, offset=offset, weight=weight, bias=bias, mask=mask), **options, **o})
    call()
    for name, bad in (('x', x[0]), ('x', x.long()), ('x', x[..., :2, :]), ('offset', offset[:, :17]), ('offset', offset[:1]), ('offset', offset[..., :2]), ('offset', offset[:, :0]), ('offset', offset.repeat(1, 3, 1, 1)),
                      ('offset', offset.long()), ('weight', weight[0]), ('weight', weight[:, :3]), ('weight', torch.zeros(5, 2, 3, 3)), ('weight', weight[:, :0]), ('bias', bias[:5]), ('bias', 1.), ('mask', mask[:, :8]), ('mask', mask[:1]),
                      ('mask', mask.bool()), ('stride', 0), ('stride', 1.5), ('stride', (1, 2, 3)), ('padding', -1), ('dilation', 0), ('dilation', 'two'), ('x', x.to('meta'))):
        with pytest.raises(ArgumentError, match=f'`({name}|weight|offset)`' if name == 'x' else f'`{name}`'): call(**{name: bad})
    with pytest.raises(ArgumentError, match='18 channels'): call(offset=offset[:, :17])
    with debug(), pytest.raises(ArgumentError, match='`offset`'): call(offset=offset / 0)

def test_bad_layers():
    for name, bad in (('dim_in', dict(dim_in=0)), ('dim_out', dict(dim_out=0)), ('groups', dict(groups=3)), ('groups', dict(groups=0)), ('offset_groups', dict(offset_groups=3)), ('kernel_size', dict(kernel_size=0)),
                      ('stride', dict(stride=0)), ('padding', dict(padding=-1)), ('dilation', dict(dilation=(1, 0)))):
        with pytest.raises(ArgumentError, match=f'`{name}`'): DeformConv2d(**{**dict(dim_in=8, dim_out=6), **bad})
    with pytest.raises(ArgumentError, match='`x`'): DeformConv2d(8, 6)(torch.randn(1, 7, 5, 5))

# ---- the figure to move

def figure():
    "The moving figure's data and its function, as they stand in the chapter."
    cells = json.loads((Path(__file__).parents[1]/'nbs/10_deform_conv.ipynb').read_text())['cells']
    html = [''.join(o['data']['text/html']) for c in cells for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    page, = [o for o in html if 'id="live-deform-conv"' in o]
    return json.loads(re.search(r'<script>.*?data = (\{.*?\});\nconst svg', page, re.S)[1]), re.search(r'\nfunction read\(.*?\n\}', page, re.S)[0]

@pytest.mark.skipif(not shutil.which('node'), reason='no node on the path')
def test_the_moving_figure_repeats_the_formula():
    data, function = figure()
    x, (rows, cols) = torch.tensor(data['map']).double()[None], data['grid']
    at = torch.tensor([(3.25, 2.5), (-.7, .2), (13.4, 9.9), (4, 5), (-1.5, 3), (0, -1), (6.9, 9.75)], dtype=torch.float64)
    script = f'const data = {json.dumps(data)};{function}\nconsole.log(JSON.stringify([' + ','.join(f'read(data.map, {rows}, {cols}, {a}, {b})' for a, b in at.tolist()) + ']))'
    theirs = json.loads(subprocess.run(['node', '-e', script], capture_output=True, text=True, check=True, timeout=60).stdout)
    shares = tap_rows(at.view(1, -1, 1, 1, 2), rows, cols)[1].flatten(0, 3)
    centre = torch.tensor([cols // 2, rows // 2], dtype=torch.float64)
    for (four, value), place, share in zip(theirs, at, shares):
        offset = (place - centre).flip(0).view(1, 2, 1, 1).expand(1, 2, rows, cols)
        out = deform_conv2d(x, offset, torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1))[0, :, rows // 2, cols // 2]
        assert_close(torch.tensor(value, dtype=torch.float64), out)
        assert_close(torch.tensor([o[2] for o in four], dtype=torch.float64), share)
