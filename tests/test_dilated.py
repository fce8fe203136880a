"""Dilated windows: edges, dtypes, gradients, compilers, and what no page shows."""
import json, math, re, shutil, subprocess
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from deformlit.core import *
from deformlit.dilated import *
from deformlit.dilated import _dilated

def qkv(*shape, dtype=torch.float64, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for _ in range(3)]

def grads(f, args):
    args = [o.detach().clone().requires_grad_() for o in args]
    out = f(*args)
    mix = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad((out * mix).sum(), args)

@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 5]), st.integers(1, 4), st.sampled_from([0., -math.inf, -1.5, 2.]))
def test_eager_is_the_loop(h, w, kernel_size, dilation, padding):
    x = qkv(1, 2, 2, h, w)
    loop, eager = (lambda *o: f(*o, kernel_size, dilation, padding) for f in (dilated_attn_loop, dilated_attn_eager))
    if h * w * kernel_size < 30: assert_close(grads(eager, x), grads(loop, x))
    else: assert_close(eager(*x), loop(*x))

@pytest.mark.parametrize('padding', [0., -math.inf, -2.])
@pytest.mark.parametrize('dilation', [1, 2, 3])
def test_closed_form(dilation, padding):
    "Dense attention over the valid keys, times the sigmoid of its log-sum-exp over what the padding has."
    q, k, v = qkv(2, 2, 4, 5, 7)
    outside = outside_window(5, 7, 3, dilation)
    logits = torch.stack([(q * o).sum(2) for o in _shifted(k, dilation)], 2) / 2
    logits = logits.masked_fill(outside, -math.inf)
    lse, o = logits.logsumexp(2), dilated_read(logits.softmax(2), v, 3, dilation)
    keep = torch.sigmoid(lse - outside.sum(0).log() - padding)[:, :, None]
    assert_close(dilated_attn(q, k, v, 3, dilation, padding), o * keep)

def _shifted(x, dilation):
    out = torch.zeros(9, *x.shape, dtype=x.dtype)
    h, w = x.shape[-2:]
    for i, (dx, dy) in enumerate(window_offsets(3, dilation)):
        for y in range(h):
            for a in range(w):
                if 0 <= y + dy < h and 0 <= a + dx < w: out[i, ..., y, a] = x[..., y + dy, a + dx]
    return out

def test_equals_unfold():
    q, k, v = qkv(2, 3, 4, 6, 5, dtype=torch.float32)
    for dilation in 1, 2, 3:
        unfold = lambda x: F.unfold(x.flatten(1, 2), 3, dilation, dilation).view(2, 3, 4, 9, 6, 5)
        weights = ((q[:, :, :, None] * unfold(k)).sum(2) / 2).softmax(2)
        assert_close(dilated_attn(q, k, v, 3, dilation), (weights[:, :, None] * unfold(v)).sum(3))
        assert_close(dilated_weights(q, k, 3, dilation), weights)

def test_border_mass():
    for dilation, share in (1, .4375), (2, .75), (3, .9375):
        q, k, v = torch.zeros(1, 1, 1, 8, 8), torch.zeros(1, 1, 1, 8, 8), torch.ones(1, 1, 1, 8, 8)
        out = dilated_attn(q, k, v, 3, dilation)
        assert (out < 1 - 1e-6).float().mean() == share and abs(out.min() - 4/9) < 1e-6
        assert_close(dilated_attn(q, k, v, 3, dilation, -math.inf), v)

def test_gradients():
    x = qkv(1, 2, 2, 3, 4, grad=True)
    for padding in 0., -math.inf:
        f = lambda *o: dilated_attn(*o, 3, 2, padding)
        assert gradcheck(f, x) and gradgradcheck(f, x)

@pytest.mark.parametrize('padding', [0., -math.inf])
@pytest.mark.parametrize('hw', [(1, 1), (1, 5), (4, 1), (2, 3)])
def test_tiny_maps(hw, padding):
    m = MultiDilatedAttention(12, 3, padding=padding)
    x = torch.randn(2, 12, *hw, requires_grad=True)
    m(x).pow(2).sum().backward()
    assert m(x).shape == x.shape and m(x).isfinite().all() and all(p.grad.isfinite().all() for p in [x, *m.parameters()])

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half(dtype):
    x = qkv(1, 2, 4, 5, 6, dtype=dtype)
    out = dilated_attn(*x, 3, 2)
    assert out.dtype == dtype
    assert_close(out, dilated_attn(*(o.float() for o in x), 3, 2).to(dtype))
    m = MultiDilatedAttention(12, 3)
    want = m(y := torch.randn(1, 12, 5, 7))
    assert_close(m.to(dtype)(y.to(dtype)).float(), want, rtol=.1, atol=.05)

def test_autocast():
    m = MultiDilatedAttention(12, 3)
    x = torch.randn(1, 12, 5, 7, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): out = m(x)
    out.float().sum().backward()
    assert_close(out.float(), m(x), rtol=.1, atol=.05)

def test_nothing_given_is_changed():
    m, x = MultiDilatedAttention(12, 3), torch.randn(1, 12, 5, 7)
    before = x.clone()
    m(x); m(x.requires_grad_()).sum().backward(); m.weights(x)
    assert torch.equal(x, before) and all(p.grad.abs().max() > 0 for p in m.parameters())

def test_channels_last():
    m, x = MultiDilatedAttention(12, 3), torch.randn(2, 12, 5, 7)
    assert_close(m.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), m(x))

@pytest.mark.parametrize('padding', [0., -math.inf])
def test_traced_once_for_all_sizes(padding):
    m = MultiDilatedAttention(12, 3, padding=padding)
    f = torch.compile(m, backend='aot_eager', dynamic=True, fullgraph=True)
    for b, h, w in (2, 5, 7), (3, 8, 6), (2, 14, 9):
        x = torch.randn(b, 12, h, w)
        assert_close(grads(f, [x]), grads(m, [x]))

def test_export():
    m, x = MultiDilatedAttention(12, 3).eval(), torch.randn(2, 12, 5, 7)
    h, w = torch.export.Dim('h', min=2), torch.export.Dim('w', min=2)
    exported = torch.export.export(m, (x,), dynamic_shapes=({2: h, 3: w},))
    y = torch.randn(2, 12, 9, 4)
    assert_close(exported.module()(y), m(y))

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
def test_compiled():
    for shape in (1, 2, 4, 5, 6), (2, 3, 8, 9, 4):
        x = qkv(*shape, dtype=torch.float32)
        for padding in 0., -math.inf:
            with backend('compiled'): got = grads(lambda *o: dilated_attn(*o, 3, 2, padding), x)
            assert _dilated.ran == 'compiled'
            with backend('eager'): assert_close(got, grads(lambda *o: dilated_attn(*o, 3, 2, padding), x))

def test_heads_in_order():
    "Head i has dilation i // (heads / dilations): what it reads of one lit pixel shows it."
    m = MultiDilatedAttention(12, 6, dilations=(1, 2, 3))
    for p in m.parameters(): torch.nn.init.zeros_(p)
    torch.nn.init.eye_(m.proj.weight)
    with torch.no_grad(): m.qkv.weight[24:, :, 0, 0] = torch.eye(12)
    x = torch.zeros(1, 12, 9, 9)
    x[:, :, 4, 4] = 1
    for head in range(6):
        seen = m(x)[0, 2 * head].nonzero()
        assert seen.amin(0).tolist() == [4 - (1 + head // 2)] * 2 and len(seen) == 9

def test_dropout_of_weights():
    m, x = MultiDilatedAttention(12, 3, attn_drop=.5), torch.randn(1, 12, 6, 6)
    torch.manual_seed(0)
    assert not torch.allclose(m(x), m(x))
    assert_close(m.eval()(x), m(x))
    mean = torch.stack([m.train()(x) for _ in range(2000)]).mean(0)
    assert (mean - m.eval()(x)).abs().max() < .05

def test_weights_of_the_module():
    m, x = MultiDilatedAttention(12, 6), torch.randn(2, 12, 5, 7)
    weights = m.weights(x)
    assert weights.shape == (2, 6, 9, 5, 7)
    assert_close(weights.sum(2), torch.ones(2, 6, 5, 7))
    read = torch.cat([dilated_read(a, v, 3, o) for a, (_, _, v, o) in zip(weights.chunk(3, 1), m.heads(x))], 1)
    assert_close(m.proj(read.flatten(1, 2).movedim(1, -1)).movedim(-1, 1), m(x))

def test_bad_arguments():
    q, k, v = qkv(1, 2, 3, 4, 5)
    for bad, name in (((q[0], k, v), 'q'), ((q, k[..., :4], v), 'k'), ((q, k, v[:, :1]), 'v'), ((q.long(), k.long(), v.long()), 'q'), ((q, k.float(), v), 'k'),
                      ((q, k, v, 4), 'kernel_size'), ((q, k, v, 0), 'kernel_size'), ((q, k, v, 3, 0), 'dilation'), ((q, k, v, 3, 1.5), 'dilation'),
                      ((q, k, v, 3, 1, math.inf), 'padding'), ((q, k, v, 3, 1, math.nan), 'padding'), ((q, k, v, 3, 1, 'zeros'), 'padding')):
        with pytest.raises(ArgumentError, match=f'`{name}`'): dilated_attn(*bad)
    for bad, name in ((dict(num_heads=4), 'num_heads'), (dict(num_heads=5, dilations=1), 'num_heads'), (dict(num_heads=0), 'num_heads'), (dict(num_heads=3, kernel_size=2), 'kernel_size'),
                      (dict(num_heads=3, dilations=()), 'dilations'), (dict(num_heads=3, dilations=(1, 0, 2)), 'dilation'), (dict(num_heads=3, padding=math.nan), 'padding')):
        with pytest.raises(ArgumentError, match=f'`{name}`'): MultiDilatedAttention(12, **bad)
    with pytest.raises(ArgumentError, match='`x`'): MultiDilatedAttention(12, 3)(torch.randn(1, 11, 4, 4))
    with debug(), pytest.raises(ArgumentError, match='`k`'): dilated_attn(q, k / 0, v)

# ---- the figure to move

def figure():
    "The moving figure's data and its function, as they stand in the chapter."
    cells = json.loads((Path(__file__).parents[1]/'nbs/15_dilated.ipynb').read_text())['cells']
    html = [''.join(o['data']['text/html']) for c in cells for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    page, = [o for o in html if 'id="live-dilated"' in o]
    return re.search(r'<script>.*?data = (\{.*?\});\nconst svg', page, re.S)[1], re.search(r'\nfunction weights\(.*?\n\}', page, re.S)[0]

@pytest.mark.skipif(not shutil.which('node'), reason='no node on the path')
def test_the_moving_figure_repeats_the_formula():
    data, function = figure()
    x = torch.tensor(json.loads(data)['features'])[None, None]
    cases = [(c, r, dilation, padding) for c, r in ((0, 0), (17, 11), (5, 1), (9, 6)) for dilation in (1, 2, 3) for padding in ('0', '-Infinity')]
    script = f'const data = {data};{function}\nconsole.log(JSON.stringify([' + ','.join(f'weights(data.features, ...data.grid, {c}, {r}, {o}, {z})' for c, r, o, z in cases) + ']))'
    theirs = json.loads(subprocess.run(['node', '-e', script], capture_output=True, text=True, check=True, timeout=60).stdout)
    for (c, r, dilation, padding), (weights, outside) in zip(cases, theirs):
        assert_close(torch.tensor(weights), dilated_weights(x, x, 3, dilation, 0. if padding == '0' else -math.inf)[0, 0, :, r, c])
        assert outside == outside_window(*x.shape[-2:], 3, dilation)[:, r, c].tolist()
