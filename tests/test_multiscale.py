"""Multi-scale deformable attention: every way against the loop and against the official code's numbers; bad input; tracing."""
import json, os
from pathlib import Path
import pytest, torch
from torch import nn
from deformlit import multiscale
from deformlit.core import ArgumentError, BackendError, assert_close, backend, needs_compiler
from deformlit.multiscale import *

golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).resolve().parents[1].parent/'shared'/'golden'/'A'))
compiled = pytest.param('compiled', marks=[pytest.mark.slow, pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))])
ways = pytest.mark.parametrize('way', ['loop', 'eager', compiled])

def inputs(b=2, shapes=((3, 5), (2, 2)), n=2, d=3, q=4, k=3, dtype=torch.float64, seed=0):
    "Value, shapes, points (a third outside) and weights."
    g, l = torch.Generator().manual_seed(seed), len(shapes)
    value = torch.randn(b, sum(h*w for h, w in shapes), n, d, dtype=dtype, generator=g)
    points = torch.rand(b, q, n, l, k, 2, dtype=dtype, generator=g) * 1.6 - 0.3
    return value, list(shapes), points, torch.randn(b, q, n, l, k, dtype=dtype, generator=g)

def run(way, value, shapes, points, weights, mix=None):
    "Output and gradients by `way`; asserts that it ran."
    args = [o.detach().requires_grad_() for o in (value, points, weights)]
    with backend(way): out = ms_deform_attn(args[0], shapes, *args[1:])
    assert multiscale._msda.ran == way
    if mix is None: mix = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    return out, *torch.autograd.grad((out * mix).sum(), args)

def agree(way, *args, **kw):
    got, want = run(way, *args), run('loop', *args)
    for a, b in zip(got, want): assert_close(a, b, **kw)
    return got

others = pytest.mark.parametrize('way', ['eager', compiled])

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
    with backend(way): out = ms_deform_attn(value, shapes, points, weights)
    assert multiscale._msda.ran == way and out.shape == (b, q, 6)
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
    with backend(way): out = ms_deform_attn(value.to(dtype), shapes, points, weights)
    with backend('loop'): want = ms_deform_attn(value.to(dtype).double(), shapes, points, weights)
    assert out.dtype == dtype and want.dtype == torch.float64
    assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)

@others
def test_some_gradients(way):
    "Only those asked for."
    value, shapes, points, weights = inputs()
    for i in range(3):
        args = [o.detach().requires_grad_(i == j) for j, o in enumerate((value, points, weights))]
        with backend(way): got, = torch.autograd.grad(ms_deform_attn(args[0], shapes, *args[1:]).sum(), args[i])
        with backend('loop'): want, = torch.autograd.grad(ms_deform_attn(args[0], shapes, *args[1:]).sum(), args[i])
        assert_close(got, want)

@ways
def test_gradcheck(way):
    value, shapes, points, weights = inputs(b=1, shapes=((2, 3), (1, 2)), n=1, d=2, q=2, k=1)
    with backend(way): assert torch.autograd.gradcheck(lambda v, p, w: ms_deform_attn(v, shapes, p, w), [o.requires_grad_() for o in (value, points, weights)])
    assert multiscale._msda.ran == way

@others
def test_gradgradcheck(way):
    value, shapes, points, weights = inputs(b=1, shapes=((2, 3), (1, 2)), n=1, d=2, q=2, k=1)
    with backend(way): assert torch.autograd.gradgradcheck(lambda v, p, w: ms_deform_attn(v, shapes, p, w), [o.requires_grad_() for o in (value, points, weights)])

def test_compiled_without_compiling():
    "The arithmetic of the compiled way, run plainly, is the loop's, gradients by hand included."
    value, shapes, points, weights = inputs(n=3, d=4)
    want, to_value, to_points, to_weights = run('loop', value, shapes, points, weights)
    p, a, w, h, first = multiscale._flat(value, shapes, points, weights)
    numbers, shares = multiscale._bags(p, a, w, h, first, 3)
    table, flat = value.reshape(-1, 4), numbers.flatten(0, 1).flatten(1)
    assert_close(multiscale._read(table, numbers, shares).view(want.shape), want)
    mix = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9)).view(-1, 4)
    assert_close(multiscale._scatter(torch.zeros_like(table), flat, shares.view_as(flat), mix).view(value.shape), to_value)
    got = multiscale._slopes(p, a, w, h, multiscale._dots(table, flat, mix).view(numbers.shape))
    assert_close(got[0].view(points.shape), to_points); assert_close(got[1].view(weights.shape), to_weights)

@others
def test_nan_shows(way):
    "A point that is NaN makes its own head's reading NaN and no other; the loop refuses it."
    value, shapes, points, weights = inputs()
    points[1, 2, 1, 0, 0, 0] = float('nan')
    with backend(way): out = ms_deform_attn(value, shapes, points, weights)
    want = torch.zeros(2, 4, 2, 3, dtype=torch.bool)
    want[1, 2, 1] = True
    assert (out.isnan() == want.flatten(2)).all()
    with backend('loop'), pytest.raises(ArgumentError, match='finite'): ms_deform_attn(value, shapes, points, weights)

def test_choice(monkeypatch):
    "Eager by itself; compiled only when asked, and refused with the reason where there is no compiler."
    args = inputs()
    ms_deform_attn(*args)
    assert multiscale._msda.ran == 'eager'
    monkeypatch.setitem(multiscale._msda.needs, 'compiled', lambda: 'no C++ compiler')
    with backend('compiled'), pytest.raises(BackendError, match='no C\\+\\+ compiler'): ms_deform_attn(*args)
    with backend('native'), pytest.raises(BackendError, match='native'): ms_deform_attn(*args)

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
    'points': dict(points=torch.zeros(2, 4, 2, 2, 3, 3)), 'points ': dict(points=torch.zeros(2, 4, 2, 3, 3, 2)), 'points  ': dict(points=torch.rand(2, 4, 2, 2, 3, 2) * 128), 'points   ': dict(points=torch.zeros(2, 4, 2, 2, 3, 2, dtype=torch.long)),
    'weights': dict(weights=torch.zeros(2, 4, 2, 2, 4)), 'weights ': dict(weights=torch.ones(2, 4, 2, 2, 3, dtype=torch.bool)), 'weights  ': dict(weights=torch.zeros(2, 4, 2, 2, 3, device='meta'))}

@pytest.mark.parametrize('name', wrong)
def test_wrong_arguments(name):
    value, shapes, points, weights = inputs(dtype=torch.float32)
    with pytest.raises(ArgumentError) as e: ms_deform_attn(**{**dict(value=value, spatial_shapes=shapes, points=points, weights=weights), **wrong[name]})
    assert e.value.argument == name.strip()

def module(**kw):
    torch.manual_seed(0)
    m = MSDeformAttn(**{**dict(dim=12, num_heads=3, num_levels=2, num_points=2), **kw})
    for p in m.parameters(): nn.init.normal_(p, std=0.3)
    return m

def module_args(boxes=False, b=2, q=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, q, 12, generator=g), torch.rand(b, q, 2, 4 if boxes else 2, generator=g), torch.randn(b, 19, 12, generator=g), [(3, 5), (2, 2)]

@pytest.mark.parametrize('name, i, value', [
    ('query', 0, torch.zeros(2, 4, 11)), ('reference', 1, torch.rand(2, 4, 2)), ('reference', 1, torch.rand(2, 4, 3, 2)), ('reference', 1, torch.rand(2, 4, 2, 2) * 100), ('reference', 1, torch.rand(2, 5, 2, 2)),
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
@pytest.mark.parametrize('way', ['eager', compiled])
def test_fullgraph(way, boxes):
    m, args = module(), module_args(boxes)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[:, 3:6] = True
    traced = torch.compile(m, fullgraph=True, backend='aot_eager')
    with backend('eager'): want = torch.autograd.grad(m(*args, mask).square().sum(), list(m.parameters()))
    with backend(way): got = torch.autograd.grad(traced(*args, mask).square().sum(), list(m.parameters()))
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
        with backend(way): out = m(*args, get('spatial_shapes'), get('padding_mask'))
        assert multiscale._msda.ran == way
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
