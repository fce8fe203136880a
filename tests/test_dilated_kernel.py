"""The native op of dilated windows on the CPU: values, gradients, layouts, numbers that are none, threads, instruction sets, the exponential; see dilated_cases.py."""
import ctypes, os, subprocess, sys, timeit
from dilated_cases import *
from hypothesis import HealthCheck, given, settings, strategies as st
from notebooks import root
from deformlit import core, native as library
from deformlit.dilated import _dilated

@pytest.fixture(scope='module', autouse=True)
def on():
    need_native()
    return 'cpu'

# ---- random sizes

count = lambda low, high: st.integers(low, high)
problems = st.fixed_dictionaries(dict(b=count(0, 3), n=st.sampled_from([1, 2, 4, 6]), d=st.one_of(count(1, 9), count(1, 40)), h=st.one_of(count(1, 9), count(1, 40)), w=st.one_of(count(1, 9), count(1, 40)),
                                      dtype=st.sampled_from(list(TYPES.values())), seed=count(0, 2**31)))

def fuzz(examples):
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(problems, st.sampled_from([1, 3, 5, 9]), st.lists(count(1, 9), min_size=1, max_size=2), st.sampled_from([0., -inf, -2., 1.]), st.sampled_from([None, *LAYOUTS, *SAME]))
    def each(sizes, kernel_size, dilations, padding, layout):
        args = inputs('cpu', **sizes)
        if layout and sizes['b']: args = [LAYOUTS[layout](o) if layout in LAYOUTS else o.narrow(SAME[layout], 0, 1).expand(o.shape) for o in args]
        exact(args, kernel_size, tuple(dilations) if sizes['n'] % len(dilations) == 0 else dilations[0], padding)
    each()

def test_fuzz(on): fuzz(150)

@pytest.mark.slow
def test_fuzz_10_000(on): fuzz(10_000)

# ---- threads

@pytest.mark.parametrize('case', [dict(b=3, n=3, h=30, w=20), dict(b=1, n=1, h=70, w=9), dict(b=1, n=3, h=56, w=56), dict(b=2, n=6, h=9, w=17)], ids=str)
@types
def test_threads_do_not_matter(on, case, dtype):
    "The same bits in every run, with any number of threads; few images and heads are cut into strips."
    args, threads, dilation = inputs(on, d=24, dtype=dtype, **case), torch.get_num_threads(), (1, 2, 3)[:case['n']]
    first, grad = run(*args, 3, dilation)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for a, b in zip(run(*args, 3, dilation, grad=grad)[0], first): assert torch.equal(a, b), f'{count} threads'
    finally: torch.set_num_threads(threads)

def test_strips_are_exact(on):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for ks, dilation, h in ((3, 1, 80), (5, 1, 40), (3, 2, 33), (1, 1, 20)): exact(inputs(on, b=1, n=1, d=24, h=h, w=20), ks, dilation)
    finally: torch.set_num_threads(threads)

# ---- instruction sets, and the exponential

CHILD = '''
import sys, torch
sys.path.insert(0, {tests!r})
from dilated_cases import *
worst = 0
for dtype in TYPES.values():
    for w in (1, 2, 3, 5, 8, 13, 16, 31, 32, 47): worst = max(worst, exact(inputs('cpu', n=3, d=9, w=w, dtype=dtype, seed=w), 3, (1, 2, 3)))
    worst = max(worst, exact(inputs('cpu', d=24, h=9, w=20, dtype=dtype), 7, 1, -1.))
torch.save([run(*inputs('cpu', n=3, d=24, h=9, w=20, dtype=dtype), 3, (1, 2, 3))[0] for dtype in TYPES.values()], {out!r})
print(worst)
'''

def test_instruction_sets(on, tmp_path, tell):
    "Each gives the same within rounding; one that the processor lacks falls back to the next."
    found = {}
    for isa in ('baseline', 'avx2', 'avx512'):
        out = tmp_path/f'{isa}.pt'
        r = subprocess.run([sys.executable, '-c', CHILD.format(tests=str(root/'tests'), out=str(out))], env={**os.environ, 'DEFORMLIT_ISA': isa}, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        found[isa] = torch.load(out)
        tell(f'dilated windows, {isa}: errors of at most {float(r.stdout.split()[-1]):.2f} roundings')
    for isa in ('avx2', 'avx512'):
        for x, y in zip(found['baseline'], found[isa]):
            for a, b in zip(x, y): assert_close(a, b, rtol=torch.finfo(a.dtype).eps * 4, atol=1e-4)
    flags = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    if ' avx2 ' in flags and ' fma ' in flags: assert not all(torch.equal(a, b) for x, y in zip(found['baseline'], found['avx2']) for a, b in zip(x, y)), 'asked for AVX2, but ran the same code'

EXP = '''
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <cstdint>
#include <type_traits>
#include "cpu.h"
using namespace deformlit;
#define KERNEL "one.h"
#include "isa.h"
template <typename F> void all(F f, const void* x, void* y, int64_t n);
extern "C" __attribute__((visibility("default"))) void narrow(int isa, const float* x, float* y, int64_t n) { (isa == 2 ? avx512::all<float> : isa == 1 ? avx2::all<float> : baseline::all<float>)(x, y, n); }
extern "C" __attribute__((visibility("default"))) void wide(int isa, const double* x, double* y, int64_t n) { (isa == 2 ? avx512::all<double> : isa == 1 ? avx2::all<double> : baseline::all<double>)(x, y, n); }
'''
ONE = '''
#include "vectors.h"
#include "exp.h"
template <typename A> void all(const A* x, A* y, int64_t n) {
    constexpr int W = LANES * sizeof(float) / sizeof(A);
    for (int64_t i = 0; i < n; i += W) store<W>(y + i, exponential(load<W>(x + i)));
}
'''

def test_exponential(on, tmp_path, tell):
    "Below two units of the last place, for every instruction set that this processor has."
    (tmp_path/'exp.cpp').write_text(EXP.replace('template <typename F> void all(F f, const void* x, void* y, int64_t n);\n', ''))
    (tmp_path/'one.h').write_text(ONE)
    out, flags = tmp_path/'exp.so', open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    sets = [i for i, needed in enumerate(('', ' avx2 ', ' avx512dq ')) if needed in flags]
    if sets != [0, 1, 2]: pytest.skip('this processor has not all of the instruction sets')
    r = subprocess.run([library.compiler('cpu'), *library.settings()['cpu']['flags'], '-DTORCH_TARGET_VERSION=0x020b000000000000', f'-I{root}/kernels', f'-I{tmp_path}', f'-I{library.torch_folder()}/include', str(tmp_path/'exp.cpp'), '-o', str(out)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    lib = ctypes.CDLL(str(out))
    n, g = 1 << 20, torch.Generator().manual_seed(0)
    some = torch.tensor([0., -0., -1e-30, -86.99, -87., -87.5, -100., -708.5, -1e30, -inf, nan] + [0.] * 5, dtype=torch.float64)
    for name, dtype, least in (('narrow', torch.float32, -87), ('wide', torch.float64, -708)):
        x = torch.cat([some, -torch.rand(n // 2, generator=g, dtype=torch.float64) * -least, -10 ** (torch.rand(n // 2, generator=g, dtype=torch.float64) * 12 - 10)]).to(dtype)
        for isa in sets:
            y = torch.empty_like(x)
            getattr(lib, name)(isa, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
            assert torch.equal(y.isnan(), x.isnan()) and (y[x < least] == 0).all()
            want = x.double().exp() if dtype == torch.float32 else x.exp()
            there = (x >= least).nonzero()[:, 0]
            unit = torch.finfo(dtype).eps * 2 ** want[there].log2().floor()
            worst = ((y[there].double() - want[there]).abs() / unit).max().item()
            assert worst < (1.5 if dtype == torch.float32 else 2)          # float64 is compared with PyTorch's own, which is rounded too
            tell(f'exponential, {name}, set {isa}: {worst:.2f} units of the last place')

# ---- what is refused

def test_memory_that_begins_within_a_number(on):
    q, k, v = inputs(on)
    odd = torch.frombuffer(bytearray(4 * q.numel() + 4), dtype=torch.float32, offset=1, count=q.numel()).view(q.shape)
    for args in ((odd, k, v), (q, odd, v), (q, k, odd)):
        with pytest.raises(RuntimeError, match='begins within a number'): torch.ops.deformlit.dilated_attn(*args, 3, [1], 0., 1.)

def test_other_kinds_of_tensors(on):
    q, k, v = inputs(on)
    for o in (q.to_sparse(), q.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError)): torch.ops.deformlit.dilated_attn(o, k, v, 3, [1], 0., 1.)
    assert torch.ops.deformlit.dilated_attn(*(o.to('meta') for o in (q, k, v)), 3, [1], 0., 1.).device.type == 'meta'

def test_no_kernel_for_a_type(on):
    q = torch.zeros(1, 1, 1, 2, 2, dtype=torch.float8_e4m3fn)
    assert 'no kernel for' in _dilated.why_not('native', q, q, q, 3, 1, 0., None)

# ---- the choice, and its price

def test_chosen_by_itself(on):
    args = inputs(on, n=3, d=24, h=56, w=56)
    dilated_attn(*args, 3, (1, 2, 3))
    assert _dilated.ran == 'native' and core.backends('dilated_attn', *args, 3, 1, 0., None)['dilated_attn']['native'] == 'can run'

def test_no_compiler(on, tmp_path):
    "Forced, it raises and says why; chosen by itself, the eager form runs, and that is said once."
    code = f'''
import sys; sys.path.insert(0, {str(root/"tests")!r})
import torch
from deformlit import dilated
from deformlit.core import *
from deformlit.dilated import *
q = torch.randn(1, 1, 2, 3, 3)
for _ in range(3): dilated_attn(q, q, q)
print(dilated._dilated.ran)
try:
    with backend('native'): dilated_attn(q, q, q)
except BackendError as e: print(e)
'''
    r = subprocess.run([sys.executable, '-W', 'always', '-c', code], env={**os.environ, 'CXX': 'no-such++', 'DEFORMLIT_CACHE': str(tmp_path)}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    ran, raised = r.stdout.splitlines()
    assert ran == 'eager' and "'native' was asked for and cannot run" in raised and 'no-such++' in raised and r.stderr.count('BackendWarning') == 1

def test_boundary(on, tell):
    "A call on one number costs a few microseconds; the bound is wide, for other tests run at the same time."
    q, k, v = inputs(on, b=1, n=1, d=1, h=1, w=1)
    op, least = torch.ops.deformlit.dilated_attn, lambda f: min(timeit.repeat(f, number=200, repeat=50)) / 200 * 1e6
    with torch.no_grad(): times = least(lambda: op(q, k, v, 3, [1], 0., 1.)), least(lambda: dilated_attn(q, k, v))
    q.requires_grad_()
    times += least(lambda: dilated_attn(q, k, v)),
    tell('a call of the native op of dilated windows: {:.1f} us, of dilated_attn {:.1f} us, with a gradient to come {:.1f} us'.format(*times))
    assert max(times) < 80

def test_memory(on):
    "No tensor but the results, forward and backward; three views of one map go in as they are."
    from torch.utils._python_dispatch import TorchDispatchMode
    qkv, seen = torch.randn(2, 3, 2, 8, 5, 6), []
    q, k, v = qkv.unbind(1)
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, a=(), kw=None):
            seen.append(str(f))
            return f(*a, **(kw or {}))
    with torch.no_grad(), Watch(): native(q, k, v, 3, (1, 2))
    assert seen == ['deformlit.dilated_attn.default']
