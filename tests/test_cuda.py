"""The native op on a GPU, by the library that nvcc makes and by NVRTC. Without a GPU these tests are skipped; test_cuda_on_cpu.py then runs the same kernels on the CPU."""
import os, shutil, subprocess, sys
import pytest, torch
from notebooks import root
from deformlit import core, multiscale_kernel, native as library
from deformlit.native import cuda_home, needs_library, needs_nvrtc
if not torch.cuda.is_available(): pytest.skip('no GPU: torch.cuda.is_available() is False', allow_module_level=True)
from multiscale_cases import *
from multiscale_cases import _msda
from multiscale_cases import native as call

CHANNELS = range(1, 131)

@pytest.fixture(scope='module', params=['nvcc', 'NVRTC'], autouse=True)
def built_by(request):
    "Each kind of kernels in turn, under the same op."
    if request.param == 'nvcc':
        if not cuda_home(): pytest.skip('no CUDA toolkit: nvcc was not found')
        assert needs_library('cuda') is None, needs_library('cuda')
        yield 'nvcc'
        return
    assert needs_nvrtc() is None, needs_nvrtc()
    lib = torch.library.Library('deformlit', 'IMPL')
    ran = []
    def counted(f): return lambda *args: (ran.append(f.__name__), f(*args))[1]
    for name, f in (('ms_deform_attn', multiscale_kernel._nvrtc_forward), ('ms_deform_attn_backward', multiscale_kernel._nvrtc_backward)): lib.impl(name, counted(f), 'CUDA', allow_override=True)
    yield 'NVRTC'
    lib._destroy()
    assert {'_nvrtc_forward', '_nvrtc_backward'} <= set(ran)

@pytest.fixture
def on(built_by): return 'cuda'

# ---- the same as the CPU, and as itself

@types
def test_same_as_the_cpu(on, dtype):
    need_native()
    args = inputs('cpu', shapes=((12, 9), (5, 7), (2, 2)), n=4, d=32, q=301, k=4, dtype=dtype)
    want, grad = run(*args)
    got, _ = run(*(o.to(on) if isinstance(o, torch.Tensor) else o for o in args), grad.to(on))
    skip = near_kink(args[2], args[1])
    for i, (a, b) in enumerate(zip(got, want)):
        a = a.cpu()
        if i == 2: a, b = (o.masked_fill(skip[..., None], 0) for o in (a, b))
        half = dtype in (torch.float16, torch.bfloat16) and i < 2
        assert_close(a, b, rtol=2 * torch.finfo(dtype).eps if half else 1e-9 if dtype == torch.float64 else 1e-4, atol=1e-3 if half else 1e-9 if dtype == torch.float64 else 1e-3)

@types
def test_large(on, dtype):
    "More work than blocks that run at once; wide and narrow rows."
    for d in (32, 30): exact(inputs(on, b=2, shapes=((40, 50), (20, 25), (10, 13), (5, 7)), n=8, d=d, q=1009, k=4, dtype=dtype))

@types
def test_forward_repeats(on, dtype):
    "The reading and the gradients to points and weights need no asking: always the same bits."
    args = inputs(on, q=500, d=32, n=4, k=4, dtype=dtype)
    first, grad = run(*args)
    for _ in range(5):
        got, _ = run(*args, grad)
        for i in (0, 2, 3): assert torch.equal(got[i], first[i])

@types
def test_deterministic_under_load(on, dtype):
    "Many threads add to few pixels: still the same bits, run after run."
    args = inputs(on, b=2, shapes=((3, 3), (1, 1)), q=4001, d=32, n=4, k=4, dtype=dtype)
    repeats(args, 10)
    exact(args)

# ---- streams, devices, graphs

def test_other_stream(on):
    "Work goes to the current stream: it waits for what that stream does before, and other streams do not."
    args, side = inputs(on, q=300, d=32, n=4), torch.cuda.Stream()
    want, grad = run(*args)
    busy = torch.randn(4096, 4096, device=on)
    value = torch.zeros_like(args[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20): busy = (busy @ busy).clamp(-1, 1)
        value.copy_(args[0])                            # late: the op must come after it
        got, _ = run(value, *args[1:], grad)
    side.synchronize()
    assert_close(got, want, rtol=1e-4, atol=1e-4)

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f'{torch.cuda.device_count()} GPU: this needs two')
def test_other_device(on):
    "A device that is not the current one."
    with torch.cuda.device(0):
        args = inputs('cuda:1')
        assert all(o.device == torch.device('cuda:1') for o in run(*args)[0])
        exact(args)
        value, shapes, points, weights = args
        with pytest.raises((RuntimeError, ValueError)): torch.ops.deformlit.ms_deform_attn(value.to('cuda:0'), flat(shapes), points, weights)

def test_mixed_devices(on):
    value, shapes, points, weights = inputs(on)
    for args in ((value.cpu(), points, weights), (value, points.cpu(), weights), (value, points, weights.cpu())):
        with pytest.raises((RuntimeError, ValueError)): torch.ops.deformlit.ms_deform_attn(args[0], flat(shapes), *args[1:])

@pytest.mark.parametrize('deterministic', [False, True])
def test_graph(on, deterministic):
    "Captured once, forward and backward, and replayed with other numbers in the same memory."
    value, shapes, points, weights = inputs(on, q=100, d=32, n=4)
    args = [o.clone().requires_grad_() for o in (value, points, weights)]
    grad, side = torch.randn(2, 100, 128, device=on), torch.cuda.Stream()
    def step():
        out = call(args[0], shapes, *args[1:])
        return (out, *torch.autograd.grad(out, args, grad))
    torch.use_deterministic_algorithms(deterministic)
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): held = step()
        for seed in (1, 2, 3):
            other = inputs(on, q=100, d=32, n=4, seed=seed)
            with torch.no_grad():
                for a, b in zip(args, (other[0], *other[2:])): a.copy_(b)
                grad.copy_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            got, want = [o.clone() for o in held], run(*other, grad)[0]
            for a, b in zip(got, want): assert_close(a, b, rtol=1e-4, atol=1e-4)
    finally: torch.use_deterministic_algorithms(False)

@pytest.mark.slow
def test_reduce_overhead(on):
    "`torch.compile(mode='reduce-overhead')`: CUDA graphs, made by PyTorch."
    m, args = module(on), module_args(on)
    torch._dynamo.reset()
    traced = torch.compile(m, fullgraph=True, mode='reduce-overhead')
    with backend('native'), torch.no_grad():
        for _ in range(4): assert_close(traced(*args), m(*args), rtol=1e-3, atol=1e-3)

def test_nothing_waits_for_the_gpu(on):
    "No synchronisation, forward and backward, of the op and of the module."
    args, m, of_module = inputs(on), module(on), module_args(on)
    run(*args); m(*of_module)                            # compiled and remembered
    torch.cuda.set_sync_debug_mode('error')
    try:
        leaves = [o.detach().requires_grad_() for o in (args[0], *args[2:])]
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            out = call(leaves[0], args[1], *leaves[1:])
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.use_deterministic_algorithms(False)
        with backend('native'): m(*of_module).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
        torch.use_deterministic_algorithms(False)

# ---- failures, memory, choice

def test_too_many_levels(on):
    value, shapes, points, weights = inputs(on, shapes=((1, 1),) * 129, q=1, k=1)
    with pytest.raises((RuntimeError, ValueError), match='128 levels'): torch.ops.deformlit.ms_deform_attn(value, flat(shapes), points, weights)
    with backend('native'), pytest.raises(core.BackendError, match='128 levels'): ms_deform_attn(value, shapes, points, weights)
    ms_deform_attn(value, shapes, points, weights)
    assert _msda.ran == 'eager'
    exact(inputs(on, shapes=((1, 1),) * 128, q=2, k=1, n=1))

def test_memory(on):
    "Forward takes no room but the output's; backward in float32 none but the gradients'."
    value, shapes, points, weights = inputs(on, shapes=((40, 50), (20, 25)), q=2500, d=32, n=8, k=4)
    def peak(f):
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, out
    size = lambda *t: sum(-(-o.numel() * o.element_size() // 512) * 512 for o in t)
    with torch.no_grad(): used, out = peak(lambda: call(value, shapes, points, weights))
    assert used <= size(out) + 2**12
    used, got = peak(lambda: torch.ops.deformlit.ms_deform_attn_backward(out, value, flat(shapes), points, weights, False))
    assert used <= size(*got) + 2**14

def test_chosen_by_itself(on):
    args = inputs(on)
    ms_deform_attn(*args)
    assert _msda.ran == 'native'

BROKEN = '''
import sys, torch
sys.path.insert(0, {tests!r})
from multiscale_cases import *
args = inputs('cuda')
native(*args)
try:
    torch._assert_async(torch.zeros((), device='cuda'))     # from here on this process's GPU refuses everything
    torch.cuda.synchronize()
except RuntimeError: pass
try: native(*args)
except RuntimeError: print('raised')
'''

def test_a_launch_that_fails_raises(built_by):
    "Of NVRTC's by a block of too many threads; of the library's in a child whose GPU refuses everything."
    if built_by == 'NVRTC':
        k = library.Kernels((root/'kernels'/'multiscale_cuda.h').read_text(), [root/'kernels'])
        with pytest.raises(RuntimeError, match='CUDA error'): k.launch('msda_largest_f32', (1, 1, 1), (4096, 1, 1), torch.ones(1, device='cuda'), 1, torch.zeros(1, device='cuda'))
        return
    r = subprocess.run([sys.executable, '-c', BROKEN.format(tests=str(root/'tests'))], env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True)
    assert 'raised' in r.stdout, r.stderr

SANITIZED = '''
import sys
sys.path.insert(0, {tests!r})
from multiscale_cases import *
if {nvrtc}:
    from deformlit import multiscale_kernel, native
    native._answers['cuda', None] = 'not asked for'
for dtype in TYPES.values():
    for d in (3, 16, 40): exact(inputs('cuda', d=d, q=40, dtype=dtype))
    test_repeatable_when_asked('cuda', dtype)
for layout in LAYOUTS: test_layouts_of_values('cuda', layout, 8, torch.float32)
for empty in (dict(q=0), dict(b=0), dict(k=0), dict(d=0), dict(n=0)): test_nothing_to_do('cuda', empty, torch.float32)
import dilated_cases as dilated
for dtype in TYPES.values():
    for ks in (3, 5): dilated.exact(dilated.inputs('cuda', n=6, d=8, h=5, w=9, dtype=dtype), ks, (1, 2, 3))
'''

@pytest.mark.slow
@pytest.mark.parametrize('tool', ['memcheck', 'racecheck', 'initcheck', 'synccheck'])
def test_compute_sanitizer(built_by, tool, tmp_path):
    "NVIDIA's checks of every access, race and wait."
    found = shutil.which('compute-sanitizer') or cuda_home() and next((str(o) for o in (cuda_home()/'bin/compute-sanitizer', cuda_home()/'compute-sanitizer/compute-sanitizer') if o.exists()), None)
    if not found: pytest.skip('compute-sanitizer was not found')
    r = subprocess.run([found, '--tool', tool, '--error-exitcode', '9', '--kernel-name-exclude', 'kns=at::', sys.executable, '-c', SANITIZED.format(tests=str(root/'tests'), nvrtc=built_by == 'NVRTC')],
                       env={**os.environ, 'PYTHONPATH': str(root), 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}, capture_output=True, text=True)
    assert r.returncode == 0, (r.stdout + r.stderr)[-5000:]
