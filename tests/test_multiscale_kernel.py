"""The native op on the CPU: values, gradients, layouts, numbers that are none, and all the ways PyTorch can run it; see multiscale_cases.py."""
import os, platform, subprocess, sys, timeit
from multiscale_cases import *
from multiscale_cases import _msda
from notebooks import root
from deformlit import core, native as library

@pytest.fixture(scope='module', autouse=True)
def on():
    need_native()
    return 'cpu'

# ---- threads

@pytest.mark.parametrize('case', [dict(b=3, n=3, q=50), dict(b=1, n=1, q=60, shapes=((9, 9), (5, 5), (2, 2))), dict(b=2, n=3, q=80, shapes=((20, 30), (2, 2), (7, 7))), dict(b=1, n=5, q=7, shapes=((20, 30), (2, 2)))], ids=str)
@types
def test_threads_do_not_matter(on, case, dtype):
    "The same bits in every run, with any number of threads."
    args, threads = inputs(on, d=40, k=4, dtype=dtype, **case), torch.get_num_threads()
    first, grad = run(*args)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for a, b in zip(run(*args, grad)[0], first): assert torch.equal(a, b), f'{count} threads'
    finally: torch.set_num_threads(threads)

def test_many_threads_at_once(on):
    "Calls from several threads of Python."
    from concurrent.futures import ThreadPoolExecutor
    args = inputs(on, q=100, d=16)
    want, grad = run(*args)
    with backend('native'), ThreadPoolExecutor(4) as pool:
        for got, _ in pool.map(lambda _: run(*args, grad), range(12)):
            for a, b in zip(got, want): assert torch.equal(a, b)

# ---- instruction sets

CHILD = '''
import sys, torch
sys.path.insert(0, {tests!r})
from multiscale_cases import *
worst = 0
for dtype in TYPES.values():
    for d in (1, 2, 3, 5, 8, 13, 16, 31, 32, 47, 64, 96, 100, 130): worst = max(worst, exact(inputs('cpu', shapes=((5, 6), (2, 2)), n=2, d=d, q=9, k=3, dtype=dtype, seed=d)))
    worst = max(worst, exact(inputs('cpu', shapes=((20, 30),), n=2, d=32, q=9, k=3, dtype=dtype)))
test_half_numbers('cpu')
torch.save([run(*inputs('cpu', d=d, dtype=dtype))[0] for dtype in TYPES.values() for d in (3, 32)], {out!r})
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
        tell(f'{isa}: errors of at most {float(r.stdout.split()[-1]):.2f} roundings')
    same = []
    for isa in ('avx2', 'avx512'):
        same.append(all(torch.equal(a, b) for x, y in zip(found['baseline'], found[isa]) for a, b in zip(x, y)))
        for x, y in zip(found['baseline'], found[isa]):
            for a, b in zip(x, y): assert_close(a, b, rtol=torch.finfo(a.dtype).eps * 4, atol=1e-4)
    flags = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    if platform.machine() == 'x86_64' and ' avx2 ' in flags and ' fma ' in flags: assert not same[0], 'asked for AVX2, but ran the same code'

def test_unknown_instruction_set(on):
    r = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(root/"tests")!r})\nfrom multiscale_cases import *\nnative(*inputs("cpu"))'],
                       env={**os.environ, 'DEFORMLIT_ISA': 'avx1024'}, capture_output=True, text=True)
    assert r.returncode and 'DEFORMLIT_ISA: expected baseline, avx2 or avx512, got avx1024' in r.stderr, r.stderr

# ---- what is refused

def test_memory_that_begins_within_a_number(on):
    value, shapes, points, weights = inputs(on)
    buffer = bytearray(4 * value.numel() + 4)
    odd = torch.frombuffer(buffer, dtype=torch.float32, offset=1, count=value.numel()).view(value.shape)
    with pytest.raises(RuntimeError, match='begins within a number'): torch.ops.deformlit.ms_deform_attn(odd, flat(shapes), points, weights)

def test_other_kinds_of_tensors(on):
    value, shapes, points, weights = inputs(on)
    for o in (value.to_sparse(), value.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError)): torch.ops.deformlit.ms_deform_attn(o, flat(shapes), points, weights)
    assert torch.ops.deformlit.ms_deform_attn(*(o.to('meta') if isinstance(o, torch.Tensor) else o for o in (value, flat(shapes), points, weights))).device.type == 'meta'

# ---- no compiler

def child(code, **env):
    r = subprocess.run([sys.executable, '-W', 'always', '-c', f'import sys; sys.path.insert(0, {str(root/"tests")!r})\n' + code], env={**os.environ, **{k: str(v) for k, v in env.items()}}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip(), r.stderr

def test_no_compiler(on, tmp_path):
    "Forced, it raises and says why; chosen by itself, the eager form runs, and that is said once."
    out, err = child('''
import torch
from deformlit import multiscale
from deformlit.core import *
from deformlit.multiscale import *
g = torch.Generator().manual_seed(0)
args = torch.randn(1, 6, 1, 2), [(2, 3)], torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)
for _ in range(3): ms_deform_attn(*args)
print(multiscale._msda.ran)
try:
    with backend('native'): ms_deform_attn(*args)
except BackendError as e: print(e)
print(backends('ms_deform_attn', *args)['ms_deform_attn']['native'])
''', CXX='no-such++', DEFORMLIT_CACHE=tmp_path/'cache')
    ran, raised, why = out.splitlines()
    assert ran == 'eager' and "'native' was asked for and cannot run" in raised and 'no-such++' in raised and 'no-such++' in why
    assert err.count('BackendWarning') == 1 and 'no-such++' in err

def test_built_when_first_used(on, tmp_path):
    "Nothing is built at import, nor by `backends` of another op; the first call builds, and says so in a line."
    if not (cxx := library.compiler('cpu')): return
    out, err = child('''
import os, torch
import deformlit.multiscale, deformlit.multiscale_kernel
print(os.path.exists(os.environ['DEFORMLIT_CACHE']))
''', DEFORMLIT_CACHE=tmp_path/'cache')
    assert out == 'False' and 'building' not in err

# ---- the choice, and its price

def test_chosen_by_itself(on):
    args = inputs(on)
    ms_deform_attn(*args)
    assert _msda.ran == 'native' and core.backends('ms_deform_attn', *args)['ms_deform_attn']['native'] == 'can run'
    if not torch.cuda.is_available(): assert _msda.plan(*(o.to('meta') if isinstance(o, torch.Tensor) else o for o in args))[0] == 'eager'

def test_boundary(on, tell):
    "A call on one number costs a few microseconds; the bound is wide, for other tests run at the same time."
    value, shapes, points, weights = inputs(on, b=1, shapes=((1, 1),), n=1, d=1, q=1, k=1)
    op, sizes = torch.ops.deformlit.ms_deform_attn, flat(shapes)
    least = lambda f: min(timeit.repeat(f, number=200, repeat=50)) / 200 * 1e6
    with torch.no_grad(): times = least(lambda: op(value, sizes, points, weights)), least(lambda: ms_deform_attn(value, shapes, points, weights))
    v = value.clone().requires_grad_()
    times += least(lambda: ms_deform_attn(v, shapes, points, weights)),
    tell('a call of the native op: {:.1f} us, of ms_deform_attn {:.1f} us, with a gradient to come {:.1f} us'.format(*times))
    assert max(times) < 60

def test_memory(on):
    "Forward needs no room but the output."
    from torch.utils._python_dispatch import TorchDispatchMode
    args = inputs(on, q=100, d=32)
    seen = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, a=(), kw=None):
            seen.append(str(f))
            return f(*a, **(kw or {}))
    with torch.no_grad(), Watch(): native(*args)
    assert seen == ['deformlit.ms_deform_attn.default']
