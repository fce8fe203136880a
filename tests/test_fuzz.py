"""The op on random shapes, strides and numbers, against the same in float64: forward, gradients, on the CPU.

A failing case prints the arguments of `problem`, which makes it again. Gradients to points jump at pixel centres; where a coordinate lies within
eight roundings of one they are not compared (`near_kink`), all else is. `make test-sanitize` runs this on a build in which every access is checked.
"""
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close
from multiscale_cases import LAYOUTS, LEAST, SAME, native, permuted, run
from truth import *
from deformlit import multiscale
from deformlit.core import backend
from deformlit.multiscale import *

PLACES = {
    'near': lambda g, p, size: torch.rand(p.shape, generator=g) * 1.6 - .3,
    'border': lambda g, p, size: torch.randint(-1, 3, p.shape, generator=g).double(),
    'edge of a pixel': lambda g, p, size: (torch.rand(p.shape, generator=g) * (size + 3)).floor().sub(1) / size,
    'centre of a pixel': lambda g, p, size: ((torch.rand(p.shape, generator=g) * (size + 3)).floor().sub(1) + .5) / size,
    'next to a centre': lambda g, p, size: ((torch.rand(p.shape, generator=g) * (size + 3)).floor().sub(1) + .5) / size + torch.randn(p.shape, generator=g) * 1e-6,
    'outside': lambda g, p, size: torch.randn(p.shape, generator=g) * 100,
    'huge': lambda g, p, size: torch.randn(p.shape, generator=g).sign() * 10 ** (torch.rand(p.shape, generator=g) * 30 + 7),
    'tiny': lambda g, p, size: torch.randn(p.shape, generator=g) * 1e-40,
    'infinite': lambda g, p, size: torch.randn(p.shape, generator=g).sign() * inf,
    'NaN': lambda g, p, size: torch.where(torch.rand(p.shape, generator=g) < .1, nan, torch.rand(p.shape, generator=g))}
FINITE = [o for o in PLACES if o not in ('infinite', 'NaN', 'huge')]
NUMBERS = {'normal': lambda g, shape: torch.randn(shape, generator=g).double(), 'whole': lambda g, shape: torch.randint(-2, 3, shape, generator=g).double(),
           'large': lambda g, shape: torch.randn(shape, generator=g).double() * 1e4, 'subnormal': lambda g, shape: torch.randn(shape, generator=g).double() * 1e-40, 'wide': lambda g, shape: torch.randn(shape, generator=g).double() * 10 ** (torch.rand(shape, generator=g) * 8 - 6)}
REST = {'plain': lambda x: x, 'permuted': lambda x: permuted(x, list(range(x.ndim))[::-1]), 'sliced': lambda x: x.repeat_interleave(2, -1)[..., ::2], 'one query': lambda x: x[:, :1].expand(x.shape), 'one image': lambda x: x[:1].expand(x.shape)}

def problem(seed, dtype, b, q, n, d, k, shapes, places, values, weights, layout, layouts, bad=0):
    "Value, shapes, points, weights and the output's gradient."
    if {values, weights} == {'subnormal', 'large'}: values = weights = 'subnormal'    # large numbers would show what subnormal ones lose
    g, whole = torch.Generator().manual_seed(seed), torch.float64 if dtype == torch.float64 else torch.float32
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    points = torch.zeros(b, q, n, len(shapes), k, 2, dtype=torch.float64)
    kind = torch.randint(len(places), points.shape, generator=g)
    for i, o in enumerate(places): points = torch.where(kind == i, PLACES[o](g, points, size).double(), points)
    value = NUMBERS[values](g, (b, sum(h * w for h, w in shapes), n, d)).to(dtype)
    points, w, grad = points.to(whole), NUMBERS[weights](g, points.shape[:-1]).to(whole), torch.randn(b, q, n * d, generator=g).to(dtype)
    points, w, grad = (REST[how](x) if x.numel() else x for x, how in zip((points, w, grad), layouts))
    if bad:                                             # a few pixels that are not finite; no point within rounding of a centre, where it is open which pixels it reads
        value.view(-1)[torch.randint(value.numel(), (bad,), generator=g)] = torch.tensor([nan, inf, -inf]).to(dtype)[torch.randint(3, (bad,), generator=g)]
        points = torch.where(near_kink(points, shapes, 100)[..., None], 9., points)
    value = LAYOUTS[layout](value) if layout in LAYOUTS else value.narrow(SAME[layout], 0, 1).expand(value.shape) if layout in SAME and value.numel() else value
    return value, list(shapes), points, w, grad

count = lambda low, high: st.integers(low, high)
def problems(most=9, dtypes=(torch.float32, torch.float64, torch.float16, torch.bfloat16), places=tuple(PLACES), numbers=tuple(NUMBERS), least=0, **kw):
    return st.fixed_dictionaries(dict(
        seed=count(0, 2**31), dtype=st.sampled_from(dtypes), b=count(least, 3), q=count(least, most), n=count(1, 4), d=st.one_of(count(1, 9), count(1, 70)), k=count(least, 5),
        shapes=st.lists(st.tuples(count(1, most), count(1, most)), min_size=1, max_size=4), places=st.lists(st.sampled_from(places), min_size=1, max_size=4), values=st.sampled_from(numbers), weights=st.sampled_from(numbers),
        layout=st.sampled_from([None, *LAYOUTS, *SAME]), layouts=st.tuples(*[st.sampled_from(list(REST))] * 3)) | kw)

def compare(args):
    value, shapes, points, weights, grad = problem(**args)
    got, _ = run(value, shapes, points, weights, grad)
    skip = near_kink(points, shapes)
    for i, (a, (b, size), like) in enumerate(zip(got, truth(value, shapes, points, weights, grad), (value, value, points, weights))):
        assert a.dtype == like.dtype
        if i == 2: a, b = (o.masked_fill(skip[..., None], 0) for o in (a, b))
        assert units(a, b, size, points.dtype) <= LEAST, ('output', 'value', 'points', 'weights')[i]

few = settings(max_examples=200, suppress_health_check=list(HealthCheck))
many = settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
bad = dict(bad=count(1, 3), places=('near', 'outside', 'NaN', 'infinite'), numbers=('normal',), b=count(1, 2), q=count(1, 9), k=count(1, 4))

@pytest.fixture(scope='module')
def library(): need_native()

@few
@given(problems())
def test_native(library, args): compare(args)

@few
@given(problems(**bad))
def test_native_with_bad_pixels(library, args): compare(args)

@pytest.mark.slow
@many
@given(problems())
def test_native_10_000(library, args): compare(args)

@settings(few, max_examples=60)
@given(problems(most=3, dtypes=[torch.float64], places=FINITE, numbers=['normal', 'whole'], d=count(1, 3), n=count(1, 2), k=count(1, 2)))
def test_truth_is_the_loop(args):
    "What all is compared with is itself compared with the loop."
    value, shapes, points, weights, grad = problem(**args)
    args = [o.detach().requires_grad_() for o in (value, points, weights)]
    with backend('loop'): out = ms_deform_attn(args[0], shapes, *args[1:])
    got = [out.detach(), *(torch.autograd.grad(out, args, grad) if out.requires_grad else map(torch.zeros_like, args))]
    skip = near_kink(points, shapes)
    for i, (a, (b, size)) in enumerate(zip(got, truth(value, shapes, points, weights, grad))):
        if i == 2: a, b = (o.masked_fill(skip[..., None], 0) for o in (a, b))
        assert units(a, b, size, torch.float64) <= LEAST

@pytest.mark.parametrize('form', [ms_deform_attn_grid, ms_deform_attn_bags])
def test_eager(form):
    "Both plain forms, in float64, finite points; they round coordinates more often, so they may err more."
    @settings(few, max_examples=100)
    @given(problems(dtypes=[torch.float64], places=FINITE, numbers=['normal', 'whole'], least=1))
    def each(args):
        value, shapes, points, weights, grad = problem(**args)
        args = [o.detach().requires_grad_() for o in (value, points, weights)]
        out = form(args[0], shapes, *args[1:])
        skip = near_kink(points, shapes, 64)
        for i, (a, (b, size)) in enumerate(zip((out, *torch.autograd.grad(out, args, grad)), truth(value, shapes, points, weights, grad))):
            if i == 2: a, b = (o.detach().masked_fill(skip[..., None], 0) for o in (a, b))
            assert units(a, b, size, torch.float64) <= 10 * LEAST, i
    each()
