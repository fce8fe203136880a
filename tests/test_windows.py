"""Windows: edges, dtypes, gradients, compilers, peers, and what no page shows."""
import json, math, re, shutil, subprocess
from pathlib import Path

import pytest, torch
from hypothesis import given, strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from deformlit.attend import attend
from deformlit.core import *
from deformlit.windows import *
from deformlit.windows import _neighbourhood, _window

def heads(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]

def numbers(*shape): return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

def grads(f, args):
    args = [o.detach().clone().requires_grad_() for o in args]
    out = f(*args)
    mix = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad((out * mix).sum(), args)

MODULES = dict(
    window=lambda **o: WindowAttention(12, 4, 3, **o), shifted=lambda **o: ShiftedWindowAttention(12, (4, 3), 3, **o), dat=lambda **o: ShiftedWindowAttention(12, 7, 3, dat_shift(7), **o),
    neighbourhood=lambda **o: NeighbourhoodAttention(12, 3, 3, **o), dilated=lambda **o: NeighbourhoodAttention(12, 3, 3, dilation=2, **o), kept=lambda **o: NeighbourhoodAttention(12, 5, 3, small=keep_small, **o))
each = pytest.mark.parametrize('make', MODULES.values(), ids=MODULES)

@given(st.integers(1, 6), st.integers(1, 6), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.data())
def test_window_eager_is_the_loop(h, w, window, data):
    shift, t = tuple(data.draw(st.integers(0, o - 1)) for o in window), math.prod(window)
    args = [*heads(1, 2, 1, h, w), numbers(2, t, t)]
    eager, loop = (lambda q, k, v, b: f(q, k, v, window, shift, b) for f in (window_attn_eager, window_attn_loop))
    assert_close(eager(*args), loop(*args))

@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(1, 4))
def test_neighbourhood_eager_is_the_loop(h, w, kernel_size, dilation, tile):
    args = [*heads(1, 2, 1, h, w), numbers(2, 2 * kernel_size - 1, 2 * kernel_size - 1)]
    assert_close(neighbourhood_attn_eager(*args[:3], kernel_size, dilation, args[3], tile=tile), neighbourhood_attn_loop(*args[:3], kernel_size, dilation, args[3]))

@pytest.mark.parametrize('hw', [(1, 1), (4, 4), (5, 3)])
def test_gradients_are_the_loops(hw):
    for window, shift in (2, 0), (2, 1), ((3, 2), (2, 1)):
        t = math.prod(pair('window_size', window))
        args = [*heads(1, 2, 2, *hw), numbers(2, t, t)]
        assert_close(grads(lambda q, k, v, b: window_attn_eager(q, k, v, window, shift, b), args), grads(lambda q, k, v, b: window_attn_loop(q, k, v, window, shift, b), args))
    for kernel_size, dilation in (3, 1), (3, 2), (5, 1):
        args = [*heads(1, 2, 2, *hw), numbers(2, 2 * kernel_size - 1, 2 * kernel_size - 1)]
        assert_close(grads(lambda q, k, v, b: neighbourhood_attn_eager(q, k, v, kernel_size, dilation, b), args), grads(lambda q, k, v, b: neighbourhood_attn_loop(q, k, v, kernel_size, dilation, b), args))

def test_gradcheck():
    args = [o.requires_grad_() for o in [*heads(1, 1, 2, 3, 4), numbers(1, 4, 4), numbers(1, 5, 5)]]
    assert gradcheck(lambda q, k, v, b, _: window_attn(q, k, v, 2, 1, b), args) and gradcheck(lambda q, k, v, _, b: neighbourhood_attn(q, k, v, 3, 1, b), args)

def test_window_start_is_nattens():
    "The closed form against the rule of the published kernels, written out: the window is clamped within the pixels of the same class."
    for size in range(1, 26):
        for kernel_size in 1, 3, 5, 7:
            for dilation in range(1, size // kernel_size + 1):
                for i in range(size):
                    r = kernel_size // 2
                    if dilation == 1: want = max(i - r, 0) + (size - i - r - 1 if i + r >= size else 0)
                    else:
                        start = i - r * dilation
                        if start < 0: want = i % dilation
                        elif i + r * dilation >= size:
                            a, b = size // dilation * dilation, i % dilation
                            c = size - a
                            want = size - c + b - 2 * r * dilation if b < c else a + b - kernel_size * dilation
                        else: want = start
                    first, count = window_start(i, size, kernel_size, dilation)
                    assert (first, count) == (want, kernel_size)
                places, counts = window_start(torch.arange(size), size, kernel_size, dilation)
                assert places.tolist() == [window_start(i, size, kernel_size, dilation)[0] for i in range(size)] and (counts == kernel_size).all()

def test_whole_map_is_dense_attention():
    q, k, v = heads(2, 3, 4, 5, 5)
    dense = attend(*(o.flatten(3).transpose(2, 3) for o in (q, k, v))).transpose(2, 3).unflatten(3, (5, 5))
    for out in (window_attn(q, k, v, 5), window_attn(q, k, v, 9), neighbourhood_attn(q, k, v, 5), neighbourhood_attn(q, k, v, 11), window_attn(q, k, v, 9, 5)): assert_close(out, dense)

def test_bias_of_whole_map_is_the_same():
    "A neighbourhood as large as the map is one block, and both tables say the same with opposite signs."
    part, (q, k, v) = WindowTable(2, 5).double(), heads(1, 2, 3, 5, 5)
    torch.nn.init.normal_(part.table)
    table = part.table.T.unflatten(1, (9, 9)).flip(1, 2)
    assert_close(window_attn(q, k, v, 5, 0, part()), neighbourhood_attn(q, k, v, 5, 1, table))

@pytest.mark.parametrize('hw', [(14, 14), (8, 15)])
def test_equals_timm(hw):
    "Swin of timm: blocks of 7, shifted by 3, with its padding masked by us and not by timm; so on sizes that it need not pad."
    swin = pytest.importorskip('timm.models.swin_transformer')
    torch.manual_seed(0)
    window = (7, 7) if hw == (14, 14) else (4, 5)
    for shift in 0, window[0] // 2:
        theirs = swin.SwinTransformerBlock(12, hw, num_heads=3, window_size=window, shift_size=shift, always_partition=True).eval()
        theirs.attn.relative_position_bias_table.data.normal_()
        theirs.norm1 = theirs.norm2 = torch.nn.Identity()
        theirs.mlp = torch.nn.Identity()
        ours = ShiftedWindowAttention(12, window, 3, theirs.shift_size)
        ours.load_state_dict({n.replace('relative_position_bias_table', 'bias.table'): o for n, o in theirs.attn.state_dict().items() if 'index' not in n})
        x = torch.randn(2, 12, *hw)
        assert_close(ours(x), theirs._attn(x.movedim(1, -1)).movedim(-1, 1))

def test_shifts():
    assert swin_shift(7) == (3, 3) and dat_shift(7) == (4, 4) and swin_shift(12) == dat_shift(12) == (6, 6) and swin_shift((4, 5)) == (2, 2) and dat_shift((4, 5)) == (2, 3)

@each
@pytest.mark.parametrize('hw', [(1, 1), (1, 6), (2, 3), (9, 5)])
def test_any_size(make, hw):
    m, x = make(), torch.randn(2, 12, *hw, requires_grad=True)
    out = m(x)
    out.pow(2).sum().backward()
    assert out.shape == x.shape and out.isfinite().all() and all(p.grad.isfinite().all() for p in [x, *m.parameters()])

@each
def test_module(make):
    "Trains in every parameter, changes nothing given, runs channels last, in half precision and under autocast."
    m, x = make(), torch.randn(2, 12, 8, 9)
    torch.nn.init.normal_(m.bias.table)
    before, want = x.clone(), m(x)
    m(x.requires_grad_()).pow(2).sum().backward()
    assert torch.equal(x, before) and all(p.grad.abs().max() > 0 for p in m.parameters())
    assert_close(m(x.to(memory_format=torch.channels_last)), want)
    with torch.autocast('cpu', torch.bfloat16): assert_close(m(x).float(), want, rtol=.1, atol=.05)
    m = m.to(torch.bfloat16)
    assert_close(m(x.to(torch.bfloat16)).float(), want, rtol=.1, atol=.05)

@pytest.mark.slow
@each
def test_traced_once_for_all_sizes(make):
    m = make()
    f = torch.compile(m, backend='aot_eager', dynamic=True, fullgraph=True)
    for b, h, w in (2, 8, 12), (3, 9, 7), (2, 14, 10):
        x = torch.randn(b, 12, h, w)
        assert_close(grads(f, [x]), grads(m, [x]))

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
@each
def test_compiled(make):
    m = make()
    for shape in (2, 12, 8, 9), (1, 12, 5, 14):
        x = torch.randn(shape)
        with backend('compiled', 'window_attn', 'neighbourhood_attn'): got = grads(m, [x])
        assert 'compiled' in (_window.ran, _neighbourhood.ran)
        with backend('eager', 'window_attn', 'neighbourhood_attn'): assert_close(got, grads(m, [x]), rtol=1e-4, atol=1e-5)

def test_constant_values_stay():
    q, k, v = heads(1, 2, 3, 6, 5)
    v = torch.ones_like(v)
    for out in (window_attn(q, k, v, 4, 1), neighbourhood_attn(q, k, v, 3, 2), neighbourhood_attn(q, k, v, 9)): assert_close(out, v)

@each
def test_no_bias_and_dropout(make):
    m, x = make(bias=NoTable), torch.randn(1, 12, 6, 7)
    assert m(x).shape == x.shape and not list(m.bias.parameters())
    m = make(attn_drop=.5, proj_drop=.1)
    assert not torch.allclose(m(x), m(x))
    assert_close(m.eval()(x), m(x))

def test_small_maps():
    "Filled with zeros, the bias of the projection is read from what is filled in; kept, it is not."
    x = torch.zeros(1, 12, 2, 2)
    m = NeighbourhoodAttention(12, 3, 3)
    with torch.no_grad(): m.qkv.bias.copy_(torch.randn(36)); m.proj.weight.copy_(torch.eye(12)); m.proj.bias.zero_()
    kept = NeighbourhoodAttention(12, 3, 3, small=keep_small)
    kept.load_state_dict(m.state_dict())
    x = torch.randn(1, 12, 2, 2)
    assert (m(x) - kept(x)).abs().max() > .01
    big = torch.randn(1, 12, 3, 4)
    assert_close(m(big), kept(big))

def test_bad_arguments():
    q, k, v = heads(1, 2, 3, 4, 5)
    for bad, name in (((q, k[..., :4], v, 2), 'k'), ((q[0], k, v, 2), 'q'), ((q, k, v.float(), 2), 'v'), ((q, k, v, 0), 'window_size'), ((q, k, v, (2, 2, 2)), 'window_size'), ((q, k, v, 2.), 'window_size'),
                      ((q, k, v, 2, 2), 'shift'), ((q, k, v, 2, -1), 'shift'), ((q, k, v, 2, 0, torch.zeros(2, 3, 3).double()), 'bias')):
        with pytest.raises(ArgumentError, match=f'`{name}`'): window_attn(*bad)
    for bad, name in (((q, k, v, 2), 'kernel_size'), ((q, k, v, 0), 'kernel_size'), ((q, k, v, 3, 0), 'dilation'), ((q, k, v, 3, 1, torch.zeros(2, 3, 3).double()), 'bias')):
        with pytest.raises(ArgumentError, match=f'`{name}`'): neighbourhood_attn(*bad)
    for make, name in ((lambda: WindowAttention(12, 4, 5), 'num_heads'), (lambda: WindowAttention(12, 4, 0), 'num_heads'), (lambda: ShiftedWindowAttention(12, 4, 3, 4), 'shift'),
                       (lambda: WindowAttention(12, -1, 3), 'window_size'), (lambda: NeighbourhoodAttention(12, 4, 3), 'kernel_size'), (lambda: NeighbourhoodAttention(12, 3, 3, 0), 'dilation'),
                       (lambda: WindowAttention(12, 4, 3)(torch.randn(1, 11, 4, 4)), 'x')):
        with pytest.raises(ArgumentError, match=f'`{name}`'): make()

# ---- the figure to move

def figure():
    "The moving figure's function, as it stands in the chapter."
    cells = json.loads((Path(__file__).parents[1]/'nbs/14_windows.ipynb').read_text())['cells']
    html = [''.join(o['data']['text/html']) for c in cells for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    page, = [o for o in html if 'id="live-windows"' in o]
    return re.search(r'\nfunction along\(.*?\n\}', page, re.S)[0]

@pytest.mark.skipif(not shutil.which('node'), reason='no node on the path')
def test_the_moving_figure_repeats_the_rules():
    cases = [(kind, p, size) for kind in ('blocks', 'swin', 'dat', 'near', 'far') for size in (14, 21) for p in range(size)]
    script = f'{figure()}\nconsole.log(JSON.stringify([' + ','.join(f'along("{k}", {p}, {size})' for k, p, size in cases) + ']))'
    theirs = json.loads(subprocess.run(['node', '-e', script], capture_output=True, text=True, check=True, timeout=60).stdout)
    shift = dict(blocks=0, swin=swin_shift(7)[0], dat=dat_shift(7)[0])
    for (kind, p, size), got in zip(cases, theirs):
        if kind in shift: want = [r for r in range(size) if block_of(r, 7, shift[kind]) == block_of(p, 7, shift[kind])]
        else:
            dilation = dict(near=1, far=2)[kind]
            first, count = window_start(p, size, 7, dilation)
            want = [first + i * dilation for i in range(count)]
        assert got == want
