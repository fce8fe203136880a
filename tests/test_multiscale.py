"""Multi-scale deformable attention: every way against the loop and against the official code's numbers; bad input; tracing."""
import contextlib, json, os, timeit
from pathlib import Path
import pytest, torch
from torch import nn
from truth import need_native
from deformlit import core, multiscale
from deformlit.core import ArgumentError, BackendError, assert_close, backend, debug, needs_compiler
from deformlit.multiscale import *

golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).resolve().parents[1].parent/'shared'/'golden'/'A'))
compiled = pytest.param('compiled', marks=[pytest.mark.slow, pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))])
ways = pytest.mark.parametrize('way', ['loop', 'eager', 'bags', compiled, 'native'])

@contextlib.contextmanager
def by(way):
    "Run by `way`; 'eager' is here the grid form, 'bags' the other eager form. Asserts that it ran, if the op did. Skips, saying so, what needs a compiler where there is none."
    if way == 'native': need_native()
    pay, multiscale._rows_pay, multiscale._msda.ran = multiscale._rows_pay, lambda *args: way == 'bags', None
    name = 'eager' if way == 'bags' else way
    try:
        with backend(name): yield
    finally: multiscale._rows_pay = pay
    assert multiscale._msda.ran in (name, None)

def inputs(b=2, shapes=((3, 5), (2, 2)), n=2, d=3, q=4, k=3, dtype=torch.float64, seed=0):
    "Value, shapes, points (a third outside) and weights."
    g, l = torch.Generator().manual_seed(seed), len(shapes)
    value = torch.randn(b, sum(h*w for h, w in shapes), n, d, dtype=dtype, generator=g)
    points = torch.rand(b, q, n, l, k, 2, dtype=dtype, generator=g) * 1.6 - 0.3
    return value, list(shapes), points, torch.randn(b, q, n, l, k, dtype=dtype, generator=g)

def run(way, value, shapes, points, weights, mix=None):
    "Output and gradients by `way`; asserts that it ran."
    args = [o.detach().requires_grad_() for o in (value, points, weights)]
    with by(way): out = ms_deform_attn(args[0], shapes, *args[1:])
    assert multiscale._msda.ran == ('eager' if way == 'bags' else way)
    if mix is None: mix = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    return out, *torch.autograd.grad((out * mix).sum(), args)

def agree(way, *args, **kw):
    got, want = run(way, *args), run('loop', *args)
    for a, b in zip(got, want): assert_close(a, b, **kw)
    return got

others = pytest.mark.parametrize('way', ['eager', 'bags', compiled, 'native'])

# ---- all ways agree

@others
@pytest.mark.parametrize('case', [dict(), dict(b=1, n=1, d=1, k=1, q=1), dict(shapes=((1, 1),)), dict(shapes=((1, 7), (1, 1))), dict(shapes=((6, 1), (2, 3), (1, 1), (4, 4)), n=3, d=5),
                                  dict(b=3, q=7, k=1), dict(n=1, d=8, k=5)], ids=str)
def test_sizes(way, case):
    out, *_ = agree(way, *inputs(**case))
    args = inputs(**case)
    assert out.shape == (args[0].shape[0], args[2].shape[1], args[0].shape[2] * args[0].shape[3])

@others
@pytest.mark.parametrize('q, b', [(0, 2), (3, 0)])
def test_nothing_to_do(way, q, b):
    value, shapes, points, weights = inputs(q=q, b=b)
    args = [o.requires_grad_() for o in (value, points, weights)]
    with by(way): out = ms_deform_attn(value, shapes, points, weights)
    assert multiscale._msda.ran and out.shape == (b, q, 6)
    for g, o in zip(torch.autograd.grad(out.sum(), args), args): assert_close(g, torch.zeros_like(o))

@others
def test_places(way):
    "Far outside, exactly on borders and corners, on pixel centres of both levels: values and gradients."
    value, shapes, _, _ = inputs(b=1, shapes=((4, 4), (2, 2)), n=1)
    at = [-9., -1., -0.5, -1/8, 0., 1/8, 1/4, 3/8, 0.5, 5/8, 3/4, 7/8, 1., 9/8, 1.5, 2., 9.]
    points = torch.tensor([(x, y) for x in at for y in at], dtype=torch.float64)[None, :, None, None, None].expand(1, -1, 1, 2, 1, 2)
    agree(way, value, shapes, points, torch.ones(points.shape[:-1], dtype=torch.float64))

@ways
def test_centres_read_pixels(way):
    value, shapes, _, _ = inputs(b=1, shapes=((3, 4),), n=1, d=2)
    centres = torch.tensor([((j + .5)/4, (i + .5)/3) for i in range(3) for j in range(4)], dtype=torch.float64)
    out, *_ = run(way, value, shapes, centres[None, :, None, None, None], torch.ones(1, 12, 1, 1, 1, dtype=torch.float64))
    assert_close(out, value[:, :, 0])

@others
def test_strides(way):
    "Views of other layouts: channels first, a slice of heads, expanded points and weights."
    value, shapes, points, weights = inputs(n=4)
    value = value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :, ::2]
    points, weights = points[:, :1, :2].expand(-1, 5, -1, -1, -1, -1), weights[:, :1, 1:3].expand(-1, 5, -1, -1, -1)
    assert not value.is_contiguous() and not points.is_contiguous()
    agree(way, value, shapes, points, weights)

@others
def test_float32(way):
    args = inputs(dtype=torch.float32)
    got = run(way, *args)
    want = run('loop', args[0].double(), args[1], args[2].double(), args[3].double(), mix=torch.randn(got[0].shape, generator=torch.Generator().manual_seed(9)).double())
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, rtol=1e-5, atol=1e-5)

@others
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half(way, dtype):
    "Half values with float32 points are read in float32 and rounded once."
    value, shapes, points, weights = inputs(dtype=torch.float32)
    with by(way): out = ms_deform_attn(value.to(dtype), shapes, points, weights)
    with backend('loop'): want = ms_deform_attn(value.to(dtype).double(), shapes, points, weights)
    assert out.dtype == dtype and want.dtype == torch.float64
    assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)

@others
def test_some_gradients(way):
    "Only those asked for."
    value, shapes, points, weights = inputs()
    for i in range(3):
        args = [o.detach().requires_grad_(i == j) for j, o in enumerate((value, points, weights))]
        with by(way): got, = torch.autograd.grad(ms_deform_attn(args[0], shapes, *args[1:]).sum(), args[i])
        with backend('loop'): want, = torch.autograd.grad(ms_deform_attn(args[0], shapes, *args[1:]).sum(), args[i])
        assert_close(got, want)

@ways
def test_gradcheck(way):
    value, shapes, points, weights = inputs(b=1, shapes=((2, 3), (1, 2)), n=1, d=2, q=2, k=1)
    with by(way): assert torch.autograd.gradcheck(lambda v, p, w: ms_deform_attn(v, shapes, p, w), [o.requires_grad_() for o in (value, points, weights)])
    assert multiscale._msda.ran

@others
def test_gradgradcheck(way):
    value, shapes, points, weights = inputs(b=1, shapes=((2, 3), (1, 2)), n=1, d=2, q=2, k=1)
    with by(way): assert torch.autograd.gradgradcheck(lambda v, p, w: ms_deform_attn(v, shapes, p, w), [o.requires_grad_() for o in (value, points, weights)])

def test_compiled_without_compiling():
    "The arithmetic of the compiled way, run plainly, is the loop's, gradients by hand included."
    value, shapes, points, weights = inputs(n=3, d=4)
    want, to_value, to_points, to_weights = run('loop', value, shapes, points, weights)
    table, flat = multiscale._flat(value, shapes, points, weights)
    numbers, shares = multiscale._bags(*flat)
    assert_close(multiscale._read(table, numbers, shares).view(want.shape), want)
    mix = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9)).view(-1, 4)
    assert_close(multiscale._scatter(table, numbers, shares, mix).view(value.shape), to_value)
    got = multiscale._slopes(*flat, multiscale._gather_dots(table, numbers, mix))
    assert_close(got[0].view(points.shape), to_points); assert_close(got[1].view(weights.shape), to_weights)

@others
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_nan_shows(way, bad):
    "A point that is NaN makes its own head's reading NaN and no other; the loop refuses it. An infinite one does the same, but in the native way, where it lies outside like any that is far."
    value, shapes, points, weights = inputs()
    points[1, 2, 1, 0, 0, 0] = bad
    with by(way): out = ms_deform_attn(value, shapes, points, weights)
    want = torch.zeros(2, 4, 2, 3, dtype=torch.bool)
    want[1, 2, 1] = way != 'native' or bad != bad
    assert (out.isnan() == want.flatten(2)).all()
    with by('loop'), pytest.raises(ArgumentError, match='finite'): ms_deform_attn(value, shapes, points, weights)

@pytest.fixture
def op(monkeypatch):
    "The op with a native way that only counts; ways, answers and measured orders are put back afterwards."
    op, calls = multiscale._msda, []
    for o in ('ways', 'needs', 'fits', 'known'): monkeypatch.setattr(op, o, dict(getattr(op, o)))
    def native(value, shapes, points, weights):
        calls.append((value.dtype, points.dtype, weights.dtype))
        return ms_deform_attn_loop(value.to(points.dtype), shapes, points, weights).to(value.dtype)
    op.way('native')(native)
    op.calls = calls
    yield op
    del op.calls
    core._choices.cache_clear(); multiscale._order.cache_clear()

def test_choice(op):
    "Native if it can, else eager; compiled only when asked, and refused with the reason where there is no compiler."
    args = inputs()
    ms_deform_attn(*args)
    assert op.ran == 'native'
    op.way('native', needs=lambda: 'not built')(op.ways['native'])
    op.way('compiled', needs=lambda: 'no C++ compiler')(op.ways['compiled'])
    with pytest.warns(core.BackendWarning) if ('ms_deform_attn', 'eager') not in core._said else contextlib.nullcontext(): ms_deform_attn(*args)
    assert op.ran == 'eager'
    with backend('compiled'), pytest.raises(BackendError, match='no C\\+\\+ compiler'): ms_deform_attn(*args)
    with backend('native'), pytest.raises(BackendError, match='not built'): ms_deform_attn(*args)

def test_measured_order(op, monkeypatch):
    "The bench's order for inputs of this kind; the default's ways follow it."
    value, shapes, points, weights = inputs(dtype=torch.float32)   # 144 points
    measured = {'ms_deform_attn': {'cpu forward 1e1': ['loop'], 'cpu forward+backward 1e1': ['eager', 'native'], 'cpu forward 1e2': ['eager']}}
    monkeypatch.setattr(core, '_choices', lambda: measured)
    multiscale._order.cache_clear()
    def ran(value, points, weights):
        ms_deform_attn(value, shapes, points, weights)
        return op.ran
    assert weights.numel() == 96
    assert ran(value, points, weights) == 'loop' and ran(value.clone().requires_grad_(), points, weights) == 'eager'
    with torch.no_grad(): assert ran(value.clone().requires_grad_(), points, weights) == 'loop'
    assert ran(value[:, :, :, :1], points.repeat(1, 2, 1, 1, 1, 1), weights.repeat(1, 2, 1, 1, 1)) == 'eager'     # 1e2
    assert ran(value, points[:, :0], weights[:, :0]) == 'native'                                                      # 1e0: unknown
    assert multiscale._order(torch.device('cpu'), False, 96) == ('loop', 'native', 'eager')
    monkeypatch.undo()

@pytest.mark.parametrize('types, gets', [((torch.float32,)*3, (torch.float32,)*3), ((torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16, torch.float32, torch.float32)),
    ((torch.float16,)*3, (torch.float16, torch.float32, torch.float32)), ((torch.float32, torch.bfloat16, torch.float32), (torch.float32,)*3),
    ((torch.float32, torch.float64, torch.float32), (torch.float64,)*3), ((torch.bfloat16, torch.float32, torch.float64), (torch.float64,)*3), ((torch.float64,)*3, (torch.float64,)*3)], ids=str)
def test_native_gets(op, types, gets):
    "Values in their own type, points and weights in float32; all in float64 if one is. The result has the values' type in every way."
    value, shapes, points, weights = inputs()
    args = value.to(types[0]), shapes, points.to(types[1]), weights.to(types[2])
    assert ms_deform_attn(*args).dtype == types[0] and op.calls == [gets]
    for way in ('eager', 'loop'):
        with backend(way): assert ms_deform_attn(*args).dtype == types[0]

def test_traced_order(op, monkeypatch):
    "A compiled model takes native or eager, whatever was measured; ONNX gets PyTorch's own functions."
    f = torch.compile(lambda *args: ms_deform_attn(args[0], [(3, 5), (2, 2)], *args[1:]), backend='eager')
    value, shapes, points, weights = inputs()
    op.way('native')(ms_deform_attn_grid)
    torch._dynamo.reset()
    f(value, points, weights)
    assert op.ran == 'native'
    torch.jit.trace(Export(), (value, points, weights), check_trace=False)
    assert op.ran == 'eager'
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    torch.export.export(Export(), (value, points, weights))
    assert op.ran == 'eager'

@pytest.mark.parametrize('d, q, grad, bags', [(16, 5, False, True), (8, 500, False, False), (32, 20000, True, True), (32, 5, True, False), (16, 2000, True, False)])
def test_eager_forms(d, q, grad, bags, monkeypatch):
    "The form is chosen by size, on the CPU, in float32, and never while tracing."
    value, shapes, points, weights = inputs(d=d, q=q, b=1, n=2, k=4, dtype=torch.float32)
    value.requires_grad_(grad)
    assert multiscale._rows_pay(value, points, weights) == bags
    assert not multiscale._rows_pay(value.double(), points, weights) and not multiscale._rows_pay(value.to('meta'), points.to('meta'), weights.to('meta'))
    plain = value.detach(), points, weights
    with torch._subclasses.FakeTensorMode() as mode: assert not multiscale._rows_pay(*(mode.from_tensor(o) for o in plain))
    got, want = ms_deform_attn_eager(value, shapes, points, weights), ms_deform_attn_grid(value, shapes, points, weights)
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.export.export(Export(), plain).module()(*plain).shape == want.shape

class Export(nn.Module):
    def forward(self, *args): return ms_deform_attn(args[0], [(3, 5), (2, 2)], *args[1:])

def test_kept_sizes_serve_training():
    "What is kept from a call in inference mode can be used with gradients."
    multiscale._levels.cache_clear(); multiscale._sizes.cache_clear()
    args = list(module_args())
    with torch.inference_mode(): module()(*args)
    module()(args[0].requires_grad_(), *args[1:]).sum().backward()
    value, shapes, points, weights = inputs(dtype=torch.float32, d=16)
    with torch.inference_mode(): ms_deform_attn(value, shapes, points, weights)
    agree('bags', value, shapes, points, weights, rtol=1e-4, atol=1e-4)

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
def test_opcheck():
    value, shapes, points, weights = inputs()
    args = [o.requires_grad_() for o in (value, points, weights)]
    torch.library.opcheck(multiscale._forward, (args[0], [o for hw in shapes for o in hw], *args[1:]), test_utils=['test_schema', 'test_autograd_registration', 'test_faketensor'])

# ---- bad input

wrong = {
    'value': dict(value=torch.zeros(2, 19, 6)), 'value ': dict(value=torch.zeros(2, 19, 2, 3, dtype=torch.long)), 'value  ': dict(value=None),
    'spatial_shapes': dict(spatial_shapes=[(3, 5), (2, 3)]), 'spatial_shapes ': dict(spatial_shapes=[3, 5]), 'spatial_shapes  ': dict(spatial_shapes=[]),
    'spatial_shapes   ': dict(spatial_shapes=torch.tensor([[3., 5], [2, 2]])), 'spatial_shapes    ': dict(spatial_shapes=[(-3, -5), (2, 2)]), 'spatial_shapes     ': dict(spatial_shapes=None),
    'points': dict(points=torch.zeros(2, 4, 2, 2, 3, 3)), 'points ': dict(points=torch.zeros(2, 4, 2, 3, 3, 2)), 'points   ': dict(points=torch.zeros(2, 4, 2, 2, 3, 2, dtype=torch.long)),
    'weights': dict(weights=torch.zeros(2, 4, 2, 2, 4)), 'weights ': dict(weights=torch.ones(2, 4, 2, 2, 3, dtype=torch.bool)), 'weights  ': dict(weights=torch.zeros(2, 4, 2, 2, 3, device='meta'))}

@pytest.mark.parametrize('name', wrong)
def test_wrong_arguments(name):
    value, shapes, points, weights = inputs(dtype=torch.float32)
    with pytest.raises(ArgumentError) as e: ms_deform_attn(**{**dict(value=value, spatial_shapes=shapes, points=points, weights=weights), **wrong[name]})
    assert e.value.argument == name.strip()

def test_shapes_of_all_kinds():
    "Lists, tuples and tensors of sizes are the same."
    value, shapes, points, weights = inputs()
    want = ms_deform_attn(value, shapes, points, weights)
    for o in (tuple(shapes), [list(o) for o in shapes], torch.tensor(shapes), [torch.Size(o) for o in shapes]): assert_close(ms_deform_attn(value, o, points, weights), want)

@pytest.mark.parametrize('name', wrong)
def test_quick_answer_is_the_careful_one(name):
    value, shapes, points, weights = inputs(dtype=torch.float32)
    args = dict(value=value, spatial_shapes=shapes, points=points, weights=weights)
    assert multiscale._right(**args) is True and multiscale._right(**{**args, **wrong[name]}) is not True

def test_checks_are_cheap():
    "About a microsecond: a generous bound, for other work may run beside it."
    args = inputs(b=1, shapes=((8, 8), (4, 4), (2, 2), (1, 1)), n=8, d=4, q=5, k=4, dtype=torch.float32)
    assert min(timeit.repeat(lambda: multiscale._right(*args), number=2000, repeat=15)) / 2000 < 10e-6
    multiscale._msda.plan(*args)
    assert min(timeit.repeat(lambda: multiscale._msda.plan(*args), number=2000, repeat=15)) / 2000 < 10e-6

# ---- debug

def at(x, i, value):
    x = x.clone()
    x[i] = value
    return x

nan, inf = float('nan'), float('inf')
@pytest.mark.parametrize('name, i, bad, says', [
    ('value', (1, 4, 0, 2), nan, r'value\[b=1, s=4, n=0, d=2\] = nan, the first of 1 '), ('value', 0, inf, r'value\[b=0, s=0, n=0, d=0\] = inf, the first of 114 '),
    ('points', (1, 3, 0, 1, 2, 1), nan, r'points\[b=1, q=3, n=0, l=1, k=2\] = .*, nan, the first of 1 '), ('points', (0, 1, 1, 1, 0, 0), -inf, r'points\[b=0, q=1, n=1, l=1, k=0\] = -inf, '),
    ('weights', (0, 3, 1, 0, 1), -inf, r'weights\[b=0, q=3, n=1, l=0, k=1\] = -inf'), ('points', (1, 0, 1, 1, 2, 0), 100., r'points\[b=1, q=0, n=1, l=1, k=2\] = 100, .*, the first of 1 ')])
def test_debug_says_where(name, i, bad, says):
    args = dict(zip(('value', 'spatial_shapes', 'points', 'weights'), inputs()))
    args[name] = at(args[name], i, bad)
    ms_deform_attn(**args) if name != 'points' else None
    with debug(), pytest.raises(ArgumentError, match=says) as e: ms_deform_attn(**args)
    assert e.value.argument == name
    with debug(), debug(False): core.debugging() or ms_deform_attn(**{**args, 'points': inputs()[2]})

def test_debug_accepts_what_is_right():
    with debug():
        ms_deform_attn(*inputs())
        module()(*module_args()); module()(*module_args(boxes=True))
        ms_deform_attn(*inputs(q=0)); ms_deform_attn(*inputs(b=0))
        m = MSDeformAttn(12, 3, 1, 4)   # on a level of one pixel a new module looks four maps away
        m(torch.zeros(1, 9, 12), torch.full((1, 9, 1, 2), 0.5), torch.zeros(1, 1, 12), [(1, 1)])

@pytest.mark.parametrize('boxes', [False, True])
def test_debug_of_the_module(boxes):
    query, reference, value, shapes = module_args(boxes)
    with debug():
        with pytest.raises(ArgumentError, match='not in pixels') as e: module()(query, reference * 100, value, shapes)
        assert e.value.argument == 'reference'
        with pytest.raises(ArgumentError, match=r'reference\[b=1, q=2, l=0\]'): module()(query, at(reference, (1, 2, 0, 1), nan), value, shapes)
        with pytest.raises(ArgumentError, match=r'value\[b=1'): module()(query, reference, at(value, (1, 3), nan), shapes)

@pytest.mark.parametrize('what', ['compile', 'export', 'vmap', 'fake'])
def test_debug_is_skipped_where_there_are_no_values(what):
    value, shapes, points, weights = inputs()
    points = points * 1000
    f = lambda v, p, w: ms_deform_attn(v, shapes, p, w)
    torch._dynamo.reset()
    with debug():
        if what == 'compile': torch.compile(f, fullgraph=True, backend='aot_eager')(value, points, weights)
        if what == 'export': torch.export.export(Export(), (value, points, weights))
        if what == 'vmap': torch.func.vmap(lambda v, p, w: f(v[None], p[None], w[None]))(value, points, weights)
        if what == 'fake':
            with torch._subclasses.FakeTensorMode() as mode: f(*(mode.from_tensor(o) for o in (value, points, weights)))
        with pytest.raises(ArgumentError): f(value, points, weights)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_debug_on_a_gpu():
    value, shapes, points, weights = (o.cuda() if isinstance(o, torch.Tensor) else o for o in inputs(dtype=torch.float32))
    with debug(), pytest.raises(ArgumentError, match=r'points\[b=0, q=0, n=0, l=0, k=0\]'): ms_deform_attn(value, shapes, points * 0 + 100, weights)

def module(**kw):
    torch.manual_seed(0)
    m = MSDeformAttn(**{**dict(dim=12, num_heads=3, num_levels=2, num_points=2), **kw})
    for p in m.parameters(): nn.init.normal_(p, std=0.3)
    return m

def module_args(boxes=False, b=2, q=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, q, 12, generator=g), torch.rand(b, q, 2, 4 if boxes else 2, generator=g), torch.randn(b, 19, 12, generator=g), [(3, 5), (2, 2)]

@pytest.mark.parametrize('name, i, value', [
    ('query', 0, torch.zeros(2, 4, 11)), ('reference', 1, torch.rand(2, 4, 2)), ('reference', 1, torch.rand(2, 4, 3, 2)), ('reference', 1, torch.rand(2, 5, 2, 2)),
    ('reference', 1, torch.rand(2, 4, 2, 3)), ('value', 2, torch.zeros(2, 19, 10)), ('value', 2, torch.zeros(1, 19, 12)), ('spatial_shapes', 3, [(3, 5)]), ('spatial_shapes', 3, [(3, 5), (2, 3)])])
def test_wrong_module_arguments(name, i, value):
    args = list(module_args())
    args[i] = value
    with pytest.raises(ArgumentError) as e: module()(*args)
    assert e.value.argument == name

@pytest.mark.parametrize('mask', [torch.zeros(2, 18, dtype=torch.bool), torch.zeros(2, 19)])
def test_wrong_mask(mask):
    with pytest.raises(ArgumentError) as e: module()(*module_args(), mask)
    assert e.value.argument == 'padding_mask'

def test_far_points_are_fine():
    "A learned offset may go anywhere: a new module on a level of one pixel looks four maps away, and a few points may be anywhere at all."
    m = MSDeformAttn(12, 3, 1, 4)
    assert m(torch.zeros(1, 9, 12), torch.full((1, 9, 1, 2), 0.5), torch.zeros(1, 1, 12), [(1, 1)]).isfinite().all()
    value, shapes, points, weights = inputs()
    points[:, ::2] = 1e6
    assert_close(ms_deform_attn(value, shapes, points, weights)[:, ::2], torch.zeros(2, 2, 6, dtype=torch.float64))

# ---- the module

def test_module_loop():
    "The module is its parts: linear maps, `place`, softmax, loop."
    m, (query, reference, value, shapes) = module().double(), module_args()
    query, reference, value = query.double(), reference.double(), value.double()
    offsets = m.offsets(query).view(2, 4, 3, 2, 2, 2)
    weights = m.weights(query).view(2, 4, 3, 4).softmax(-1).view(2, 4, 3, 2, 2)
    points = torch.stack([reference[:, :, None, l, None] + offsets[:, :, :, l] / torch.tensor([w, h]) for l, (h, w) in enumerate(shapes)], 3)
    for a, b in zip(m.look(query, reference, shapes), (points, weights)): assert_close(a, b)
    want = m.out_proj(ms_deform_attn_loop(m.value_proj(value).view(2, 19, 3, 4), shapes, points, weights))
    assert_close(m(query, reference, value, shapes), want)
    assert_close(m(query, reference, value, torch.tensor(shapes)), want)

def test_boxes():
    "Around a box an offset of `num_points` reaches the edge."
    reference = torch.tensor([0.5, 0.4, 0.2, 0.6]).expand(1, 1, 1, 4)
    offsets = torch.tensor([[0., 0], [4, 0], [0, -4], [4, 4]]).view(1, 1, 1, 1, 4, 2)
    assert_close(place(reference, offsets, [(7, 9)]).view(4, 2), torch.tensor([[0.5, 0.4], [0.6, 0.4], [0.5, 0.1], [0.6, 0.7]]))

def test_padding_is_silent():
    m, (query, reference, value, shapes) = module(), module_args()
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) < 0.4
    assert_close(m(query, reference, value, shapes, mask), m(query, reference, value.masked_fill(mask[..., None], 7.), shapes, mask))
    everything = m(query, reference, value, shapes, torch.ones_like(mask))
    assert_close(everything, m.out_proj.bias.expand_as(everything))

def test_start():
    m = MSDeformAttn(32, 8, 2, 4)
    points, weights = m.look(torch.randn(1, 1, 32), torch.full((1, 1, 2, 2), 0.5), [(10, 20), (5, 10)])
    assert_close(weights, torch.full((1, 1, 8, 2, 4), 1/8))
    assert_close(((points - 0.5) * torch.tensor([[20., 10], [10, 5]])[:, None])[0, 0], star(8, 2, 4))
    assert star(8, 2, 4).abs().amax(-1)[:, 0].tolist() == [[1, 2, 3, 4]] * 8

@pytest.mark.parametrize('boxes', [False, True])
@pytest.mark.parametrize('way', ['eager', compiled, 'native'])
def test_fullgraph(way, boxes):
    m, args = module(), module_args(boxes)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[:, 3:6] = True
    traced = torch.compile(m, fullgraph=True, backend='aot_eager')
    with backend('eager'): want = torch.autograd.grad(m(*args, mask).square().sum(), list(m.parameters()))
    with by(way): got = torch.autograd.grad(traced(*args, mask).square().sum(), list(m.parameters()))
    for a, b in zip(got, want): assert_close(a, b, rtol=1e-4, atol=1e-4)

def test_dynamic_queries():
    m, args = module(), module_args(q=5)
    traced = torch.compile(m, fullgraph=True, backend='aot_eager', dynamic=True)
    for q in (5, 7): assert_close(traced(*module_args(q=q)), m(*module_args(q=q)))

@pytest.mark.parametrize('device_type', ['cpu'])
def test_autocast(device_type):
    m, args = module(), module_args()
    with torch.autocast(device_type, torch.bfloat16):
        assert m.look(args[0], args[1], args[3])[0].dtype == torch.float32
        out = m(*args)
    assert_close(out.float(), m(*args), rtol=0.05, atol=0.3)

def test_batch_of_looks_by_vmap():
    "The checks look at no values under vmap."
    value, shapes, points, weights = inputs()
    got = torch.func.vmap(lambda v, p, w: ms_deform_attn(v[None], shapes, p[None], w[None])[0])(value, points, weights)
    assert_close(got, ms_deform_attn(value, shapes, points, weights))

# ---- the official code's numbers

def fixture(name):
    path = golden/f'{name}.safetensors'
    if not path.exists(): pytest.skip(f'no golden files in {golden}')
    from safetensors import safe_open
    with safe_open(path, 'pt') as f: return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['json'])

def cases(tensors): return sorted({k.split('/')[1] for k in tensors if k.startswith('input/')})

@ways
def test_golden_op(way, tell):
    t, _ = fixture('msda_op')
    for c in cases(t):
        shapes = t[f'input/{c}/spatial_shapes']
        got = run(way, t[f'input/{c}/value'], shapes, t[f'input/{c}/sampling_locations'], t[f'input/{c}/attention_weights'], t[f'gradw/{c}/out'])
        want = [t[f'output/{c}/out']] + [t[f'grad/{c}/{o}'] for o in ('value', 'sampling_locations', 'attention_weights')]
        for a, b in zip(got, want): assert_close(a, b, rtol=0, atol=1e-12, msg=lambda s: f'{c}: {s}')
    tell(f'msda_op, {way}: {len(cases(t))} cases equal to the official code')

names = dict(sampling_offsets='offsets', attention_weights='weights', value_proj='value_proj', output_proj='out_proj')

@ways
def test_golden_module(way):
    t, meta = fixture('msda_module')
    c = meta['config']
    m = MSDeformAttn(c['d_model'], c['n_heads'], c['n_levels'], c['n_points'])
    ours = lambda key: '.'.join(names.get(o, o) for o in key.split('.'))
    m.load_state_dict({ours(k.removeprefix('state_dict/')): v for k, v in t.items() if k.startswith('state_dict/')})
    for case in cases(t):
        get = lambda o: t.get(f'input/{case}/{o}')
        args = [get(o).requires_grad_() for o in ('query', 'reference_points', 'input_flatten')]
        with by(way): out = m(*args, get('spatial_shapes'), get('padding_mask'))
        assert multiscale._msda.ran
        wanted = {k: v for k, v in t.items() if k.startswith(f'grad/{case}/')}
        params = {ours(k.split('state_dict/')[1]): k for k in wanted if 'state_dict' in k}
        at = dict(zip([f'grad/{case}/{o}' for o in ('query', 'reference_points', 'input_flatten')], args))
        at |= {k: m.get_parameter(name) for name, k in params.items()}
        found = dict(zip(at, torch.autograd.grad((out * t[f'gradw/{case}/out']).sum(), list(at.values()))))
        found[f'output/{case}/out'] = out
        for k, x in found.items():
            e, biggest = meta['f32_vs_f64'][k]
            assert (x - t[k]).abs().max() <= max(20*e, 2e-5*biggest, 1e-6), k
        assert set(wanted) <= set(found)
