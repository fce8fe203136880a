"""Building, finding and loading the native ops, and what happens when that fails; the gradient that `differentiable` gives an op."""
import ctypes, os, shutil, signal, stat, subprocess, sys, time
import pytest, torch
from torch.testing import assert_close
import toy
from notebooks import root
import deformlit.native as native
from deformlit.native import *

gxx = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='no C++ compiler')

@pytest.fixture
def folder(tmp_path): return toy.make(tmp_path/'toy')

@pytest.fixture
def cached(tmp_path): return tmp_path/'cache'

# ---- settings

def test_settings():
    s = settings()
    assert s['cpu']['sources'] and s['cuda']['sources'] and {'80', '90', '100'} <= set(s['cuda']['architectures'])
    assert not {'-march=native', '-ffast-math', '-Ofast'} & {*s['cpu']['flags'], *s['cuda']['flags']}
    assert home() == root and home('x') == native.Path('x')

def test_target_is_the_oldest_torch():
    "The libraries run with every torch that pyproject.toml allows."
    import tomllib
    needs = tomllib.loads((root/'pyproject.toml').read_text())['project']['dependencies']
    assert any(o.startswith(f"torch>={settings()['torch']['target'][0]},") for o in needs)

def test_standard_library_only():
    "setup.py loads the module by its path, where neither torch nor the package need be."
    code = ('import importlib.util, sys\n'
            f'spec = importlib.util.spec_from_file_location("native", {str(root/"deformlit/native.py")!r})\n'
            'm = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n'
            f'print(m.settings({str(root)!r})["torch"], "torch" in sys.modules, "deformlit" in sys.modules)')
    r = subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.split()[-2:] == ['False', 'False'], r.stdout + r.stderr

def test_home_of_an_installed_package(tmp_path):
    package = tmp_path/'deformlit'
    package.mkdir()
    (package/'__init__.py').write_text('')
    shutil.copy(root/'deformlit/native.py', package)
    toy.make(package/'_kernels')
    toy.make(tmp_path)          # beside the package: another project's, and not ours
    out = subprocess.run([sys.executable, '-c', 'from deformlit.native import home; print(home())'], cwd=tmp_path, env=toy.environment(PYTHONPATH=tmp_path), capture_output=True, text=True)
    assert out.stdout.strip() == str(package/'_kernels'), out.stderr

# ---- the build

def logging_compiler(folder, before=''):
    "A compiler that notes each library it is asked for in the file `calls`, and does `before` first."
    path = folder/'noted++'
    path.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo "$$" >> "{folder}/calls"; {before or ":"} ;; esac\nexec "{shutil.which("g++") or shutil.which("clang++")}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path

def calls(folder): return len((folder/'calls').read_text().split()) if (folder/'calls').exists() else 0

@gxx
def test_built_at_first_use_and_once(folder, cached):
    cxx = logging_compiler(folder)
    out, err = toy.call(folder, CXX=cxx, DEFORMLIT_CACHE=cached)
    assert out == 'None' and err.count('building the native ops') == 1 and len(err.strip().splitlines()) == 1
    again, quiet = toy.call(folder, CXX=cxx, DEFORMLIT_CACHE=cached)
    assert (again, quiet, calls(folder)) == ('None', '', 1)
    assert toy.call(folder, CXX=cxx, DEFORMLIT_CACHE=cached, DEFORMLIT_BUILD=0) == ('None', ''), 'a library that is there is used'
    (folder/'kernels/gate.cpp').write_text(toy.CPP.replace('PAST', '0') + '// another\n')
    assert toy.call(folder, CXX=cxx, DEFORMLIT_CACHE=cached)[0] == 'None' and calls(folder) == 2, 'a changed source is built anew'

@gxx
def test_processes_at_once(folder, cached):
    "One builds, the others wait for it."
    cxx = logging_compiler(folder, 'sleep 1')
    together = [toy.start(folder, CXX=cxx, DEFORMLIT_CACHE=cached) for _ in range(3)]
    said = [p.communicate(timeout=300) for p in together]
    assert [o.strip() for o, _ in said] == ['None'] * 3, said
    assert calls(folder) == 1 and sum('building' in e for _, e in said) == 1

@gxx
def test_killed_build(folder, cached):
    "Leaves nothing that is taken for a library, and no lock."
    cxx = logging_compiler(folder, f'for o; do case "$o" in */.cpu.so.*) echo half > "$o" ;; esac; done; touch "{folder}/half"; exec sleep 60')
    p = toy.start(folder, CXX=cxx, DEFORMLIT_CACHE=cached)
    while not (folder/'half').exists() and p.poll() is None: time.sleep(.05)
    compiler_id = int((folder/'calls').read_text().split()[0])
    p.send_signal(signal.SIGKILL)
    os.kill(compiler_id, signal.SIGKILL)
    p.communicate()
    assert list(cached.rglob('.cpu.so.*')) and not list(cached.rglob('cpu.so'))
    logging_compiler(folder)
    assert toy.call(folder, CXX=cxx, DEFORMLIT_CACHE=cached)[0] == 'None' and calls(folder) == 2
    assert len(list(cached.rglob('cpu.so'))) == 1 and not list(cached.rglob('.cpu.so.*'))

@gxx
def test_build(folder, tmp_path):
    out = build('cpu', tmp_path/'a.so', folder, ['-DEXTRA'])
    assert out.stat().st_size > 1000 and [o.name for o in tmp_path.glob('*a.so*')] == ['a.so']
    with pytest.raises(BuildError, match='EXTRA') as e: build('cpu', tmp_path/'b.so', toy.make(folder, toy.CPP + '#error EXTRA\n'), ['-DEXTRA'])
    assert 'gate.cpp' in str(e.value) and '-DEXTRA' in e.value.log and not list(tmp_path.glob('*b.so*'))

def test_command_for_each_kind(folder, monkeypatch):
    monkeypatch.setattr(native, 'compiler', lambda kind: dict(cpu='g++', cuda='nvcc')[kind])
    monkeypatch.setattr(native, 'architectures', lambda nvcc, wanted: list(wanted))
    for kind, source in (('cpu', 'gate.cpp'), ('cuda', 'gate.cu')):
        cmd = command(kind, 'out.so', folder, ['-DX'])
        assert '-DTORCH_TARGET_VERSION=0x020b000000000000' in cmd and '-DX' in cmd and any(o.endswith(source) for o in cmd)
        assert f'-I{folder/"kernels"}' in cmd and '-ltorch_cpu' in cmd

# ---- failures: a reason, never an exception

def test_no_compiler(folder, cached, tmp_path):
    empty = tmp_path/'empty'
    empty.mkdir()
    assert 'no C++ compiler: g++ or clang++ is not on the path' in toy.call(folder, PATH=empty, DEFORMLIT_CACHE=cached)[0]
    assert 'no C++ compiler: no-such++ is not on the path' in toy.call(folder, CXX='no-such++', DEFORMLIT_CACHE=cached)[0]

@gxx
def test_broken_source(tmp_path, cached, monkeypatch):
    monkeypatch.setenv('DEFORMLIT_CACHE', str(cached))
    folder = toy.make(tmp_path/'broken', toy.CPP.replace('t * pa[i]', 't * pc[i]'))
    why = needs_library('cpu', folder)
    assert 'gate.cpp:12' in why and 'error' in why and 'pc' in why
    log = next(cached.rglob('build.log'))
    assert str(log) in why and 'pc' in log.read_text() and '-shared' in log.read_text()
    monkeypatch.setattr(native, 'library', lambda *a: pytest.fail('asked again'))
    assert needs_library('cpu', folder) == why, 'the answer is remembered'

@gxx
def test_building_is_forbidden(folder, cached, monkeypatch):
    monkeypatch.setenv('DEFORMLIT_CACHE', str(cached))
    monkeypatch.setenv('DEFORMLIT_BUILD', '0')
    assert 'DEFORMLIT_BUILD=0' in needs_library('cpu', folder) and not cached.exists()

@gxx
def test_no_place_to_write(folder, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('DEFORMLIT_CACHE', str(tmp_path/'file'/'cache'))
    why = needs_library('cpu', folder)
    assert 'file' in why and 'DEFORMLIT_CACHE' in why

@gxx
def test_library_that_does_not_load(folder, cached, monkeypatch):
    monkeypatch.setenv('DEFORMLIT_CACHE', str(cached))
    out = cached/key('cpu', folder)/'cpu.so'
    out.parent.mkdir(parents=True)
    out.write_bytes(b'no library')
    assert 'does not load' in needs_library('cpu', folder)

@gxx
def test_reasons_add_up(tmp_path):
    "A library in the wheel that does not load is not the end: the next is built; if that fails too, both reasons are given."
    package = tmp_path/'deformlit'
    package.mkdir()
    (package/'__init__.py').write_text('')
    shutil.copy(root/'deformlit/native.py', package)
    toy.make(package/'_kernels')
    (package/'_cpu.abi3.so').write_bytes(b'no library')
    code = 'from deformlit.native import needs_library; print(needs_library("cpu"))'
    ask = lambda **kw: toy.call(tmp_path, code, PYTHONPATH=tmp_path, DEFORMLIT_CACHE=tmp_path/'cache', **kw)[0]
    why = ask(CXX='no-such++')
    assert '_cpu.abi3.so does not load' in why and 'no-such++' in why
    assert ask() == 'None'

@gxx
def test_missing_source(folder, cached, monkeypatch):
    monkeypatch.setenv('DEFORMLIT_CACHE', str(cached))
    (folder/'kernels/gate.cpp').unlink()
    assert 'gate.cpp is missing' in needs_library('cpu', folder)

def test_no_headers(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(native, 'find_spec', lambda name: None)
    monkeypatch.setattr(native.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(BuildError, match='headers'): torch_folder()

def test_where_the_cache_is(monkeypatch, tmp_path):
    for o in ('DEFORMLIT_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(o, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert cache() == tmp_path/'.cache/deformlit'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'x'))
    assert cache() == tmp_path/'x/deformlit'
    monkeypatch.setenv('DEFORMLIT_CACHE', str(tmp_path/'d'))
    assert cache() == tmp_path/'d'

def test_inside_a_compiled_function(tmp_path):
    f = torch.compile(lambda x: x + (1 if needs_library('cpu', 'nowhere') else 2), backend='eager', fullgraph=True)
    assert_close(f(torch.zeros(2)), torch.ones(2))

# ---- the sanitizers

@gxx
def test_sanitizer_finds_a_read_past_the_end(tmp_path):
    import sanitize
    env = sanitize.environment()
    if env is None: pytest.skip('this compiler brings no address sanitizer')
    for past in (0, 1):
        p = toy.start(toy.make(tmp_path/str(past), past=past), DEFORMLIT_CACHE=tmp_path/'cache', **env)
        out, err = p.communicate(timeout=300)
        if past: assert p.returncode != 0 and 'heap-buffer-overflow' in err and 'gate.cpp' in err, err
        else: assert p.returncode == 0 and out.strip() == 'None', err

# ---- the price of a call

@pytest.fixture(scope='module')
def gate():
    "The toy as an op with a gradient, by the function to call it by."
    torch.library.define('toy::gate', '(Tensor a, Tensor b, float t) -> Tensor')
    return differentiable('toy::gate', lambda g, a, b, t: (g * b * t, g * a * t, None), lambda a, b, t: a * b * t)

@gxx
def test_boundary(gate, folder, cached, monkeypatch, tell):
    "A call costs at most 8 microseconds, kernel and result included where no gradient is needed; the least of many, for other tests run at the same time."
    import timeit
    monkeypatch.setenv('DEFORMLIT_CACHE', str(cached))
    assert needs_library('cpu', folder) is None
    a = torch.ones(2).double()
    b = a.clone().requires_grad_()
    assert_close(gate(a, b, .5).detach(), .5 * a)
    least = lambda f: min(timeit.repeat(f, number=200, repeat=100)) / 200 * 1e6
    with torch.no_grad(): kernel = least(lambda: torch.neg(a))      # an op of PyTorch's own, with a result of the same size
    plain, grad = least(lambda: gate(a, a, .5)), least(lambda: gate(a, b, .5))
    tell(f'a call of a native op: {plain:.1f} us, with a gradient to come {grad:.1f} us (torch.neg: {kernel:.1f} us)')
    assert plain <= 8 and grad - kernel <= 8

# ---- CUDA, compiled here wherever there is a compiler, run where there is a GPU

@pytest.mark.skipif(not cuda_home(), reason='no CUDA toolkit: nvcc was not found')
def test_nvcc(folder, tmp_path, tell):
    "Machine code for each architecture, and PTX of the newest."
    where = None if all((root/o).exists() for o in settings()['cuda']['sources']) else folder
    out = build('cuda', tmp_path/'cuda.so', where)
    dump = cuda_home()/'bin/cuobjdump'
    tell(f"CUDA sources: {' '.join(settings(where)['cuda']['sources'])} compiled, {out.stat().st_size} bytes")
    if not dump.exists(): return
    said = [subprocess.run([dump, o, out], capture_output=True, text=True).stdout for o in ('--list-elf', '--list-ptx')]
    for o in settings()['cuda']['architectures']: assert f'sm_{o}' in said[0]
    assert f"sm_{settings()['cuda']['architectures'][-1]}" in said[1]

def has_nvrtc():
    try: return bool(native._nvrtc())
    except BuildError: return False

nvrtc = pytest.mark.skipif(not has_nvrtc(), reason='no libnvrtc: this torch is built without CUDA')
SCALE = '''#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "factor.h"
extern "C" __global__ void scale(float* x, long long n, float t) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) x[i] *= FACTOR * t;
}'''

@pytest.fixture
def header(tmp_path):
    (tmp_path/'factor.h').write_text('#define FACTOR 2')
    return tmp_path

@nvrtc
@pytest.mark.parametrize('arch', ['80', '90', '100', '120'])
def test_nvrtc(header, arch):
    code = cubin(SCALE, arch, [header])
    assert code[:4] == b'\x7fELF' and b'scale' in code

@nvrtc
def test_nvrtc_says_what_is_wrong(header):
    with pytest.raises(BuildError, match=r'kernels.cu\(6\): error.*undefined') as e: cubin(SCALE.replace('x[i]', 'y[i]'), '90', [header])
    assert '"y"' in e.value.log
    with pytest.raises(BuildError, match='arch'): cubin(SCALE, '1', [header])

def test_without_a_gpu():
    if torch.cuda.is_available(): return
    assert 'no GPU' in needs_library('cuda') and 'no GPU' in needs_nvrtc()

def test_launch_marshals(monkeypatch):
    "What the driver is given, without a driver."
    seen = []
    def driver(name, *args):
        if name == 'cuLaunchKernel':
            sizes, pointers = [o.value for o in args[1:8]], args[9]
            read = lambda i, kind: kind.from_address(pointers[i]).value
            seen.append((sizes, read(0, ctypes.c_void_p), read(1, ctypes.c_int64), read(2, ctypes.c_float), read(3, ctypes.c_int32)))
        else: seen.append(name)
    monkeypatch.setattr(native, '_driver', driver)
    monkeypatch.setattr(native, 'cubin', lambda *a: b'')
    for name, value in (('current_device', lambda: 0), ('current_stream', lambda: type('S', (), {'cuda_stream': 7})), ('get_device_capability', lambda d: (9, 0))):
        monkeypatch.setattr(torch.cuda, name, value)
    x, k = torch.ones(3), Kernels('')
    for _ in range(2): k.launch('f', (2, 1, 1), (32, 1, 1), x, 1 << 40, .5, ctypes.c_int32(3), shared=50_000)
    launch = ([2, 1, 1, 32, 1, 1, 50_000], x.data_ptr(), 1 << 40, .5, 3)
    assert seen == ['cuModuleLoadData', 'cuModuleGetFunction', 'cuFuncSetAttribute', launch, 'cuFuncSetAttribute', launch]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_launch(header):
    k, x = Kernels(SCALE, [header]), torch.ones(1000, device='cuda')
    k.launch('scale', (4, 1, 1), (256, 1, 1), x, x.numel(), .25)
    assert_close(x, torch.full_like(x, .5))
    with pytest.raises(RuntimeError, match='CUDA error'): k.launch('scale', (4, 1, 1), (4096, 1, 1), x, x.numel(), .25)
    with pytest.raises(RuntimeError, match='cuModuleGetFunction'): k.launch('other', (1, 1, 1), (1, 1, 1))

@pytest.mark.skipif(not torch.cuda.is_available() or not cuda_home(), reason='no GPU, or no nvcc')
def test_cuda_library(gate, folder, cached, monkeypatch):
    monkeypatch.setenv('DEFORMLIT_CACHE', str(cached))
    assert needs_library('cuda', folder) is None
    a = torch.arange(1000.).double().cuda()
    assert_close(torch.ops.toy.gate(a, a, .5), .5 * a * a)

# ---- the gradient

def eager(a, b, t): return a * torch.sigmoid(b) * t

@pytest.fixture(scope='module')
def mix():
    "An op with kernels in Python, as if they were native, and the function to call it by."
    lib = torch.library.Library('toy_gradient', 'DEF')
    lib.define('mix(Tensor a, Tensor b, float t) -> Tensor')
    lib.define('mix_backward(Tensor grad, Tensor a, Tensor b, float t) -> (Tensor, Tensor)')
    ran = []
    def forward(a, b, t):
        ran.append('forward')
        return eager(a, b, t).clone()
    def backward(g, a, b, t):
        ran.append('backward')
        return g * torch.sigmoid(b) * t, g * a * t * torch.sigmoid(b) * (1 - torch.sigmoid(b))
    lib.impl('mix', forward, 'CPU')
    lib.impl('mix_backward', backward, 'CPU')
    ops = torch.ops.toy_gradient
    torch.library.register_fake('toy_gradient::mix', lambda a, b, t: torch.empty_like(a), lib=lib)
    torch.library.register_fake('toy_gradient::mix_backward', lambda g, a, b, t: (torch.empty_like(a), torch.empty_like(b)), lib=lib)
    def batched(info, dims, a, b, t):
        a, b = (o.expand(info.batch_size, *o.shape) if d is None else o.movedim(d, 0) for o, d in zip((a, b), dims))
        return ops.mix(a, b, t), 0
    torch.library.register_vmap('toy_gradient::mix', batched, lib=lib)
    call = differentiable('toy_gradient::mix', lambda g, a, b, t: (*ops.mix_backward(g, a, b, t), None), eager)
    yield call, ops.mix.default, ran
    lib._destroy()

@pytest.fixture
def ab(): return [torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]

def test_gradients(mix, ab):
    call, op, ran = mix
    a, b = (o.clone().requires_grad_() for o in ab)
    for f in (call, op):
        ran.clear()
        y = f(a, b, .3)
        assert_close(torch.autograd.grad(y.sum(), [a, b]), torch.autograd.grad(eager(a, b, .3).sum(), [a, b]))
        assert ran == ['forward', 'backward']
        assert torch.autograd.gradcheck(lambda a, b: f(a, b, .3), (a, b)) and torch.autograd.gradgradcheck(lambda a, b: f(a, b, .3), (a, b))
        assert torch.autograd.gradcheck(lambda b: f(ab[0], b, .3), (b,)) and torch.autograd.gradgradcheck(lambda b: f(ab[0], b, .3), (b,))
        with torch.no_grad(): assert not f(a, b, .3).requires_grad
        with torch.inference_mode(): assert_close(f(*ab, .3), eager(*ab, .3))

def test_second_gradient_where_one_argument_is_made_from_another(mix, ab):
    def twice(f):
        a = ab[0].clone().requires_grad_()
        g, = torch.autograd.grad(f(a, a * 2, .3).sum(), a, create_graph=True)
        return g, *torch.autograd.grad(g.sum(), a)
    for f in mix[:2]: assert_close(twice(f), twice(eager))

def test_transforms(mix, ab):
    call, op, ran = mix
    a, b = ab
    one = lambda f: lambda a, b: f(a, b, .3)
    ran.clear()
    assert_close(torch.vmap(one(call))(a, b), eager(a, b, .3))
    assert_close(torch.vmap(lambda a: call(a, b[0], .3))(a), eager(a, b[0], .3))
    assert ran == ['forward'] * 2, 'vmap alone takes the native way'
    grad = lambda f: torch.func.grad(lambda a, b: f(a, b, .3).sum(), argnums=(0, 1))
    assert_close(grad(call)(a, b), grad(eager)(a, b))
    assert_close(torch.vmap(grad(call))(a, b), torch.vmap(grad(eager))(a, b))
    hessian = lambda f: torch.func.hessian(lambda b: f(a[0], b, .3).sum())(b[0])
    assert_close(hessian(call), hessian(eager))
    for f in (call, op):
        with torch.autograd.forward_ad.dual_level():
            y = f(torch.autograd.forward_ad.make_dual(a, b), b, .3)
            assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, eager(b, b, .3))

def test_opcheck(mix, ab):
    call, op, _ = mix
    for o in (ab, [x.clone().requires_grad_() for x in ab], [x.t() for x in ab]):
        assert set(torch.library.opcheck(op, (*o, .3)).values()) == {'SUCCESS'}

def test_compiled(mix, ab):
    call = mix[0]
    f = torch.compile(lambda a, b: call(a * 2, b, .3).sum(), backend='aot_eager', fullgraph=True)
    a, b = (o.clone().requires_grad_() for o in ab)
    assert_close(torch.autograd.grad(f(a, b), [a, b]), torch.autograd.grad(eager(a * 2, b, .3).sum(), [a, b]))
    class M(torch.nn.Module):
        def forward(self, a, b): return call(a, b, .3)
    exported = torch.export.export(M(), tuple(ab))
    assert 'toy_gradient.mix' in str(exported.graph) and torch.equal(exported.module()(*ab), call(*ab, .3))

def test_under_fake_tensors_and_checkpoint(mix, ab):
    call = mix[0]
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode() as mode: assert call(*(mode.from_tensor(o) for o in ab), .3).shape == (3, 4)
    a, b = (o.clone().requires_grad_() for o in ab)
    torch.utils.checkpoint.checkpoint(lambda a, b: call(a, b, .3), a, b, use_reentrant=False).sum().backward()
    assert_close(a.grad, torch.sigmoid(b.detach()) * .3)

# ---- kernels for a device

@pytest.mark.parametrize('nvrtc, want', [(None, None), ('no GPU', 'no nvcc; no GPU'), ('no nvcc', 'no nvcc')])
def test_needs_kernels(nvrtc, want, monkeypatch):
    "Without a library for CUDA, NVRTC's kernels are registered, once; or both reasons are told."
    import torch
    from deformlit import native
    calls = []
    monkeypatch.setattr(native, 'needs_library', lambda kind: None if kind == 'cpu' else 'no nvcc')
    monkeypatch.setattr(native, 'needs_nvrtc', lambda: nvrtc)
    monkeypatch.setattr(torch.library, 'impl', lambda *args: calls.append(args))
    needs = native.needs_kernels(one=1, two=2)
    assert needs('cuda') == needs('cuda') == want and needs('cpu') is None and needs() is None and needs('mps') == 'no kernel for mps'
    assert calls == ([] if want else [('deformlit::one', 'CUDA', 1), ('deformlit::two', 'CUDA', 2)])
