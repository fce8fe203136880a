"""The CUDA kernels of dilated windows: on the CPU by cuda_on_cpu.cpp everywhere, and on a GPU where there is one, by nvcc's library and by NVRTC."""
import contextlib, ctypes
from dilated_cases import *
from test_cuda_on_cpu import OnCpu, build
from deformlit import dilated_kernel
from deformlit.native import cuda_home, needs_library, needs_nvrtc

CHANNELS = (1, 7, 8, 9, 33, 64, 65, 130)
BY_NVRTC = (('dilated_attn', dilated_kernel._nvrtc_forward), ('dilated_attn_backward', dilated_kernel._nvrtc_backward))

@contextlib.contextmanager
def standing_in(path):
    "Within the block the native op on the CPU is the CUDA kernels'."
    kernels, lib, patch = OnCpu(path), torch.library.Library('deformlit', 'IMPL'), pytest.MonkeyPatch()
    patch.setattr(dilated_kernel, '_kernels', lambda: kernels)
    patch.setattr(torch.cuda, 'device', lambda d: contextlib.nullcontext())
    for name, f in BY_NVRTC: lib.impl(name, f, 'CPU', allow_override=True)
    try: yield kernels
    finally:
        lib._destroy()
        patch.undo()

@pytest.fixture(scope='module', params=['on the CPU', 'nvcc', 'NVRTC'])
def kernels(request, tmp_path_factory):
    if request.param == 'on the CPU':
        need_native()
        with standing_in(build(tmp_path_factory.mktemp('cuda_on_cpu'))) as k: yield k
        return
    if not torch.cuda.is_available(): pytest.skip('no GPU: torch.cuda.is_available() is False')
    if request.param == 'nvcc':
        if not cuda_home(): pytest.skip('no CUDA toolkit: nvcc was not found')
        assert needs_library('cuda') is None, needs_library('cuda')
        yield None
        return
    assert needs_nvrtc() is None, needs_nvrtc()
    lib = torch.library.Library('deformlit', 'IMPL')
    for name, f in BY_NVRTC: lib.impl(name, f, 'CUDA', allow_override=True)
    yield None
    lib._destroy()

@pytest.fixture
def on(kernels): return 'cuda' if kernels is None else 'cpu'

def test_which_kernels_run(kernels):
    if kernels is None: pytest.skip('counted on the CPU')
    kernels.ran.clear()
    run(*inputs('cpu', dtype=torch.float16), 3, (1, 2))
    assert kernels.ran == ['dilated_forward_f16', 'dilated_backward_f16', 'dilated_gather_f16']

@pytest.mark.parametrize('case', [dict(b=1, n=3, d=5, h=7, w=11), dict(b=2, n=1, d=70, h=3, w=3), dict(b=1, n=1, d=1, h=40, w=2)], ids=str)
def test_blocks_and_orders(kernels, on, case):
    "Several blocks and tails, fewer blocks than there is work, threads in any order: the same bits."
    args = inputs(on, **case)
    for ks in (3, 5):
        exact(args, ks, 1)
        if kernels is None: continue
        first, grad = run(*args, ks, 1)
        for kernels.seed, kernels.most in ((1, 1 << 30), (2, 1), (3, 2)):
            for a, b in zip(run(*args, ks, 1, grad=grad)[0], first): assert torch.equal(a, b)
        kernels.seed, kernels.most = 0, 1 << 30

def test_many_dilations(kernels, on):
    q, k, v = inputs(on, n=65, d=1)
    with pytest.raises((RuntimeError, ValueError), match='64'): torch.ops.deformlit.dilated_attn(q, k, v, 3, [1] * 65, 0., 1.)

def test_same_as_the_cpu(kernels, on):
    if kernels is not None: pytest.skip('there is no GPU to compare')
    for dtype in TYPES.values():
        args = inputs('cpu', n=3, d=24, h=56, w=56, dtype=dtype)
        want, grad = run(*args, 3, (1, 2, 3))
        got, _ = run(*(o.to(on) for o in args), 3, (1, 2, 3), grad=grad.to(on))
        for a, b in zip(got, want): assert_close(a.cpu(), b, rtol=2 * torch.finfo(dtype).eps, atol=1e-9 if dtype == torch.float64 else 1e-3)
