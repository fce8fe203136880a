"""DAT's attention as a native op: values, gradients, layouts, numbers that are none, and all the ways PyTorch can run it."""
import io, os, platform, subprocess, sys
import pytest, torch
from torch import nn
from torch.testing import assert_close
from notebooks import root
import deformlit.deformed_keys_kernel              # registers the ops, which some tests call by their names
from deformlit import core
from deformlit.core import backend, backends
from deformlit.deformed_keys import *
from deformlit.relative_bias import *
from deformlit.relative_bias import _attend
from deformlit.native import needs_library
from truth import nan, inf, need_native

TYPES = dict(f32=torch.float32, f64=torch.float64, f16=torch.float16, bf16=torch.bfloat16)
types = pytest.mark.parametrize('dtype', TYPES.values(), ids=TYPES)
NAMES = 'q', 'k', 'v', 'table', 'start'

@pytest.fixture(scope='module', autouse=True)
def on():
    need_native()
    return 'cpu'

def inputs(on='cpu', b=2, n=4, g=2, d=5, h=3, w=4, k=7, th=None, tw=None, step=(1., 1.), taps=0, far=1., dtype=torch.float64, seed=0):
    "Arguments of `table_attend`; the keys lie on the map, or `far` times as far. No place is so near a number of the table that rounding decides on which side it is."
    r = torch.Generator().manual_seed(seed)
    random, whole = lambda *size: torch.randn(*size, dtype=torch.float64, generator=r), torch.float64 if dtype == torch.float64 else torch.float32
    q, keys, values, table = random(b, n, h * w, d), random(b, n, k, d), random(b, n, k, d), random(n, th or 2*h - 1, tw or 2*w - 1)
    start = (torch.rand(b, g, k, 2, dtype=torch.float64, generator=r) - .5) * torch.tensor([w, h]) * far + torch.tensor([w, h]) / 2
    start = (start * 16).floor() / 16 + 1 / 41
    return [*(o.to(on, dtype) for o in (q, keys, values)), table.to(on, whole), start.to(on, whole), step, (h, w), taps]

def native(*args):
    "The output by way 'native'; asserts that it ran."
    _attend.ran = None
    with backend('native'): out = table_attend(*args)
    assert _attend.ran == 'native'
    return out

def run(args, grad=None, f=native):
    "Output and gradients, and the output's gradient that they are for."
    leaves = [o.detach().requires_grad_() for o in args[:5]]
    out = f(*leaves, *args[5:])
    if grad is None: grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)], grad

def eager(*args):
    "The same in float64 by the eager form, whatever steps are."
    with backend('eager'): return table_attend(*args[:7], 0)

def exact(args):
    "Output and gradients have the right type, and differ from float64's by some roundings of the largest. Returns the largest error, in such."
    got, grad = run(args)
    want, _ = run([o.double().cpu() for o in args[:5]] + args[5:], grad.double().cpu(), eager)
    worst = 0
    for name, a, b, like in zip(('output', *NAMES), got, want, (args[0], *args[:5])):
        assert a.dtype == like.dtype and a.device == like.device and a.shape == like.shape
        if not a.numel(): continue
        half = args[0].dtype in (torch.float16, torch.bfloat16)
        eps = torch.finfo(args[0].dtype).eps
        error = ((a.double().cpu() - b).abs().max() / (b.abs().max() + 1e-3) / eps).item()
        assert error <= (8 if half else 200 + 4 * max(args[6])), f'{name}: {error:.3g} roundings'
        worst = max(worst, error)
    return worst

# ---- values and gradients

STEPS = {'pixels': {}, 'towards the middle': dict(step='centred'), 'longer': dict(step=(1.3, 1.7), tw=13, th=11), 'shorter': dict(step=(.4, .15), tw=5, th=3), 'back': dict(step=(-.7, -1.), tw=9, th=9), 'none': dict(step=(0., 0.), tw=9, th=9)}
SIZES = [dict(h=1, w=1, k=1), dict(h=1, w=7), dict(h=7, w=1), dict(k=1), dict(h=5, w=3, d=1, n=1, g=1), dict(h=14, w=14, k=65, d=32, b=1, n=2), dict(h=2, w=17, k=64), dict(h=2, w=33, k=130, d=8, b=1, n=2, g=1),
         dict(h=2, w=130, k=9, b=1, n=1, g=1), dict(h=1, w=300, k=5, b=1, n=1, g=1), dict(h=29, w=5, k=3, d=17), dict(h=6, w=6, n=6, g=3), dict(h=6, w=6, n=6, g=6, d=40), dict(h=4, w=4, far=8.), dict(h=40, w=9, k=3, b=1, n=2)]

def steps(o, size):
    "`towards the middle` depends on the map."
    h, w = size.get('h', 3), size.get('w', 4)
    return {**o, 'step': ((w - 1) / w, (h - 1) / h), 'taps': 3} if o.get('step') == 'centred' else o

@pytest.mark.parametrize('kind', STEPS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_sizes(on, size, kind):
    "Any map, any keys, any steps: as the eager form in float64, gradients too."
    exact(inputs(on, **size, **steps(STEPS[kind], size)))

@pytest.mark.parametrize('kind', STEPS)
def test_loop(on, kind):
    args = inputs(on, b=1, n=2, g=1, d=2, h=3, w=4, k=5, far=1.5, **steps(STEPS[kind], {}))
    with backend('loop'): want = table_attend(*args)
    assert_close(native(*args), want)

@types
def test_types(on, dtype):
    "Half precision is widened when it is read, and rounded once; all sums are float32."
    for kind in STEPS: exact(inputs(on, h=9, w=11, k=70, d=32, dtype=dtype, **steps(STEPS[kind], dict(h=9, w=11))))

@types
def test_channels(on, dtype):
    for d in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 100, 128): exact(inputs(on, b=1, n=2, g=1, h=2, w=5, k=9, d=d, dtype=dtype, seed=d))

@pytest.mark.parametrize('taps', [2, 3])
def test_taps_of_the_grid(on, taps):
    "`table_grid` says the steps; here by both conventions of DAT."
    queries = PixelQueries() if taps == 2 else CentredQueries()
    args = inputs(on, h=7, w=9, k=6)
    keys = torch.rand(2, 2, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    args[4:] = [*table_grid((7, 9), (13, 17), keys, queries)[:2], (7, 9), taps]
    exact(args)

@pytest.mark.parametrize('empty', [dict(b=0), dict(k=0), dict(n=0)], ids=str)
@types
def test_nothing_to_do(on, empty, dtype):
    args = inputs(on, **{**dict(g=1), **empty}, dtype=dtype)
    got, _ = run(args)
    for a, o in zip(got, (args[0], *args[:5])): assert a.shape == o.shape and (a == 0).all()

# ---- layouts

def permuted(x, order): return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
LAYOUTS = {'channels first': lambda x: permuted(x, [0, 1, 3, 2]), 'heads last': lambda x: permuted(x, [0, 2, 1, 3]), 'images last': lambda x: permuted(x, [1, 2, 3, 0]), 'every second channel': lambda x: x.repeat_interleave(2, 3)[..., ::2],
           'every second': lambda x: x.repeat_interleave(2, 2)[:, :, ::2], 'one number further': lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), 'one image': lambda x: x[:1].expand_as(x), 'one head': lambda x: x[:, :1].expand_as(x)}

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['f32', 'f16'])
def test_layouts(on, layout, dtype):
    args = inputs(on, h=5, w=6, k=70, d=8, dtype=dtype)
    laid = [LAYOUTS[layout](o) for o in args[:3]] + args[3:]
    want, grad = run([o.contiguous() for o in laid[:3]] + args[3:])
    got, _ = run(laid, LAYOUTS[layout](grad) if not layout.startswith('one ') else grad)
    _, back = run(laid, grad)
    for a, b in zip(run(laid, grad)[0], want): assert torch.equal(a, b)
    for o in (3, 4):
        other = list(args)
        other[o] = args[o].mT.contiguous().mT
        for a, b in zip(run(other, grad)[0], run(args, grad)[0]): assert torch.equal(a, b)

def test_inputs_are_not_changed(on):
    args = inputs(on)
    before = [o.clone() for o in args[:5]]
    run(args)
    for a, b in zip(args, before): assert torch.equal(a, b)

# ---- numbers that are none

def test_nan(on):
    "NaN in a query reaches that query alone; in a key, a value or a place, the queries of its head; in the table, the queries that read it."
    args = inputs(on, h=3, w=4, k=7)
    clean = native(*args)
    def with_nan(i, *at):
        other = [o.clone() if j < 5 else o for j, o in enumerate(args)]
        other[i][at] = nan
        out = native(*other)
        same = (out == clean).all(-1)
        assert (same | out.isnan().any(-1)).all()
        return ~same                                   # b n q
    bad = with_nan(0, 1, 2, 5, 0)
    assert bad.nonzero().tolist() == [[1, 2, 5]]
    for i in (1, 2): assert with_nan(i, 1, 2, 5, 0).nonzero().tolist() == [[1, 2, j] for j in range(12)]
    assert with_nan(4, 1, 1, 3, 0).nonzero().tolist() == [[1, n, j] for n in (2, 3) for j in range(12)]
    x, y = args[4][0, 0, :, 0], args[4][0, 0, :, 1]     # of the first image, the keys that head 0 reads
    bad, row, col = with_nan(3, 0, 2, 3), torch.arange(12) // 4, torch.arange(12) % 4
    reads = lambda i: (((x[:, None] if i is None else args[4][i, 0, :, :1]) + col - 3).abs() < 1) & (((args[4][i, 0, :, 1:]) + row - 2).abs() < 1)
    for i in (0, 1): assert torch.equal(bad[i, 0], reads(i).any(0))
    assert not bad[:, 1:].any()

def test_far_places(on):
    "What is far outside, or infinite, reads zeros."
    args = inputs(on)
    def at(x):
        other = list(args)
        other[4] = args[4].clone()
        other[4][0, 0, 2] = x
        return native(*other)
    for x in (1e4, -1e4, 1e30, -1e300, inf, -inf): assert torch.equal(at(x), at(99.))
    args = inputs(on, step=(.3, .2), th=4, tw=9)
    for x in (1e4, -1e4, 1e30, -1e300, inf, -inf): assert torch.equal(at(x), at(99.))

def test_large_scores(on):
    "The largest score of each query counts as 0, so that none overflows, whatever comes later."
    for dtype in (torch.float32, torch.float64):
        args = inputs(on, k=150, dtype=dtype)
        args[3] = args[3] * 1000
        assert_close(native(*args).double(), eager(*(o.double() for o in args[:5]), *args[5:]), rtol=1e-3, atol=1e-3)
    args[3][:] = -inf
    args[3][:, 2:, 3:] = 0
    out = native(*args)
    assert torch.equal(out.isnan(), eager(*args).isnan())

# ---- again and again

@pytest.mark.parametrize('case', [dict(b=3, n=3, g=1, h=9, w=9, k=70), dict(b=1, n=1, g=1, h=40, w=20, k=65), dict(b=1, n=2, g=1, h=2, w=300, k=20)], ids=str)
@types
def test_threads_do_not_matter(on, case, dtype):
    "The same bits in every run, with any number of threads."
    args, threads = inputs(on, dtype=dtype, **case), torch.get_num_threads()
    first, grad = run(args)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for a, b in zip(run(args, grad)[0], first): assert torch.equal(a, b), f'{count} threads'
    finally: torch.set_num_threads(threads)

CHILD = '''
import sys, torch
sys.path.insert(0, {tests!r})
from test_deformed_keys_kernel import *
worst = 0
for dtype in TYPES.values():
    for kind in STEPS:
        for size in (dict(h=9, w=11, k=70, d=33), dict(h=2, w=131, k=9, b=1), dict(h=5, w=3, d=7)): worst = max(worst, exact(inputs(dtype=dtype, **size, **steps(STEPS[kind], size))))
torch.save([run(inputs(dtype=dtype, h=9, w=9))[0] for dtype in TYPES.values()], {out!r})
print(worst)
'''

def test_instruction_sets(on, tmp_path, tell):
    "Each gives the same within rounding."
    found = {}
    for isa in ('baseline', 'avx2', 'avx512'):
        out = tmp_path/f'{isa}.pt'
        r = subprocess.run([sys.executable, '-c', CHILD.format(tests=str(root/'tests'), out=str(out))], env={**os.environ, 'DEFORMLIT_ISA': isa}, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        found[isa] = torch.load(out)
        tell(f'{isa}: errors of at most {float(r.stdout.split()[-1]):.2f} roundings')
    flags = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    if platform.machine() == 'x86_64' and ' avx2 ' in flags and ' fma ' in flags:
        assert not all(torch.equal(a, b) for x, y in zip(found['baseline'], found['avx2']) for a, b in zip(x, y)), 'asked for AVX2, but ran the same code'

# ---- PyTorch's ways

@pytest.mark.parametrize('kind', STEPS)
def test_gradcheck(on, kind):
    args = inputs(on, b=1, n=2, g=1, d=2, h=2, w=3, k=3, **steps(STEPS[kind], dict(h=2, w=3)))
    f = lambda *o: native(*o, *args[5:])
    leaves = [o.requires_grad_() for o in args[:5]]
    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)

@pytest.mark.parametrize('asked', [(0,), (1, 2), (3,), (4,), (0, 4)], ids=str)
def test_some_gradients(on, asked):
    args = inputs(on)
    want, grad = run(args)
    leaves = [o.requires_grad_(i in asked) for i, o in enumerate(args[:5])]
    got = torch.autograd.grad(native(*leaves, *args[5:]), [leaves[i] for i in asked], grad)
    for a, i in zip(got, asked): assert torch.equal(a, want[i + 1])

@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_opcheck(on, grad, dtype):
    args = [o.requires_grad_(grad) for o in inputs(on, dtype=dtype)[:5]]
    said = torch.library.opcheck(torch.ops.deformlit.deformed_keys.default, (*args, .9, .8, 3, 4))
    assert set(said.values()) == {'SUCCESS'} and len(said) == 4
    args = [o.detach() for o in args]
    out, sums = torch.ops.deformlit.deformed_keys(*args, .9, .8, 3, 4)
    said = torch.library.opcheck(torch.ops.deformlit.deformed_keys_backward.default, (torch.randn_like(out), *args, out, sums, .9, .8, 3, 4))
    assert set(said.values()) == {'SUCCESS'} and len(said) == 4

def test_transforms(on):
    "`torch.func`: the same as the eager form."
    *a, step, size, taps = inputs(on)
    def both(f):
        got = f(native)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): want = f(eager)
        for x, y in zip(got, want) if isinstance(got, tuple) else ((got, want),): assert_close(x, y)
    more = lambda x, dim=0: torch.stack([x, x * .9, x + .1], dim)
    rest = step, size, taps
    both(lambda f: torch.vmap(lambda q: f(q, *a[1:], *rest))(more(a[0])))
    both(lambda f: torch.vmap(lambda q, v, s: f(q, a[1], v, a[3], s, *rest), in_dims=(2, 3, 1), out_dims=1)(more(a[0], 2), more(a[2], 3), more(a[4], 1)))
    both(lambda f: torch.vmap(lambda t: f(*a[:3], t, a[4], *rest))(more(a[3])))
    both(lambda f: torch.func.jvp(lambda q, v: f(q, a[1], v, *a[3:], *rest), (a[0], a[2]), (a[0] * 2, a[2])))
    both(lambda f: torch.autograd.grad(torch.vmap(lambda q, t: f(q, *a[1:3], t, a[4], *rest))(*(x := [more(o).requires_grad_() for o in (a[0], a[3])])).square().sum(), x))

class Attention(nn.Module):
    def __init__(self, size): super().__init__(); self.bias, self.size = InterpolatedBias(4, size), size
    def forward(self, q, k, v, keys): return self.bias(q, k, v, self.size, keys)

def module(size=(6, 6)):
    torch.manual_seed(0)
    m = DeformedKeysAttention(16, 4, 2, 2, 3, PlusPlusGrid(), InterpolatedBias(4, size))
    for p in m.parameters(): nn.init.normal_(p, std=.3)
    return m

def test_module(on):
    "The module by native is the module by eager, gradients included."
    m, x, found = module(), torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0)), {}
    for size in ((6, 6), (5, 9)):
        x = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0))
        for way in ('eager', 'native'):
            with backend(way, 'table_attend'):
                out = m(x)
                assert _attend.ran == way
                found[way] = out, *torch.autograd.grad(out.square().sum(), list(m.parameters()))
        for a, b in zip(*found.values()): assert_close(a, b, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('backend_', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled(on, backend_):
    "One graph without breaks; batches of all sizes."
    m, graphs = module(), []
    def count(g, args):
        graphs.append(g)
        return torch._dynamo.backends.registry.lookup_backend(backend_)(g, args)
    torch._dynamo.reset()
    traced = torch.compile(m, fullgraph=True, dynamic=True, backend=count)
    for b in (2, 3, 5):
        x = torch.randn(b, 16, 6, 6, generator=torch.Generator().manual_seed(b))
        with backend('native', 'table_attend'):
            want, got = m(x), traced(x)
            assert_close(got, want, rtol=1e-4, atol=1e-4)
            a, b_ = (torch.autograd.grad(o.square().sum(), list(m.parameters())) for o in (got, want))
        for x, y in zip(a, b_): assert_close(x, y, rtol=1e-3, atol=1e-3)
    ops = [str(o.target) for g in graphs for o in g.graph.nodes if o.op == 'call_function']
    assert any('deformlit.deformed_keys' in o for o in ops) and len(graphs) <= 2

def test_export(on):
    "With a changing batch; saved and loaded."
    random = lambda b: (*(torch.randn(b, 4, o, 5) for o in (12, 6, 6)), torch.rand(b, 2, 2, 3, 2))
    m, batch = Attention((3, 4)), torch.export.Dim('b', min=2, max=100)
    with backend('native', 'table_attend'), torch.no_grad():
        program = torch.export.export(m, random(2), dynamic_shapes=({0: batch},) * 4)
        assert 'deformlit.deformed_keys.default' in str(program.graph)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for a in map(random, (2, 5)): assert_close(loaded(*a), m(*a), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['f16', 'bf16'])
def test_autocast(on, dtype):
    "Places and the table stay in float32; queries, keys and values are read in half precision."
    m, x = module(), torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    with backend('native', 'table_attend'):
        want = m(x)
        with torch.autocast('cpu', dtype): out = m(x)
        got = torch.autograd.grad(out.float().square().sum(), list(m.parameters()))
    assert _attend.ran == 'native'
    assert_close(out.float(), want, rtol=.1, atol=.5)
    assert all(o.dtype == torch.float32 and o.isfinite().all() for o in got)

def test_mixed_types(on):
    "The public function brings table and places to the kernel's type; gradients come back in each one's own."
    args = inputs(on, dtype=torch.float32)
    want, grad = run(args)
    args[3], args[4] = args[3].to(torch.float64), args[4].to(torch.float64)
    got, _ = run(args, grad)
    assert [o.dtype for o in got] == [torch.float32] * 4 + [torch.float64] * 2
    for a, b in zip(got, want): assert_close(a, b, check_dtype=False)

# ---- the choice, and what is refused

def test_chosen_by_itself(on):
    args = inputs(on)
    table_attend(*args)
    assert _attend.ran == 'native' and backends('table_attend', *args)['table_attend']['native'] == 'can run'
    if not torch.cuda.is_available(): assert _attend.plan(*(o.to('meta') if isinstance(o, torch.Tensor) else o for o in args))[0] == 'eager'
    args[0] = args[0].float()
    with backend('native'), pytest.raises(core.BackendError, match='differ in dtype'): table_attend(*args)

def test_wrong_calls(on):
    "The raw op checks what it is given, for it reads memory by these sizes."
    f = lambda *size, dtype=torch.float32: torch.rand(*size).to(on, dtype)
    good = dict(q=f(2, 4, 12, 5), k=f(2, 4, 7, 5), v=f(2, 4, 7, 5), table=f(4, 5, 7), start=f(2, 2, 7, 2), step_x=1., step_y=1., h=3, w=4)
    one = f(1, 1, 1, 1)
    bad = [dict(q=good['q'][0]), dict(q=f(2, 4, 11, 5)), dict(q=f(2, 3, 12, 5)), dict(q=f(2, 4, 12, 6)), dict(q=good['q'].double()), dict(q=good['q'].half()), dict(q=good['q'].long()), dict(q=None),
           dict(k=good['k'][0]), dict(k=f(2, 4, 6, 5)), dict(k=f(1, 4, 7, 5)), dict(k=f(2, 4, 7, 4)), dict(k=good['k'].half()), dict(v=f(2, 4, 6, 5)), dict(v=f(2, 4, 7, 4)), dict(v=good['v'].double()),
           dict(table=f(3, 5, 7)), dict(table=f(4, 5)), dict(table=f(4, 0, 7)), dict(table=f(4, 5, 0)), dict(table=good['table'].double()), dict(table=good['table'].half()), dict(table=one[0].expand(4, 2**23, 2**23)),
           dict(start=f(2, 3, 7, 2)), dict(start=f(2, 0, 7, 2)), dict(start=f(2, 2, 6, 2)), dict(start=f(1, 2, 7, 2)), dict(start=f(2, 2, 7, 3)), dict(start=f(2, 2, 7)), dict(start=good['start'].double()),
           dict(h=4), dict(w=3), dict(h=-3, w=-4), dict(h=0, w=0), dict(h=2**62, w=6), dict(h=12), dict(step_x=nan), dict(step_y=inf), dict(step_x=1e30)]
    op, back = torch.ops.deformlit.deformed_keys, torch.ops.deformlit.deformed_keys_backward
    out, sums = op(**good)
    assert out.shape == (2, 4, 5, 12) and sums.shape == (2, 4, 12)
    for i, o in enumerate(bad):
        for call in (lambda: op(**{**good, **o}), lambda: back(grad=out, out=out, sums=sums, **{**good, **o})):
            try: call()
            except (RuntimeError, ValueError, TypeError): continue
            pytest.fail(f'call {i} with {list(o)} did not raise')
    for o in (dict(grad=out.mT), dict(grad=out.double()), dict(grad=out[:1]), dict(out=out.half()), dict(out=out.mT), dict(sums=sums.double()), dict(sums=sums[:1]), dict(sums=out)):
        with pytest.raises((RuntimeError, ValueError)): back(**{**dict(grad=out, out=out, sums=sums), **good, **o})

def test_memory(on):
    "Forward makes two tensors, the output and a number for each query; nothing has queries times keys."
    from torch.utils._python_dispatch import TorchDispatchMode
    args, seen = inputs(on, h=14, w=14, k=196, d=32, dtype=torch.float32), []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, a=(), kw=None):
            seen.append(str(f))
            return f(*a, **(kw or {}))
    with torch.no_grad(), Watch(): native(*args)
    assert [o for o in seen if 'transpose' not in o] == ['deformlit.deformed_keys.default']
