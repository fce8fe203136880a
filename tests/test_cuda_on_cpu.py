"""The CUDA kernels run on the CPU, by cuda_on_cpu.cpp: their arithmetic of indices, their waiting for one another, and the Python code that launches them.

The kernels stand in for the native op's CPU form, so the tests of multiscale_cases.py run on them as they are.
"""
import contextlib, ctypes, os, subprocess
import pytest, torch
import sanitize
from notebooks import root
from deformlit import multiscale_kernel, native
from multiscale_cases import (LEAST, TYPES, exact, inputs, near_kink, need_native, run, truth, types, units, test_precision, test_sizes, test_channels, test_nothing_to_do, test_half_numbers, test_layouts_of_values,
    test_layouts_of_the_rest, test_inputs_are_not_changed, test_results_are_fresh, test_nan_in_a_point, test_far_points, test_bad_pixel, test_bad_weight_and_gradient, test_repeatable_when_asked, test_gradcheck, test_wrong_calls, test_most_pixels)

CHANNELS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 33, 40, 63, 64, 65, 96, 127, 128, 129, 256, 264, 300]
WARN = '-Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas -Wno-unused-parameter -Wno-deprecated-copy -Werror'.split()

class OnCpu(native.Kernels):
    "`Kernels` whose threads are fibers."
    def __init__(self, path):
        super().__init__('')
        self.lib, self.seed, self.most, self.ran = ctypes.CDLL(str(path)), 0, 1 << 30, []
    def launch(self, name, grid, block, *args, shared=0):
        assert grid[1:] == block[1:] == (1, 1) and 0 < grid[0] <= 1 << 30 and block == (256, 1, 1) and not shared
        values = [native._argument(o) for o in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(o) for o in values))
        assert self.lib.launch(name.encode(), min(grid[0], self.most), 256, pointers, self.seed) == 0, f'no kernel {name}'
        self.ran.append(name)

def build(folder, kernels=root/'kernels', flags=()):
    out = folder/'cuda_on_cpu.so'
    if os.environ.get('DEFORMLIT_FLAGS'): flags = [*flags, *os.environ['DEFORMLIT_FLAGS'].split()]     # of `make test-sanitize`
    elif sanitize.environment(): flags = [*flags, '-fsanitize=undefined', '-fno-sanitize-recover=undefined']
    r = subprocess.run([native.compiler('cpu'), '-std=c++17', '-O1', '-g', '-shared', '-fPIC', '-fvisibility=hidden', '-ffp-contract=off', *WARN, *flags, f'-I{kernels}', f'-isystem{native.torch_folder()/"include"}',
                        str(root/'tests/cuda_on_cpu.cpp'), '-o', str(out)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return out

@pytest.fixture(scope='module')
def library(tmp_path_factory):
    need_native()
    return build(tmp_path_factory.mktemp('cuda_on_cpu'))

@contextlib.contextmanager
def standing_in(path):
    "Within the block the native op on the CPU is the CUDA kernels'."
    kernels, lib, patch = OnCpu(path), torch.library.Library('deformlit', 'IMPL'), pytest.MonkeyPatch()
    patch.setattr(multiscale_kernel, '_kernels', lambda: kernels)
    patch.setattr(torch.cuda, 'device', lambda d: contextlib.nullcontext())
    for name, f in (('ms_deform_attn', multiscale_kernel._nvrtc_forward), ('ms_deform_attn_backward', multiscale_kernel._nvrtc_backward)): lib.impl(name, f, 'CPU', allow_override=True)
    try: yield kernels
    finally:
        lib._destroy()
        patch.undo()

@pytest.fixture
def kernels(library):
    with standing_in(library) as k: yield k

@pytest.fixture
def on(kernels): return 'cpu'

# ---- the kernels themselves

WIDE = {torch.float32: 4, torch.float64: 2, torch.float16: 8, torch.bfloat16: 8}

@types
def test_which_kernels_run(kernels, dtype):
    "Wide reads where every row begins at a multiple of 16 bytes, of the gradient too; the deterministic gradient by integers."
    name = {v: k for k, v in TYPES.items()}[dtype]
    def ran(args, grad=None):
        kernels.ran.clear()
        run(*args, grad)
        return kernels.ran
    finish = [] if dtype in (torch.float32, torch.float64) else [f'msda_finish_{name}']
    def both(vec, back=None): return [f'msda_forward_{name}_{vec}', f'msda_backward_{name}_{back or vec}', *finish]
    wide = inputs('cpu', d=16, dtype=dtype)
    assert ran(wide) == both(WIDE[dtype])
    assert ran(inputs('cpu', d=15, dtype=dtype)) == both(1)
    value, *rest = wide
    further = lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert ran((further(value), *rest)) == both(1)
    assert ran((torch.cat([value, value[..., :1]], 3)[..., :16], *rest)) == both(1)
    assert ran(wide, further(torch.randn(2, 4, 32).to(dtype))) == both(WIDE[dtype], 1), 'a gradient that begins between two words'
    torch.use_deterministic_algorithms(True)
    try: assert ran(wide) == [f'msda_forward_{name}_{WIDE[dtype]}', f'msda_largest_{name}', f"msda_largest_{'f64' if dtype == torch.float64 else 'f32'}", f'msda_backward_{name}_{WIDE[dtype]}', f'msda_finish_{name}']
    finally: torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('case', [dict(d=3, n=2, q=150, k=2), dict(d=1, n=3, q=600, k=5, shapes=((3, 3),)), dict(d=32, n=1, q=70, k=40), dict(d=64, n=1, q=3, k=90, shapes=((4, 5), (2, 2), (3, 1))), dict(d=16, n=1, b=1, q=1, k=700)], ids=str)
def test_blocks_and_pieces(kernels, case, deterministic):
    "Several blocks, tails, more points of a query than a block looks at in one go; also with fewer blocks than there is work."
    args = inputs('cpu', **case)
    torch.use_deterministic_algorithms(deterministic)
    try:
        exact(args, fixed=deterministic)
        kernels.most = 2
        exact(args, fixed=deterministic)
    finally: torch.use_deterministic_algorithms(False)

@types
def test_order_of_threads(kernels, dtype):
    "Whatever thread runs first: the reading and the gradients to points and weights are the same bits, and the deterministic gradient to the values too."
    args = inputs('cpu', b=1, shapes=((3, 4), (2, 2)), n=2, d=9 if dtype == torch.float64 else 16, q=70, k=4, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, grad = run(*args)
        for kernels.seed in range(1, 6):
            for a, b in zip(run(*args, grad)[0], first): assert torch.equal(a, b)
    finally: torch.use_deterministic_algorithms(False)
    different = 0
    for kernels.seed in range(6):
        got = run(*args, grad)[0]
        for i in (0, 2, 3): assert torch.equal(got[i], first[i])
        different += not torch.equal(got[1], first[1])
        value, size = truth(*args, grad)[1]
        assert units(got[1], value, size, args[2].dtype) <= LEAST
    if dtype == torch.float32: assert different, 'the order of additions matters where it is not asked to be none'

@pytest.mark.parametrize('size', [1e-30, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['f32', 'f64'])
def test_fixed_point_of_any_size(kernels, dtype, size):
    "Small and large gradients and weights keep their digits."
    value, shapes, points, weights = inputs('cpu', d=4, q=30, dtype=dtype)
    grad = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.use_deterministic_algorithms(True)
    try: exact((value, shapes, points, weights * size), grad * (size if dtype == torch.float64 else 1), fixed=True)
    finally: torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize('grad_size, weight_size', [(1e300, 1e200), (1e-300, 1e-300), (0., 1.), (1., 0.), (5e-324, 1e-5), (1e300, 1e-300)])
def test_fixed_point_at_the_ends(kernels, grad_size, weight_size):
    "Products beyond float64: what it can hold is right, and nothing turns into NaN that was none."
    value, shapes, points, weights = inputs('cpu', d=4, q=30, dtype=torch.float64)
    grad = torch.ones(2, 30, 8, dtype=torch.float64) * grad_size
    weights = weights.clamp(-1, 1)
    weights[:, ::2] *= weight_size
    if weight_size > 1: weights[:, 1::2] = 0                # all products overflow, or are zero
    torch.use_deterministic_algorithms(True)
    try: got, _ = run(value, shapes, points, weights, grad)
    finally: torch.use_deterministic_algorithms(False)
    if weight_size > 1: assert torch.equal(got[1].isfinite().all(-1), truth(value, shapes, points, weights, grad)[1][0].isfinite().all(-1))
    else: assert got[1].isfinite().all()
    if weight_size == 1e-300 and grad_size == 1e300: assert got[1].abs().max() > 1e299

def test_bad_gradients_leave_marks(kernels):
    "Deterministic: a row with a share that is not finite is NaN, all others are what they are without it."
    value, shapes, points, weights = inputs('cpu', d=4, q=30)
    for bad in (float('nan'), float('inf')):
        w = weights.clone()
        w[0, 3, 1, 0, 1] = bad
        points[0, 3, 1, 0, 1] = .5
        torch.use_deterministic_algorithms(True)
        try: got, clean = (run(value, shapes, points, o)[0][1] for o in (w, torch.where(w.isfinite(), w, 0)))
        finally: torch.use_deterministic_algorithms(False)
        rows = got.isnan().any(-1)
        assert rows.sum() == 2 or rows.sum() == 4
        assert got[rows].isnan().all() and units(got[~rows], clean[~rows].double(), clean[~rows].double().abs() + .1, torch.float32) <= LEAST

# ---- the emulation finds what it is there to find

def broken(tmp_path, *changes):
    folder = tmp_path/'kernels'
    folder.mkdir()
    for o in (root/'kernels').glob('*.h'): (folder/o.name).write_text(o.read_text())
    text = (folder/'multiscale_cuda.h').read_text()
    for a, b in changes:
        assert a in text, f'{a!r} is not in the kernels any more: change this test'
        text = text.replace(a, b)
    (folder/'multiscale_cuda.h').write_text(text)
    return build(tmp_path, folder)

def differs(path, **case):
    args = inputs('cpu', **case)
    with standing_in(path) as kernels:
        for kernels.seed in range(4):
            try: exact(args)
            except AssertionError: return True
    return False

@pytest.mark.parametrize('change', [
    pytest.param(('__syncthreads();\n                if (at.q0', ';\n                if (at.q0'), id='no wait before reading', marks=pytest.mark.slow),
    pytest.param(('__syncthreads();\n            for (int p = 0', ';\n            for (int p = 0'), id='no wait before the gradient'),
    pytest.param(('step = o.lanes / 2', 'step = o.lanes / 4'), id='a shuffle too few', marks=pytest.mark.slow),
    pytest.param(('at.q0 + e / some', 'at.q0 + e % queries'), id='wrong query', marks=pytest.mark.slow)])
def test_finds_bugs(library, tmp_path, change): assert differs(broken(tmp_path, change), d=16, q=40, k=3)
