"""What the native op of dilated windows must do on every device. A module of tests imports these and has a fixture `on`: the device they run on."""
import copy, io, math
import pytest, torch
from torch import nn
from torch.testing import assert_close
from truth import inf, nan, need_native
from deformlit.core import backend
from deformlit.dilated import *
from deformlit.dilated import _dilated
import deformlit.dilated_kernel                    # registers the ops, which some tests call by their names

TYPES = dict(f32=torch.float32, f64=torch.float64, f16=torch.float16, bf16=torch.bfloat16)
types = pytest.mark.parametrize('dtype', TYPES.values(), ids=TYPES)
halves = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['f16', 'bf16'])

def inputs(on, b=2, n=2, d=3, h=4, w=5, dtype=torch.float32, seed=0):
    "Queries, keys and values."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, d, h, w, dtype=torch.float64, generator=g).to(on, dtype) for _ in range(3)]

def native(q, k, v, *window):
    "The output by way 'native'; asserts that it ran."
    _dilated.ran = None
    with backend('native'): out = dilated_attn(q, k, v, *window)
    assert _dilated.ran == 'native'
    return out

def run(q, k, v, *window, grad=None, f=native):
    "Output and gradients, and the output's gradient that they are for."
    args = [o.detach().requires_grad_() for o in (q, k, v)]
    out = f(*args, *window)
    if grad is None: grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, args, grad)], grad

def exact(args, *window, grad=None, most=1):
    "Output and gradients have the right type, and no error beyond roundings of what they are made of, at most `most` for each addition; returns the largest."
    got, grad = run(*args, *window, grad=grad)
    wide = [o.detach().cpu().double() for o in args]
    want, _ = run(*wide, *window, grad=grad.cpu().double(), f=dilated_attn_eager)
    whole, kind, worst = torch.float64 if args[0].dtype == torch.float64 else torch.float32, torch.finfo(args[0].dtype), 0
    # logits are sums over channels, gradients sums over keys of such: the size of a rounding is that of the largest numbers that meet
    q, k, v = (o.abs().max().item() if o.numel() else 0. for o in wide)
    g, d = grad.abs().max().item() if grad.numel() else 0., args[0].shape[2]
    scale = window[3] if len(window) > 3 else d**-.5 if d else 1.
    logit = 1 + abs(scale) * q * k * d**.5 * 2
    sizes = [v * logit, scale * k * g * v * d * logit, scale * q * g * v * d * logit, 9 * g * logit]
    for i, (a, b, size) in enumerate(zip(got, want, sizes)):
        assert a.shape == args[0].shape and a.dtype == args[0].dtype and a.device == args[0].device and a.is_contiguous()
        a = a.cpu().double()
        assert torch.equal(a.isnan(), b.isnan())
        error = ((a - b).abs() - (kind.eps / 2 * b.abs() + kind.smallest_normal * kind.eps if kind.bits == 16 else 0)).nan_to_num(0.).clamp(min=0)
        error = error.max().item() / (torch.finfo(whole).eps * abs(size) + 1e-300) if error.numel() else 0.
        assert error <= most, f"{('output', 'q', 'k', 'v')[i]}: {error:.3g} roundings"
        worst = max(worst, error)
    return worst

# ---- values and gradients

@types
@pytest.mark.parametrize('kernel_size', [1, 3, 5, 7])
@pytest.mark.parametrize('padding', [0., -inf, -1.5, 2.])
def test_exact(on, dtype, kernel_size, padding):
    for case, dilation in ((dict(h=6, w=7), 1), (dict(n=6, d=8, h=5, w=9), (1, 2, 3)), (dict(n=4, d=2, h=9, w=4), (3, 1)), (dict(h=3, w=3), 2), (dict(h=2, w=2), 7)):
        exact(inputs(on, dtype=dtype, **case), kernel_size, dilation, padding)

@types
def test_sizes(on, dtype, request):
    "Maps smaller than a vector and a window, of one pixel, of one row or column; widths about those of vectors; any number of channels."
    for h, w in ((1, 1), (1, 9), (9, 1), (2, 3), (3, 4), (2, 5), (3, 7), (2, 8), (2, 9), (3, 15), (2, 16), (3, 17), (2, 31), (1, 33), (2, 64)): exact(inputs(on, b=1, h=h, w=w, dtype=dtype, seed=w), 3, 2)
    for d in getattr(request.module, 'CHANNELS', (1, 2, 5, 7, 8, 9, 13, 16, 24, 33, 64, 100)): exact(inputs(on, b=1, d=d, dtype=dtype, seed=d), 3, 1)

@types
@pytest.mark.parametrize('empty', [dict(b=0), dict(n=0), dict(d=0), dict(h=0), dict(w=0)], ids=str)
def test_nothing_to_do(on, empty, dtype):
    args = inputs(on, **empty, dtype=dtype)
    for o in run(*args, 3, 1, 0., 1.)[0]: assert o.shape == args[0].shape and o.numel() == 0

def test_far_dilations(on):
    "A window wider than any map, and steps that 32 bits cannot hold: only the own pixel is inside."
    args = inputs(on, dtype=torch.float64)
    for dilation in (5, 6, 100, 2**31 - 1, 2**31, 2**40): assert_close(native(*args, 3, dilation), native(*args, 3, 1000))
    exact(args, 3, 1000)

def test_scale(on):
    args = inputs(on, dtype=torch.float64)
    for scale in (0., 1., -2., .1): exact(args, 3, 1, 0., scale)

def test_large_logits(on):
    "Shares of one key alone; no overflow."
    for size in (1e2, 1e4, 1e15):
        q, k, v = inputs(on)
        out = native(q * size, k * size, v, 3, 1)
        want = dilated_attn_eager(*(o.double() for o in (q * size, k * size, v)), 3, 1)
        assert out.isfinite().all() and (out - want).abs().max() < 1e-2

# ---- layouts

def permuted(x, order):
    "`x` with its numbers laid out in another order of the axes."
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])

LAYOUTS = {
    'channels last': lambda x: permuted(x, [0, 3, 4, 1, 2]), 'channels first': lambda x: permuted(x, [2, 0, 1, 3, 4]), 'images last': lambda x: permuted(x, [1, 2, 3, 4, 0]), 'columns first': lambda x: permuted(x, [0, 1, 2, 4, 3]),
    'slice of a qkv': lambda x: torch.stack([x + 1, x, x - 1], 1)[:, 1], 'slice of heads': lambda x: torch.cat([x, x + 1], 1)[:, :x.shape[1]], 'slice of rows': lambda x: torch.cat([x + 1, x], 3)[:, :, :, x.shape[3]:],
    'slice of columns': lambda x: torch.cat([x, x + 1], 4)[..., :x.shape[4]], 'every second column': lambda x: x.repeat_interleave(2, 4)[..., ::2], 'one number further': lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)}
SAME = dict(image=0, head=1, channel=2, row=3, column=4)      # axes along which one number stands for all: stride 0

@pytest.mark.parametrize('layout', [*LAYOUTS, *SAME])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['f32', 'f16'])
def test_layouts(on, layout, dtype):
    q, k, v = inputs(on, d=8, h=5, w=9, dtype=dtype)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    lay = LAYOUTS.get(layout) or (lambda x: x.narrow(SAME[layout], 0, 1).expand(x.shape))
    for args, g in (((lay(q), k, v), grad), ((q, lay(k), lay(v)), grad), ((lay(q), lay(k), lay(v)), grad), ((q, k, v), lay(grad))):
        got, _ = run(*args, 3, (1, 2), grad=g)
        want, _ = run(*(o.contiguous() for o in args), 3, (1, 2), grad=g.contiguous())
        for a, b in zip(got, want): assert torch.equal(a, b)

def test_inputs_are_not_changed(on):
    args = inputs(on)
    before = [o.clone() for o in args]
    run(*args, 3, 2)
    assert all(map(torch.equal, args, before))

# ---- numbers that are none

@types
def test_nan(on, dtype):
    "In a query: what it reads. In a key: all channels of those who look at it. In a value: one channel of these."
    for padding in (0., -inf, 1.):
        for i in range(3):
            args = inputs(on, b=1, d=2, h=7, w=18, dtype=dtype)
            args[i][0, 1, 0, 3, 1] = nan
            want = torch.zeros(args[0].shape, dtype=torch.bool)
            if i == 0: want[0, 1, :, 3, 1] = True
            else: want[0, 1, slice(None) if i == 1 else 0, 1:6:2, [[1], [3]]] = True
            assert torch.equal(native(*args, 3, 2, padding).isnan().cpu(), want)

def test_nan_in_a_gradient(on):
    args = inputs(on, b=1, d=2, h=7, w=18)
    grad = torch.ones_like(args[0])
    grad[0, 1, 0, 3, 8] = nan
    (_, *got), _ = run(*args, 3, 2, grad=grad)
    (_, *want), _ = run(*args, 3, 2, grad=grad, f=dilated_attn_eager)
    for a, b in zip(got, want): assert torch.equal(a.isnan(), b.isnan())

@pytest.mark.parametrize('bad', [inf, -inf])
def test_infinite(on, bad):
    "As in PyTorch: infinity minus infinity, and zero times it, are NaN."
    for i in range(3):
        args = inputs(on, b=1, d=2, h=5, w=18)
        args[i][0, 1, 0, 2, 8] = bad
        got, want = native(*args, 3, 1), dilated_attn_eager(*args, 3, 1)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())

# ---- again and again

@types
def test_repeatable(on, dtype):
    args = inputs(on, n=3, d=24, h=20, w=23, dtype=dtype)
    first, grad = run(*args, 3, (1, 2, 3))
    for _ in range(3):
        for a, b in zip(run(*args, 3, (1, 2, 3), grad=grad)[0], first): assert torch.equal(a, b)

def test_images_and_heads_are_apart(on):
    "The same bits alone as among others."
    q, k, v = inputs(on, b=3, n=4, d=8, h=9, w=20)
    out = native(q, k, v, 3, (1, 2))
    for b, n in ((0, 0), (2, 1), (1, 3)): assert torch.equal(out[b, n], native(*(o[b:b+1, n:n+1] for o in (q, k, v)), 3, 1 + n // 2)[0, 0])

# ---- derivatives

@pytest.mark.parametrize('padding', [0., -inf, -1.])
def test_gradcheck(on, padding):
    args = [o.requires_grad_() for o in inputs(on, b=1, d=2, h=3, w=4, dtype=torch.float64)]
    f = lambda *o: native(*o, 3, (1, 2), padding)
    assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)

@halves
def test_second_derivatives_of_halves(on, dtype):
    found = []
    for f in (native, lambda *o: dilated_attn_eager(*o[:3], *o[3:])):
        args = [o.float().to(torch.float32 if f is not native else dtype).requires_grad_() for o in inputs(on, dtype=dtype)]
        first = torch.autograd.grad(f(*args, 3, 1).float().square().sum(), args, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(o.float().square().sum() for o in first), args)])
    for a, b in zip(*found): assert_close(a.float(), b, rtol=.05, atol=.03 * b.abs().max().item())

def test_no_grad(on):
    args = [o.requires_grad_() for o in inputs(on)]
    with torch.no_grad(): a = native(*args)
    with torch.inference_mode(): b = native(*args)
    assert not a.requires_grad and not b.requires_grad and torch.equal(a, b) and native(*args).requires_grad

def test_transforms(on):
    "`torch.func`: the same as the eager form."
    q, k, v = inputs(on, dtype=torch.float64)
    def both(f):
        got = f(lambda *o: native(*o, 3, (1, 2)))
        with backend('eager'): want = f(lambda *o: dilated_attn(*o, 3, (1, 2)))
        for a, b in zip(got, want) if isinstance(got, tuple) else ((got, want),): assert_close(a, b)
    more = lambda x, dim=0: torch.stack([x, x * .9, x + .1], dim)
    both(lambda f: torch.func.vmap(lambda k: f(q, k, v))(more(k)))
    both(lambda f: torch.func.vmap(f, in_dims=(2, -1, 0), out_dims=1)(more(q, 2), more(k, -1), more(v)))
    both(lambda f: torch.func.vmap(torch.func.vmap(lambda q, v: f(q, k, v), in_dims=(0, None)), in_dims=(None, 0))(more(q), more(v)))
    both(lambda f: torch.func.grad(lambda *o: f(*o).square().sum(), argnums=(0, 1, 2))(q, k, v))
    both(lambda f: torch.func.vmap(torch.func.grad(lambda q, k: f(q, k, v).square().sum()))(more(q), more(k)))
    both(lambda f: torch.func.jvp(lambda q, v: f(q, k, v), (q, v), (q * 2, v)))

def test_gradient_through_vmap(on):
    def gradients(f):
        args = [torch.stack([o, o * .9]).requires_grad_() for o in inputs(on, dtype=torch.float64)]
        return torch.autograd.grad(torch.func.vmap(f)(*args).square().sum(), args)
    with backend('eager'): want = gradients(dilated_attn)
    for a, b in zip(gradients(native), want): assert_close(a, b)

# ---- PyTorch's other ways of running

def module(on, **kw):
    torch.manual_seed(0)
    return MultiDilatedAttention(12, 3, **kw).to(on)

@pytest.mark.parametrize('backend_', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_with_changing_sizes(on, backend_):
    "One graph without breaks for all sizes."
    m, graphs = module(on), []
    def count(g, args):
        graphs.append(g)
        return torch._dynamo.backends.registry.lookup_backend(backend_)(g, args)
    torch._dynamo.reset()
    traced = torch.compile(m, fullgraph=True, dynamic=True, backend=count)
    for b, h, w in ((2, 5, 7), (3, 8, 6), (2, 14, 9)):
        x = torch.randn(b, 12, h, w).to(on)
        with backend('native'):
            want, got = m(x), traced(x)
            a, b_ = (torch.autograd.grad(o.square().sum(), list(m.parameters())) for o in (got, want))
        assert_close(got, want, rtol=1e-4, atol=1e-4)
        for x, y in zip(a, b_): assert_close(x, y, rtol=1e-3, atol=1e-3)
    calls = [sum('deformlit.dilated_attn' in str(o.target) for o in g.graph.nodes) for g in graphs]
    assert calls[-1] == max(calls) == 1 and len(graphs) <= 2, 'one call for all dilations'

def test_compiled_op(on):
    torch._dynamo.reset()
    args = inputs(on)
    traced = torch.compile(lambda q, k, v: dilated_attn(q, k, v, 3, (1, 2)), fullgraph=True, backend='aot_eager')
    with backend('native'): assert torch.equal(traced(*args), native(*args, 3, (1, 2)))

def test_export(on):
    m, x = module(on).eval(), torch.randn(2, 12, 5, 7).to(on)
    h, w = torch.export.Dim('h', min=2), torch.export.Dim('w', min=2)
    with backend('native'), torch.no_grad():
        program = torch.export.export(m, (x,), dynamic_shapes=({2: h, 3: w},))
        assert str(program.graph).count('deformlit.dilated_attn.default') == 1
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for o in (x, torch.randn(2, 12, 9, 4).to(on)): assert_close(loaded(o), m(o), rtol=1e-5, atol=1e-5)

def test_module(on):
    "By native and by eager; nothing is copied on the way to the op."
    m, x, found = module(on), torch.randn(2, 12, 6, 9).to(on), {}
    q, k, v = m.maps(x)
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and k.stride()[3:] == (9, 1)
    for way in ('eager', 'native'):
        with backend(way): out = m(x)
        assert _dilated.ran == way
        found[way] = out, *torch.autograd.grad(out.square().sum(), list(m.parameters()))
    for a, b in zip(*found.values()): assert_close(a, b, rtol=1e-4, atol=1e-4)
    with backend('native'): assert torch.equal(copy.deepcopy(m)(x), m(x))

@halves
def test_autocast(on, dtype):
    m, x = module(on), torch.randn(2, 12, 6, 9).to(on)
    with backend('native'):
        want = m(x)
        with torch.autocast(torch.device(on).type, dtype): out = m(x)
        got = torch.autograd.grad(out.float().square().sum(), list(m.parameters()))
    assert out.dtype == dtype and all(o.dtype == torch.float32 and o.isfinite().all() for o in got)
    assert_close(out.float(), want, rtol=.05, atol=.05)

@pytest.mark.parametrize('layout', [None, 'slice of a qkv', 'channels last'])
@pytest.mark.parametrize('grad', [False, True])
def test_opcheck(on, layout, grad):
    for dtype in (torch.float32, torch.bfloat16):
        args = [(LAYOUTS[layout](o) if layout else o).detach().requires_grad_(grad) for o in inputs(on, dtype=dtype)]
        said = torch.library.opcheck(torch.ops.deformlit.dilated_attn.default, (*args, 3, [1, 2], 0., .5))
        assert set(said.values()) == {'SUCCESS'} and len(said) == 4
        said = torch.library.opcheck(torch.ops.deformlit.dilated_attn_backward.default, (torch.randn_like(args[0]).detach(), *(o.detach() for o in args), 3, [1, 2], 0., .5))
        assert set(said.values()) == {'SUCCESS'} and len(said) == 4

# ---- the raw op, called wrongly: raises, whatever comes

def test_wrong_calls(on):
    q, k, v = inputs(on)
    op, back = torch.ops.deformlit.dilated_attn, torch.ops.deformlit.dilated_attn_backward
    good = dict(q=q, k=k, v=v, kernel_size=3, dilations=[1, 2], padding=0., scale=1.)
    assert op(**good).shape == q.shape
    one = torch.rand(1, 1, 1, 1, 1).to(on)
    many = [one.expand(1, 1, 1, 2**16, 2**15), one.expand(1, 2**31, 1, 1, 1), one.expand(1, 1, 1, 1, 2**32 + 1)]
    bad = [dict(q=q[0]), dict(k=k[0]), dict(q=q[..., None]), dict(k=k[..., :4]), dict(v=v[:, :1]), dict(v=v[:1]), dict(q=q.double()), dict(k=k.half()), dict(v=v.long()), dict(q=q.long(), k=k.long(), v=v.long()),
        dict(q=q.to(torch.complex64), k=k.to(torch.complex64), v=v.to(torch.complex64)), dict(q=None), dict(v=None), dict(kernel_size=0), dict(kernel_size=-3), dict(kernel_size=4), dict(kernel_size=2**15 + 1), dict(kernel_size=2**33 + 1),
        dict(dilations=[]), dict(dilations=[0]), dict(dilations=[1, -1]), dict(dilations=[1, 2, 3]), dict(dilations=[1] * 4), dict(padding=inf), dict(padding=nan), *(dict(q=x, k=x, v=x, dilations=[1]) for x in many)]
    for i, o in enumerate(bad):
        for call in (lambda: op(**{**good, **o}), lambda: back(grad=torch.zeros_like(q), **{**good, **o})):
            try: call()
            except (RuntimeError, ValueError, TypeError): continue
            pytest.fail(f'call {i} with {list(o)} did not raise')
    for grad in (torch.zeros(2, 2, 3, 4, 4), torch.zeros(2, 2, 3, 20), torch.zeros_like(q).double(), torch.zeros_like(q).long(), torch.zeros(()), None):
        with pytest.raises((RuntimeError, ValueError, TypeError)): back(grad=None if grad is None else grad.to(on), **good)
    assert op(**good).shape == q.shape
