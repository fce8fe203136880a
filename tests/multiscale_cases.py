"""What the native op must do on every device. A module of tests imports these and has a fixture `on`: the device they run on."""
import copy, io, math
import pytest, torch, torch.utils.checkpoint
from torch import nn
from torch.testing import assert_close
from truth import *
from truth import nan, inf
from deformlit import multiscale
from deformlit.core import backend
from deformlit.multiscale import *
from deformlit.multiscale import _msda

LEAST = 3                                              # roundings that an error may have; the largest seen is 1.3
TYPES = dict(f32=torch.float32, f64=torch.float64, f16=torch.float16, bf16=torch.bfloat16)
types = pytest.mark.parametrize('dtype', TYPES.values(), ids=TYPES)
halves = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['f16', 'bf16'])

def inputs(on, b=2, shapes=((3, 5), (2, 2)), n=2, d=3, q=4, k=3, dtype=torch.float32, seed=0):
    "Value, shapes, points (a third outside) and weights."
    g, l, whole = torch.Generator().manual_seed(seed), len(shapes), torch.float64 if dtype == torch.float64 else torch.float32
    random = lambda f, *size: f(size, dtype=whole, generator=g)
    value, points, weights = random(torch.randn, b, sum(h * w for h, w in shapes), n, d), random(torch.rand, b, q, n, l, k, 2) * 1.6 - 0.3, random(torch.randn, b, q, n, l, k)
    return value.to(on, dtype), list(shapes), points.to(on), weights.to(on)

def flat(shapes): return [o for hw in shapes for o in hw]

def native(value, shapes, points, weights):
    "The output by way 'native'; asserts that it ran."
    with backend('native'): out = ms_deform_attn(value, shapes, points, weights)
    assert _msda.ran == 'native'
    return out

def run(value, shapes, points, weights, grad=None):
    "Output and gradients, and the output's gradient that they are for."
    args = [o.detach().requires_grad_() for o in (value, points, weights)]
    out = native(args[0], shapes, *args[1:])
    if grad is None: grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, args, grad)], grad

def exact(args, grad=None, fixed=False):
    """Output and gradients have the right type and no error beyond rounding, those to points left out where they jump. Returns the largest error.
    `fixed`: on a GPU the deterministic gradient to the values counts in steps, of which 2^61 make as much as all points of an image could add."""
    value, shapes, points, weights = args
    got, grad = run(*args, grad)
    skip, worst = near_kink(points, shapes), 0
    for i, (a, (b, size), like) in enumerate(zip(got, truth(*args, grad), (value, value, points, weights))):
        assert a.dtype == like.dtype and a.device.type == value.device.type
        a = a.cpu()
        if i == 2: a, b = (o.masked_fill(skip[..., None], 0) for o in (a, b))
        if i == 1 and fixed and size.numel(): size = size + 2 ** (math.ceil(math.log2(points[0, :, 0, 0, :, 0].numel() + 1)) - 58) / torch.finfo(points.dtype).eps * size.max()
        error = units(a, b, size, points.dtype)
        assert error <= LEAST, f"{('output', 'value', 'points', 'weights')[i]}: {error:.3g} roundings"
        worst = max(worst, error)
    return worst

# ---- values and gradients

@types
def test_precision(on, dtype):
    "Every type: points and sums in float32 (float64 for float64), one rounding at the end."
    for seed in range(2):
        for case in (dict(shapes=((17, 13), (8, 8)), n=3, d=32, q=41, k=4), dict(shapes=((9, 13),), d=70, q=23, k=8), dict(shapes=((1, 1), (2, 2)), d=16, q=20, k=4)):
            exact(inputs(on, dtype=dtype, seed=seed, **case))

@pytest.mark.parametrize('case', [dict(b=1, n=1, d=1, k=1, q=1), dict(b=3, q=7, n=5, k=1), dict(b=7, q=13), dict(b=1, q=127, n=1, d=2), dict(shapes=((1, 1),)), dict(shapes=((1, 7), (1, 1))),
    dict(shapes=((7, 1),), k=11), dict(shapes=((6, 1), (2, 3), (1, 1), (4, 4), (3, 2)), n=3, d=5), dict(n=1, d=8, k=17), dict(shapes=((2, 2),) * 13, k=1), dict(n=11, d=1)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['f32', 'f64', 'bf16'])
def test_sizes(on, case, dtype): exact(inputs(on, dtype=dtype, **case))

@types
def test_channels(on, dtype, request):
    "Any number of channels, multiple of a vector or not."
    for d in getattr(request.module, 'CHANNELS', range(1, 131)): exact(inputs(on, b=1, shapes=((3, 4),), n=2, d=d, q=5, k=2, dtype=dtype, seed=d))

@pytest.mark.parametrize('empty', [dict(q=0), dict(b=0), dict(k=0), dict(d=0), dict(n=0), dict(q=0, b=0), dict(k=0, q=0)], ids=str)
@types
def test_nothing_to_do(on, empty, dtype):
    args = inputs(on, **empty, dtype=dtype)
    got, _ = run(*args)
    assert got[0].shape == (args[0].shape[0], args[2].shape[1], args[0].shape[2] * args[0].shape[3])
    for g, o in zip(got, (got[0], args[0], *args[2:])): assert_close(g, torch.zeros_like(o))

def test_half_numbers(on):
    "Every float16 and bfloat16 number is read and written as it is: subnormal, infinite, NaN, both zeros."
    for dtype in (torch.float16, torch.bfloat16):
        value = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 256, 1, 256).to(on)
        points = ((torch.arange(256, device=on) + .5) / 256)[:, None].expand(-1, 2).clone()
        points[:, 1] = .5
        points = points.view(1, 256, 1, 1, 1, 2)
        read = native(value, [(1, 256)], points, torch.ones(1, 256, 1, 1, 1, device=on)).view(256, 256)
        a, b = read.cpu().view(256, 256), value.cpu().view(256, 256)
        after = torch.cat([b[1:], torch.zeros_like(b[:1])])                    # a centre's next pixel has share 0: it counts where it is not finite
        want = torch.where(after.isfinite(), b, torch.nan)
        assert torch.equal(a.nan_to_num(7.), want.nan_to_num(7.)) and torch.equal(a.isnan(), want.isnan())

# ---- layouts

def permuted(x, order):
    "`x` with its numbers laid out in another order of the axes."
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])

LAYOUTS = {
    'channels first': lambda v: permuted(v, [0, 2, 3, 1]), 'heads first': lambda v: permuted(v, [0, 2, 1, 3]), 'images last': lambda v: permuted(v, [1, 2, 3, 0]), 'pixels last': lambda v: permuted(v, [3, 2, 0, 1]),
    'slice of heads': lambda v: torch.cat([v, v + 1], 2)[:, :, :v.shape[2]], 'slice of pixels': lambda v: torch.cat([v + 1, v, v - 1], 1)[:, v.shape[1]:2*v.shape[1]],
    'part of the channels': lambda v: torch.cat([v + 1, v, v], 3)[..., v.shape[3]:2*v.shape[3]], 'every second channel': lambda v: v.repeat_interleave(2, 3)[..., ::2], 'every second image': lambda v: v.repeat_interleave(2, 0)[1::2],
    'one number further': lambda v: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape), 'slice of a qkv': lambda v: torch.stack([v + 1, v, v - 1], 2)[:, :, 1]}
SAME = {'image': 0, 'pixel': 1, 'head': 2, 'channel': 3}   # axes along which one number stands for all: stride 0

@pytest.mark.parametrize('layout', [*LAYOUTS, *SAME])
@pytest.mark.parametrize('d', [8, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['f32', 'f16'])
def test_layouts_of_values(on, layout, d, dtype):
    value, *rest = inputs(on, n=4, d=d, dtype=dtype)
    other = LAYOUTS[layout](value) if layout in LAYOUTS else value.narrow(SAME[layout], 0, 1).expand(value.shape)
    assert layout in SAME or torch.equal(other, value)
    exact((other, *rest))
    got, want = run(other, *rest)[0], run(other.clone(memory_format=torch.contiguous_format), *rest)[0]
    for a, b in zip(got, want): assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-5)

@pytest.mark.parametrize('layout', ['expanded', 'permuted', 'sliced', 'one number further'])
def test_layouts_of_the_rest(on, layout):
    value, shapes, points, weights = inputs(on, q=6, d=8)
    grad = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)).to(on)
    further = lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    def other(x):
        if layout == 'expanded': return x[:, :1].expand(x.shape)
        if layout == 'permuted': return permuted(x, [1, 0, *range(x.ndim - 1, 1, -1)])
        return x.repeat_interleave(2, -1)[..., ::2] if layout == 'sliced' else further(x)
    points, weights, grad = map(other, (points, weights, grad))
    assert layout == 'one number further' or not (points.is_contiguous() or weights.is_contiguous() or grad.is_contiguous())
    exact((value, shapes, points, weights), grad)
    exact((value, shapes, points, weights), grad[:1, :1, :1].expand(grad.shape))

def test_inputs_are_not_changed(on):
    value, shapes, points, weights = inputs(on)
    grad = torch.randn(2, 4, 6).to(on)
    tensors = value, points, weights, grad
    before, versions = [o.clone() for o in tensors], [o._version for o in tensors]
    run(value, shapes, points, weights, grad)
    for a, b, version in zip(tensors, before, versions): assert torch.equal(a, b) and a._version == version

def test_results_are_fresh(on):
    "No result shares memory with another or with an input."
    args = inputs(on)
    got, grad = run(*args)
    places = [o.untyped_storage().data_ptr() for o in (*got, grad, args[0], *args[2:])]
    assert len(set(places)) == len(places) and all(o.is_contiguous() for o in got)

# ---- numbers that are none

@types
@pytest.mark.parametrize('d', [8, 3])
def test_nan_in_a_point(on, dtype, d):
    "Its own head's reading is NaN, and its own gradients; no other reading, and no gradient to a value."
    value, shapes, points, weights = inputs(on, dtype=dtype, d=d)
    for xy in (0, 1):
        p = points.clone()
        p[1, 2, 1, 0, 2, xy] = nan
        (out, to_value, to_points, to_weights), _ = run(value, shapes, p, weights)
        want = torch.zeros(2, 4, 2, d, dtype=torch.bool)
        want[1, 2, 1] = True
        assert torch.equal(out.cpu().isnan(), want.flatten(2)) and to_value.isfinite().all()
        assert to_weights.isnan().sum() == 1 and to_weights[1, 2, 1, 0, 2].isnan() and set(map(tuple, to_points.isnan().nonzero()[:, :5].tolist())) == {(1, 2, 1, 0, 2)}
        clean, _ = run(value, shapes, p.nan_to_num(-9.), weights)              # as if it were outside
        keep = ~want.flatten(2)
        assert torch.equal(out.cpu()[keep], clean[0].cpu()[keep])
        assert_close(to_value, clean[1], rtol=1e-6 if dtype in (torch.float32, torch.float64) else .01, atol=1e-5)

@pytest.mark.parametrize('far', [inf, -inf, 1e6, -1e6, 1e30, 3e38, -3e38, 2**31, -2.**63, 1e300])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['f32', 'f64'])
def test_far_points(on, far, dtype):
    "Infinite or merely far: zeros, with zero gradients."
    value, shapes, points, weights = inputs(on, dtype=dtype)
    if far == 1e300: far = torch.finfo(dtype).max
    points[:, ::2, ..., 0], points[:, :1, ..., 1] = far, -far
    (out, to_value, to_points, to_weights), grad = run(value, shapes, points, weights)
    assert (out[:, ::2] == 0).all() and (to_points[:, ::2] == 0).all() and (to_weights[:, ::2] == 0).all() and to_value.isfinite().all()
    near = run(value, shapes, points[:, 1::2], weights[:, 1::2], grad[:, 1::2])[0]
    for a, b in zip((out[:, 1::2], to_value, to_points[:, 1::2], to_weights[:, 1::2]), near): assert_close(a, b)

@pytest.mark.parametrize('bad', [nan, inf, -inf])
@types
def test_bad_pixel(on, bad, dtype):
    "It reaches the points that lie within a pixel of it, and nothing else: what is outside reads a row of zeros, not another pixel."
    shapes, at = [(4, 4), (3, 3)], 5                                          # row 1, column 1 of the first level
    value = torch.randn(1, 25, 1, 4, generator=torch.Generator().manual_seed(0)).to(on, dtype)
    value[0, at] = bad
    g = torch.Generator().manual_seed(1)
    points = (torch.rand(1, 400, 1, 2, 1, 2, generator=g) * 1.8 - .4).to(on, torch.float64 if dtype == torch.float64 else torch.float32)
    weights = torch.randn(1, 400, 1, 2, 1, generator=g).to(points)
    near = ((points[0, :, 0, 0, 0] * 4 - 1.5).abs() < 1).all(-1)
    out, to_value, to_points, to_weights = run(value, shapes, points, weights)[0]
    assert near.sum() > 10 and torch.equal(~out.isfinite().all(-1)[0], near)
    assert torch.equal(~to_weights[0, :, 0, 0, 0].isfinite(), near) and to_weights[0, :, 0, 1].isfinite().all() and to_value.isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_bad_weight_and_gradient(on, dtype):
    "They reach what they multiply: the reading of the head, the four pixels, the point."
    value, shapes, points, weights = inputs(on, dtype=dtype)
    points = points * 0 + .4
    w = weights.clone()
    w[0, 1, 1, 0, 2] = nan
    out, to_value, to_points, to_weights = run(value, shapes, points, w)[0]
    assert out.isnan().sum() == 3 and to_weights.isfinite().all() and to_points.isnan().sum() == 2
    assert to_value.isnan().any(-1).sum() == 4 and to_value[1].isfinite().all() and to_value[:, :, 0].isfinite().all()
    grad = torch.ones(2, 4, 6, dtype=dtype, device=value.device)
    grad[0, 1, 3:] = nan
    out, to_value, to_points, to_weights = run(value, shapes, points, weights, grad)[0]
    assert to_weights.isnan().sum() == 6 and to_points.isnan().sum() == 12 and to_value[1].isfinite().all() and to_value[:, :, 0].isfinite().all()

# ---- the same each time

def repeats(args, times):
    "With `torch.use_deterministic_algorithms`, run after run gives the same bits."
    torch.use_deterministic_algorithms(True)
    try:
        first, grad = run(*args)
        for _ in range(times):
            for a, b in zip(run(*args, grad)[0], first): assert torch.equal(a, b)
        exact(args, fixed=True)
    finally: torch.use_deterministic_algorithms(False)

@types
def test_repeatable_when_asked(on, dtype):
    "The same bits, and no larger error."
    repeats(inputs(on, b=1, shapes=((5, 7), (2, 2)), q=200, k=4, n=2, d=16, dtype=dtype), 3)

# ---- differentiation

def small(on):
    value, shapes, points, weights = inputs(on, b=1, shapes=((2, 3), (1, 2)), n=2, d=2, q=2, k=2, dtype=torch.float64, seed=3)
    assert not near_kink(points, shapes, 1e12).any()                           # no coordinate within 2e-4 of a pixel's centre
    return [o.requires_grad_() for o in (value, points, weights)], shapes

def test_gradcheck(on):
    args, shapes = small(on)
    f = lambda v, p, w: native(v, shapes, p, w)
    assert torch.autograd.gradcheck(f, args, nondet_tol=1e-12) and torch.autograd.gradgradcheck(f, args, nondet_tol=1e-12)   # on a GPU sums have no order
    for i in range(3):                                                          # one gradient at a time
        one = [o.detach().requires_grad_(i == j) for j, o in enumerate(args)]
        assert torch.autograd.gradcheck(f, one, nondet_tol=1e-12) and torch.autograd.gradgradcheck(f, one, nondet_tol=1e-12)

def test_gradcheck_of_layouts(on):
    (v, p, w), shapes = small(on)
    f = lambda v, p, w: native(v.transpose(1, 2), shapes, p.flip(1), w.expand(1, 2, 2, 2, 2))
    assert torch.autograd.gradcheck(f, (v.detach().transpose(1, 2).contiguous().requires_grad_(), p, w.detach()[:, :1].clone().requires_grad_()), nondet_tol=1e-12)

@halves
def test_second_gradient_of_halves(on, dtype):
    "Through the eager form, each in its own type."
    found = []
    for f in (native, ms_deform_attn):
        value, shapes, points, weights = inputs(on, dtype=dtype)
        args = [o.requires_grad_() for o in (value, points, weights)]
        with backend('native' if f is native else 'eager'): out = f(value, shapes, points, weights)
        first = torch.autograd.grad(out.float().square().sum(), args, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(o.float().square().sum() for o in first), args)])
    for a, b in zip(*found):
        assert a.dtype == b.dtype and a.isfinite().all()
        assert_close(a.float(), b.float(), rtol=.05, atol=.02 * b.abs().max().item())

def test_checkpoint(on):
    args, shapes = small(on)
    f = lambda v, p, w: native(v, shapes, p, w)
    a = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False).sum(), args)
    assert_close(a, torch.autograd.grad(f(*args).sum(), args))

def test_no_grad(on):
    (v, p, w), shapes = small(on)
    with torch.no_grad(): a = native(v, shapes, p, w)
    with torch.inference_mode(): b = native(v, shapes, p, w)
    assert not a.requires_grad and not b.requires_grad and torch.equal(a, b)
    assert native(v, shapes, p, w).requires_grad and not native(*(o.detach() if isinstance(o, torch.Tensor) else o for o in (v, shapes, p, w))).requires_grad

def test_transforms(on):
    "`torch.func`: the same as the eager form."
    value, shapes, points, weights = inputs(on, dtype=torch.float64)
    def both(f):
        got = f(native)
        with backend('eager'): want = f(ms_deform_attn)
        for a, b in zip(got, want) if isinstance(got, tuple) else ((got, want),): assert_close(a, b)
    more = lambda x, dim=0: torch.stack([x, x * .9, x + .1], dim)
    both(lambda f: torch.func.vmap(lambda v: f(v, shapes, points, weights))(more(value)))
    both(lambda f: torch.func.vmap(lambda v, p, w: f(v, shapes, p, w), in_dims=(2, 3, 1), out_dims=1)(more(value, 2), more(points, 3), more(weights, 1)))
    both(lambda f: torch.func.vmap(lambda p: f(value, shapes, p, weights), in_dims=-1)(more(points, -1)))
    both(lambda f: torch.func.vmap(torch.func.vmap(lambda v, w: f(v, shapes, points, w), in_dims=(0, None)), in_dims=(None, 0))(more(value), more(weights)))
    both(lambda f: torch.func.grad(lambda v, p, w: f(v, shapes, p, w).square().sum(), argnums=(0, 1, 2))(value, points, weights))
    both(lambda f: torch.func.vmap(torch.func.grad(lambda w, v: f(v, shapes, points, w).square().sum()))(more(weights), more(value)))
    both(lambda f: torch.func.jacrev(lambda w: f(value[:1, :, :1], shapes, points[:1, :2, :1], w))(weights[:1, :2, :1]))
    both(lambda f: torch.func.jacfwd(lambda w: f(value[:1, :, :1], shapes, points[:1, :2, :1], w))(weights[:1, :2, :1]))
    both(lambda f: torch.func.jvp(lambda v, p: f(v, shapes, p, weights), (value, points), (value * 2, points)))

def test_gradient_through_vmap(on):
    value, shapes, points, weights = inputs(on, dtype=torch.float64)
    def gradients(f):
        args = [torch.stack([o, o * .9]).requires_grad_() for o in (value, points, weights)]
        return torch.autograd.grad(torch.func.vmap(lambda v, p, w: f(v, shapes, p, w))(*args).square().sum(), args)
    with backend('eager'): want = gradients(ms_deform_attn)
    for a, b in zip(gradients(native), want): assert_close(a, b)

# ---- PyTorch's other ways of running

class Module(nn.Module):
    def __init__(self, shapes): super().__init__(); self.shapes = shapes
    def forward(self, value, points, weights): return ms_deform_attn(value, self.shapes, points, weights)

def module(on, **kw):
    torch.manual_seed(0)
    m = MSDeformAttn(**{**dict(dim=12, num_heads=3, num_levels=2, num_points=2), **kw})
    for p in m.parameters(): nn.init.normal_(p, std=.3)
    return m.to(on)

def module_args(on, b=2, q=4, shapes=((3, 5), (2, 2))):
    g = torch.Generator().manual_seed(b + q)
    r = lambda f, *size: f(size, generator=g).to(on)
    return r(torch.randn, b, q, 12), r(torch.rand, b, q, 2, 2), r(torch.randn, b, sum(h * w for h, w in shapes), 12), list(shapes)

@pytest.mark.parametrize('backend_', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_with_changing_sizes(on, backend_):
    "One graph without breaks for all sizes: of images, queries, pixels."
    m, graphs = module(on), []
    def count(g, args):
        graphs.append(g)
        return torch._dynamo.backends.registry.lookup_backend(backend_)(g, args)
    torch._dynamo.reset()
    traced = torch.compile(m, fullgraph=True, dynamic=True, backend=count)
    for b, q, shapes in ((2, 4, ((3, 5), (2, 2))), (3, 7, ((3, 5), (2, 2))), (5, 2, ((6, 4), (3, 7))), (2, 9, ((4, 4), (5, 6)))):
        args = module_args(on, b, q, shapes)
        with backend('native'):
            want, got = m(*args), traced(*args)
            assert_close(got, want, rtol=1e-4, atol=1e-4)
            a, b_ = (torch.autograd.grad(o.square().sum(), list(m.parameters())) for o in (got, want))
        for x, y in zip(a, b_): assert_close(x, y, rtol=1e-3, atol=1e-3)
    ops = [str(o.target) for g in graphs for o in g.graph.nodes if o.op == 'call_function']
    assert any('deformlit.ms_deform_attn' in o for o in ops) and len(graphs) <= 2

def test_compiled_op(on):
    value, shapes, points, weights = inputs(on)
    torch._dynamo.reset()
    traced = torch.compile(Module(shapes), fullgraph=True, backend='aot_eager')
    with backend('native'): out = traced(value, points, weights)
    assert torch.equal(out, native(value, shapes, points, weights))

def test_export(on):
    "The op and the module, with a changing number of queries; saved and loaded."
    dim = torch.export.Dim('q', min=2, max=1000)
    for m, args, dims, other in ((Module([(3, 5), (2, 2)]).to(on), inputs(on)[::2] + inputs(on)[3:], (None, {1: dim}, {1: dim}), (lambda a: (a[0], a[2], a[3]))(inputs(on, q=9))),
                                 (module(on), module_args(on), ({1: dim}, {1: dim}, None, [(None, None)] * 2), module_args(on, q=9))):
        with backend('native'), torch.no_grad():
            program = torch.export.export(m, tuple(args), dynamic_shapes=dims)
            assert 'deformlit.ms_deform_attn.default' in str(program.graph)
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            loaded = torch.export.load(file).module()
            for a in (args, other): assert_close(loaded(*a), m(*a), rtol=1e-5, atol=1e-5)

def test_copied_and_pickled(on):
    m, args = module(on), module_args(on)
    with backend('native'): assert torch.equal(copy.deepcopy(m)(*args), m(*args))

def test_module(on):
    "The module by native is the module by eager, gradients included; a mask, boxes."
    m, args = module(on), module_args(on)
    mask = torch.zeros(2, 19, dtype=torch.bool, device=on)
    mask[:, 3:6] = True
    found = {}
    for way in ('eager', 'native'):
        with backend(way):
            out = m(*args, mask)
            assert _msda.ran == way
            found[way] = out, *torch.autograd.grad(out.square().sum(), list(m.parameters()))
    for a, b in zip(*found.values()): assert_close(a, b, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('layout', ['contiguous', 'permuted', 'expanded'])
@pytest.mark.parametrize('grad', [False, True])
def test_opcheck(on, layout, grad):
    value, shapes, points, weights = inputs(on)
    if layout == 'permuted': value, points, weights = permuted(value, [0, 2, 3, 1]), permuted(points, [1, 0, 5, 2, 3, 4]), permuted(weights, [4, 3, 2, 1, 0])
    if layout == 'expanded': value, points, weights = value[:1].expand(2, -1, -1, -1), points[:, :1].expand(-1, 4, -1, -1, -1, -1), weights[:, :, :1].expand(-1, -1, 2, -1, -1)
    if grad: value, points, weights = (o.requires_grad_() for o in (value, points, weights))
    for dtype in (torch.float32, torch.bfloat16):
        v = value.detach().to(dtype).requires_grad_(grad)
        said = torch.library.opcheck(torch.ops.deformlit.ms_deform_attn.default, (v, flat(shapes), points, weights))
        assert set(said.values()) == {'SUCCESS'} and len(said) == 4
    out = torch.randn(2, 4, 6).to(value)
    said = torch.library.opcheck(torch.ops.deformlit.ms_deform_attn_backward.default, (out, *(o.detach() if isinstance(o, torch.Tensor) else o for o in (value, flat(shapes), points, weights)), True))
    assert set(said.values()) == {'SUCCESS'} and len(said) == 4

@halves
def test_autocast(on, dtype):
    "Of the module: points and weights stay in float32, values are read in half precision."
    m, args, kind = module(on), module_args(on), torch.device(on).type
    with backend('native'):
        want = m(*args)
        with torch.autocast(kind, dtype):
            out = m(*args)
            assert out.dtype == dtype and m.look(args[0], args[1], args[3])[0].dtype == torch.float32
        got = torch.autograd.grad(out.float().square().sum(), list(m.parameters()))
    assert _msda.ran == 'native'
    assert_close(out.float(), want, rtol=.05, atol=.3)
    assert all(o.dtype == torch.float32 and o.isfinite().all() for o in got)

def test_autocast_of_the_op(on):
    "It changes nothing: each type is what the caller gave."
    value, shapes, points, weights = inputs(on)
    for v in (value, value.bfloat16()):
        want = native(v, shapes, points, weights)
        with torch.autocast(torch.device(on).type, torch.bfloat16): assert torch.equal(native(v, shapes, points, weights), want)

@pytest.mark.parametrize('types', [(torch.float16, torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16, torch.float32), (torch.float32, torch.float64, torch.float32), (torch.float32, torch.float16, torch.bfloat16)], ids=str)
def test_mixed_types(on, types):
    "The public function widens points and weights for the kernel; gradients come back in each one's own type."
    value, shapes, points, weights = inputs(on)
    args = [o.to(t).requires_grad_() for o, t in zip((value, points, weights), types)]
    out = native(args[0], shapes, *args[1:])
    grads = torch.autograd.grad(out.float().sum(), args)
    assert out.dtype == types[0] and tuple(o.dtype for o in grads) == types
    whole = torch.float64 if torch.float64 in types else torch.float32
    want, = truth(args[0], shapes, args[1], args[2])
    assert units(out, *want, whole if types[0] != torch.float32 else torch.float32) <= LEAST

# ---- the raw op, called wrongly: raises, whatever comes

def wrong_calls(on):
    f = lambda *size, dtype=torch.float32: torch.rand(*size).to(on, dtype)
    good = dict(value=f(2, 19, 2, 3), sizes=[3, 5, 2, 2], points=f(2, 4, 2, 2, 3, 2), weights=f(2, 4, 2, 2, 3))
    one = torch.rand(1, 1, 1, 4).to(on)
    bad = [dict(value=good['value'][0]), dict(value=good['value'][..., None]), dict(value=f(2, 19, 3, 3)), dict(value=f(1, 19, 2, 3)), dict(value=f(2, 18, 2, 3)), dict(value=f(0, 19, 2, 3)),
        dict(value=f(2, 0, 2, 3)), dict(value=f(())), dict(value=good['value'].double()), dict(value=good['value'].long()), dict(value=good['value'].bool()), dict(value=good['value'].to(torch.complex64)),
        dict(value=good['value'].to(torch.float8_e4m3fn)), dict(value=good['value'].expand(2, 19, 2, 3)[:, :, :1].expand(2, 19, 2**32 + 2, 3)), dict(value=None),
        dict(sizes=[]), dict(sizes=[3]), dict(sizes=[3, 5, 2]), dict(sizes=[3, 5]), dict(sizes=[3, 5, 2, 3]), dict(sizes=[3, 5, 2, 2, 1, 1]), dict(sizes=[-3, -5, 2, 2]), dict(sizes=[3, 5, -2, -2]), dict(sizes=[19, 1, 0, 0]),
        dict(sizes=[2**62, 4, 3, 5]), dict(sizes=[2**32, 2**32, 4, 1]), dict(sizes=[2**31, 1, 2, 2]), dict(sizes=[1, 2**63 - 1, 2, 2]), dict(sizes=[3, 5, 2**63 - 1, 2]), dict(sizes=[2**31 + 3, 5, 2, 2]),
        dict(points=good['points'][0]), dict(points=good['points'][..., :1]), dict(points=f(2, 4, 2, 2, 3, 3)), dict(points=f(2, 4, 3, 2, 3, 2)), dict(points=f(2, 4, 2, 3, 3, 2)), dict(points=f(2, 5, 2, 2, 3, 2)),
        dict(points=f(2, 4, 2, 2, 4, 2)), dict(points=f(2, 0, 2, 2, 3, 2)), dict(points=good['points'].double()), dict(points=good['points'].half()), dict(points=good['points'].long()), dict(points=f(3, 4, 2, 2, 3, 2)), dict(points=None),
        dict(weights=good['weights'][0]), dict(weights=good['weights'][..., None]), dict(weights=f(2, 4, 2, 2, 4)), dict(weights=f(2, 4, 2, 3, 3)), dict(weights=f(1, 4, 2, 2, 3)), dict(weights=f(2, 3, 2, 2, 3)),
        dict(weights=good['weights'].double()), dict(weights=good['weights'].half()), dict(weights=good['weights'].bool()), dict(weights=None),
        # sizes that 32 bits cannot count, of tensors where one number stands for all
        dict(value=one.expand(1, 2**31, 1, 4), sizes=[2**16, 2**15], points=f(1, 1, 1, 1, 1, 2), weights=f(1, 1, 1, 1, 1)), dict(value=one.expand(1, 2**31, 1, 4), sizes=[2**31, 1], points=f(1, 1, 1, 1, 1, 2), weights=f(1, 1, 1, 1, 1)),
        dict(value=one.expand(1, 2**30, 1, 4), sizes=[1, 2**30], points=f(1, 1, 1, 1, 1, 2), weights=f(1, 1, 1, 1, 1)), dict(value=one.expand(1, 2**32 + 1, 1, 4), sizes=[1, 1], points=f(1, 1, 1, 1, 1, 2), weights=f(1, 1, 1, 1, 1)),
        dict(value=one.expand(1, 1, 2**32 + 1, 4), sizes=[1, 1], points=f(1, 1, 1, 1, 1, 2), weights=f(1, 1, 1, 1, 1)), dict(value=one, sizes=[1, 1], points=one[..., :2, None, None].view(1, 1, 1, 1, 1, 2).expand(1, 1, 1, 1, 2**30, 2), weights=f(1, 1, 1, 1, 1).expand(1, 1, 1, 1, 2**30)),
        dict(value=one, sizes=[1, 1], points=one[..., :2].view(1, 1, 1, 1, 1, 2).expand(1, 1, 1, 1, 2**32 + 1, 2), weights=f(1, 1, 1, 1, 1))]
    return [{**good, **o} for o in bad], good

def test_wrong_calls(on):
    bad, good = wrong_calls(on)
    op, back = torch.ops.deformlit.ms_deform_attn, torch.ops.deformlit.ms_deform_attn_backward
    assert op(**good).shape == (2, 4, 6)
    for i, o in enumerate(bad):
        for call in (lambda: op(**o), lambda: back(grad=torch.zeros(2, 4, 6).to(on), **o, deterministic=False)):
            try: call()
            except (RuntimeError, ValueError, TypeError): continue
            pytest.fail(f'call {i} with {[k for k in o if o[k] is not good[k]]} did not raise')
    for grad in (torch.zeros(2, 4, 5), torch.zeros(2, 3, 6), torch.zeros(1, 4, 6), torch.zeros(2, 4, 2, 3), torch.zeros(2, 4, 6).double(), torch.zeros(2, 4, 6).half(), torch.zeros(2, 4, 6).long(), torch.zeros(()), None):
        with pytest.raises((RuntimeError, ValueError, TypeError)): back(grad=None if grad is None else grad.to(on), **good, deterministic=True)
    assert op(**good).shape == (2, 4, 6)

@pytest.mark.parametrize('shapes', [[(1, 2**30 - 1)], [(2**30 - 1, 1)], [(2**16 - 2, 2**15)], [(2**15, 2**16 - 2)]], ids=str)
def test_most_pixels(on, shapes):
    "Nearly 2^31 pixels, all the same one: the arithmetic of rows holds."
    value = torch.arange(1, 5.).to(on).view(1, 1, 1, 4).expand(1, shapes[0][0] * shapes[0][1], 1, 4)
    at = [(.5, .5), (0., 0.), (1., 1.), (-.1, .5), (1.1, .5), (.5, -.1), (.5, 1.1), (1e30, -1e30), (.999, .999), (.001, .999)]
    points, weights = torch.tensor(at, device=on).view(1, -1, 1, 1, 1, 2), torch.ones(1, len(at), 1, 1, 1, device=on)
    out = native(value, shapes, points, weights).cpu()[0] / torch.arange(1, 5.)
    assert_close(out, out[:, :1].expand(-1, 4)) and (out[[0, 8, 9]] == 1).all() and (out[3:8] == 0).all()
