"""Builds, checks and times the ops on a GPU in one call of some minutes, or in several: what is finished is not done again.

With a network and nvcc, but perhaps without a GPU:

    python nbs/bench/gpu.py --prepare      fetches the peers and builds all libraries, into the folder .gpu, which git ignores
    python nbs/bench/gpu.py --dry-run      what would be done, and what counts predict

On the machine with the GPU, in a copy of the checkout with its folder .gpu (`make` and a network are not needed; PyTorch, triton, transformers, einops, pytest and hypothesis are):

    python nbs/bench/gpu.py --minutes 8.5

Results lie in .gpu/out: a file of `make bench` for each op, `state.json` with what is finished, and `log.txt` with all that was said.
`--out FOLDER` names another folder, and begins with what lies in .gpu/out. A second call goes on where the first ended, if .gpu/out has come along;
what failed is tried again after the rest, and what was measured with other kernels is measured anew. Back home, with FOLDER in .gpu/out:

    cp .gpu/out/{multiscale,dilated,deformed_keys}.json runs/bench/; python tests/notebooks.py bench/speed && nbdev-clean      makes the page

What is in .gpu, so that it can be made in other ways:

    site/            Python packages that the machine lacks, see PACKAGES; read after the checkout, before what is installed
    mmcv/            sources of mmcv, for the 2020 kernel (DEFORMLIT_MMCV names another folder), and the library made from them
    KIND-DIGEST.so   our libraries 'cpu' and 'cuda'. DIGEST is of sources and settings, not of the compiler: `--build`, the first step, puts them where
                     `deformlit.native` looks (under a name with the compiler of that machine) if they load there, and else builds them
    cache/           that place, if DEFORMLIT_CACHE names no other
"""
import argparse, hashlib, importlib.util, json, os, platform, re, runpy, shutil, signal, subprocess, sys, tarfile, tempfile, time
from pathlib import Path
from typing import NamedTuple
import bench, results

here, root = Path(__file__).resolve().parent, results.root
sys.path.insert(0, str(root))
GPU = root/'.gpu'
SITE = GPU/'site'
PACKAGES = ('deformops==3.0.1', 'fastai==2.8.12', 'fastcore', 'fastprogress<1.1', 'fastdownload', 'fasttransform', 'plum-dispatch<2.10', 'beartype', 'torch-optimizer', 'pytorch-ranger')
MMCV = ('mmcv==2.2.0', 'ms_deform_attn_cuda.cu', 'ms_deform_attn_cuda_kernel.cuh', 'common_cuda_helper.hpp', 'PKG-INFO', 'LICENSE')
PYTHON, ARCH = '3.12', '90'      # of the machine with the GPU

# ---- the steps ------------------------------------------------------------------------------------------------------

class Step(NamedTuple):
    "A process of its own. It begins when `limit` seconds are left, and is stopped after so many."
    name:str
    limit:float
    command:list
    proof:str = ''       # An expression that its words must fit
    always:bool = False  # In every call, first
    lacks:str = ''       # Why it cannot run here

WRITTEN = r'(?s)\A(?!.*left out: native).*rows written'      # with rows of ours

def missing(*names):
    "Says which packages are not installed."
    gone = [o for o in names if importlib.util.find_spec(o) is None and not (SITE/o).exists()]
    return f"not installed: {', '.join(gone)}" if gone else ''

def plan(out, names=bench.NAMES) -> list:
    "All steps, the most important first."
    python, several = sys.executable, [] if missing('xdist') else ['-n', '4', '--dist', 'worksteal']
    def measure(op, *more): return [python, here/'bench.py', '--device', 'cuda', '--op', op, '--seconds', '1.5', '--out', out, *more]
    def tests(*more): return [python, '-m', 'pytest', '-q', *more, *sorted(o for o in (root/'tests').glob('test_*cuda*.py') if 'on_cpu' not in o.name)]
    def train(*more): return [python, '-c', 'import sys; from deformlit.train import main_train; sys.exit(main_train(sys.argv[1:]))', '--device', 'cuda', *more]
    first, others, untrained = names[:1], names[1:], missing('fastai', 'fastcore', 'torch_optimizer')
    peers = {'multiscale': ['--implementation', 'native', '2020 kernel', 'deformops Triton', 'deformops CUDA']}
    steps = [Step('build', 150, [python, here/'gpu.py', '--build'], 'cuda: ', always=True)]
    steps += [Step(f'limits of {o}', 75, measure(o, '--limits'), WRITTEN) for o in names]
    steps += [Step('tests', 200, tests('-m', 'not slow', *several), r'\d+ passed')]
    steps += [Step(o, 120, tests('-m', 'slow', '-k', f'sanitizer and {o}'), r'\d+ passed') for o in ('memcheck', 'racecheck')]
    for o in first: steps += [Step(o, 150, measure(o, '--implementation', 'native', 'native deterministic'), WRITTEN), Step(f'peers of {o}', 180, measure(o, *peers.get(o, ['--all'])), WRITTEN)]
    for workers, way in ((8, 'native'), (8, 'eager'), (0, 'native')):
        steps += [Step(f'training step, {way}, {workers} workers', 75, train('--speed', '12', '--workers', str(workers), '--backend', way), 'images/s', lacks=untrained)]
    steps += [Step(o, 120, measure(o, '--implementation', 'native', 'eager'), WRITTEN) for o in others]
    steps += [Step(f'peers of {o}', 180, measure(o, '--all'), WRITTEN) for o in others]
    steps += [Step(f'compiled forms of {o}', 240, measure(o, '--implementation', 'native', 'eager', 'compiled', 'transformers compiled', '--workload', 'encoder', 'decoder'), WRITTEN) for o in first]
    return steps + [Step('training', 400, train('--workers', '12', '--out', GPU/'digits'), 'AP ', lacks=untrained)]

def environment():
    "Of all steps: the carried packages and libraries."
    env = dict(os.environ, PYTHONUNBUFFERED='1', DEFORMOPS_COMPILE='1', PYTHONPATH=os.pathsep.join([str(root), str(SITE), *filter(None, [os.environ.get('PYTHONPATH')])]))
    for name, folder in dict(DEFORMLIT_CACHE=GPU/'cache', DEFORMLIT_MMCV=GPU/'mmcv', TORCH_EXTENSIONS_DIR=GPU/'extensions').items(): env.setdefault(name, str(folder))
    return env

def reason(text):
    "The line of a process's last words that says what went wrong."
    lines = [o.strip() for o in text.splitlines() if o.strip()]
    return next((o for o in reversed(lines) if re.search(r'^(FAILED|ERROR|wrong:)|\w+Error\b|\berror:', o)), lines[-1] if lines else 'it said nothing')[:300]

def run(step, log) -> dict:
    "Run a step; what it says goes to the end of the file `log`. Its status, with the reason or its last line."
    began = time.monotonic()
    with open(log, 'ab') as f:
        f.write(f'\n==== {step.name}: {time.strftime("%Y-%m-%d %H:%M:%S")}\n'.encode()); f.flush()
        start = f.tell()
        p = subprocess.Popen([str(o) for o in step.command], cwd=root, env=environment(), stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, process_group=0)
        try: code = p.wait(step.limit)
        except subprocess.TimeoutExpired: code = None
        finally:
            try: os.killpg(p.pid, signal.SIGKILL)       # with all that it started
            except ProcessLookupError: pass
            p.wait()
    with open(log, 'rb') as f: f.seek(start); text = f.read().decode(errors='replace')
    last = next((o.strip()[:300] for o in reversed(text.splitlines()) if o.strip()), '')
    found = dict(seconds=round(time.monotonic() - began, 1), date=time.strftime('%Y-%m-%d %H:%M:%S'))
    if code is None: return dict(found, status='failed', why=f'stopped after {step.limit:g} seconds; its last words: {last}')
    if code: return dict(found, status='failed', why=reason(text))
    if not re.search(step.proof, text): return dict(found, status='failed', why=f'it ended well, but not with {step.proof!r}: {last}')
    return dict(found, status='done', why=last)

def begin(out):
    "The results and the state that a call begins with."
    out.mkdir(parents=True, exist_ok=True)
    for folder in (GPU/'out', root/'runs'/'bench'):
        for p in folder.glob('*.json') if folder != out else (): (out/p.name).exists() or shutil.copy(p, out)

def read(out):
    try: return json.loads((out/'state.json').read_text())
    except FileNotFoundError: return {}

def todo(steps, state, kernels) -> list:
    "What has to run: first what always does, then what was not tried with these kernels, then what failed."
    def status(step): return state.get(step.name, {}).get('status') if state.get(step.name, {}).get('kernels') == kernels else None
    return sorted((o for o in steps if o.always or status(o) != 'done'), key=lambda o: (not o.always, status(o) == 'failed'))

def go(steps, out, minutes=None, say=print) -> dict:
    "Run what there is time for, one after the other; the state, which is also written after each step."
    ends, kernels, state = time.monotonic() + 60 * minutes if minutes else float('inf'), results.kernels_hash(), read(out)
    for step in todo(steps, state, kernels):
        left = ends - time.monotonic()
        if step.lacks: found = dict(status='failed', why=step.lacks)
        elif step.limit > left: say(f'{step.name}: left for the next call, {left:.0f} of {step.limit:g} seconds are left'); continue
        else: found = run(step, out/'log.txt')
        state[step.name] = dict(found, kernels=kernels)
        results.write(out/'state.json', json.dumps(state, indent=1) + '\n')
        took = f", {found['seconds']:.0f} s" if 'seconds' in found else ''
        say(f"{step.name}: {found['status']}{took}: {found['why']}")
    return state

# ---- libraries that are carried -------------------------------------------------------------------------------------

def digest(kind, folder=None) -> str:
    "Of what a library is made from, but for the compiler: `native.key` has that as well, so it differs between machines."
    from deformlit import native
    s, home = native.settings(folder), native.home(folder)
    h = hashlib.sha256(repr((s['torch'], s[kind], platform.machine())).encode())
    for p in sorted({p for o in s['torch'].get('headers', []) for p in (home/o).glob('*') if p.is_file()} | {home/o for o in s[kind]['sources']}): h.update(p.name.encode() + p.read_bytes())
    return h.hexdigest()[:16]

def build(kind, folder=None, carried=GPU) -> str:
    "Have the library of that kind loaded: the carried one if it fits and loads, else built here. Says which; raises `BuildError`."
    from deformlit import native
    file, place = carried/f'{kind}-{digest(kind, folder)}.so', native.cache()/native.key(kind, folder)/f'{kind}.so'
    took = file.exists() and not place.exists()
    if took:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    why = native.needs_library(kind, folder)
    if why and took:
        place.unlink(); native._answers.pop((kind, folder))
        print(f'{kind}: the carried library does not fit: {why}')
        took, why = False, native.needs_library(kind, folder)
    if why: raise native.BuildError(why)
    return 'carried' if took else 'there'

# ---- what is fetched and built beforehand ---------------------------------------------------------------------------

def pip(*args, **env):
    command = [sys.executable, '-m', 'pip'] if importlib.util.find_spec('pip') else [shutil.which('pip') or 'pip']
    subprocess.run([*command, *map(str, args)], check=True, env={**os.environ, **env})

def fetch_packages():
    platforms = [f'--platform=manylinux{o}_x86_64' for o in ('_2_28', '_2_27', '_2_17', '2014', '1')]
    pip('install', '-q', '--upgrade', '--no-deps', '--no-compile', '--ignore-requires-python', '--target', SITE, '--only-binary=:all:', '--python-version', PYTHON, '--implementation', 'cp', *platforms, *PACKAGES)

def fetch_mmcv():
    package, *names = MMCV
    with tempfile.TemporaryDirectory() as scratch:
        constraint = Path(scratch)/'constraint'
        constraint.write_text('setuptools<70\n')      # its setup.py needs `pkg_resources`
        pip('download', '-q', '--no-deps', '--use-pep517', '--no-binary', package.split('=')[0], '-d', scratch, package, PIP_CONSTRAINT=str(constraint), PIP_BUILD_CONSTRAINT=str(constraint))
        (GPU/'mmcv').mkdir(parents=True, exist_ok=True)
        with tarfile.open(next(Path(scratch).glob('*.tar.gz'))) as t:
            for o in t.getmembers():
                if Path(o.name).name in names and not (GPU/'mmcv'/Path(o.name).name).exists(): (GPU/'mmcv'/Path(o.name).name).write_bytes(t.extractfile(o).read())

def build_ours(kind):
    from deformlit import native
    GPU.mkdir(exist_ok=True)
    out = GPU/f'{kind}-{digest(kind)}.so'
    for o in GPU.glob(f'{kind}-*.so'): o == out or o.unlink()
    if not out.exists(): native.build(kind, out)

def build_2020():
    import kernel_2020
    kernel_2020.library(GPU/'mmcv', [ARCH])

def build_deformops():
    "Its CUDA library, put where its package looks for one."
    from deformlit import native
    folder, name = SITE/'deformops', 'msda_fp32acc'
    flags, out = runpy.run_path(str(folder/'core'/'configs.py'))['EXTENSION_CONFIGS'][name]['cflags_cuda'], folder/'core'/'_ext'/f'{name}.so'
    if out.exists(): return
    out.parent.mkdir(exist_ok=True)
    cuda = folder/'backends'/'cuda'
    subprocess.run([native.compiler('cuda'), '-O2', *flags, f'-gencode=arch=compute_{ARCH},code=sm_{ARCH}', '-w', '-shared', '-Xcompiler', '-fPIC', '-cudart', 'static', f"-I{cuda/'include'}", f"-I{native.torch_folder()/'include'}",
                    cuda/f'{name}.cpp', cuda/f'{name}.cu', '-o', out, f"-L{native.torch_folder()/'lib'}", '-ltorch_cpu', '-ltorch_cuda'], check=True)

def prepare() -> bool:
    "Fetch and build all, and say of each whether it is there."
    well = True
    for what, f in {'packages': fetch_packages, "mmcv's sources": fetch_mmcv, 'our CUDA library': lambda: build_ours('cuda'), 'our CPU library': lambda: build_ours('cpu'), 'the 2020 kernel': build_2020, "deformops' CUDA library": build_deformops}.items():
        try: f(); print(f'{what}: there', flush=True)
        except Exception as e: well = False; print(f'{what}: failed: {type(e).__name__}: {e}', flush=True)
    size = sum(p.stat().st_size for p in GPU.rglob('*') if p.is_file() and GPU/'out' not in p.parents)
    print(f'{size / 2**20:.1f} MiB in {GPU.name}')
    return well

# ---- the command ----------------------------------------------------------------------------------------------------

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument('--minutes', type=float, help='begin no step that might end later')
    p.add_argument('--out', type=Path, default=GPU/'out', help='folder of results, state and log (.gpu/out)')
    p.add_argument('--only', nargs='+', metavar='STEP', help='only these steps')
    p.add_argument('--dry-run', action='store_true', help='print the plan and the predictions')
    p.add_argument('--prepare', action='store_true', help='fetch the peers and build what is carried')
    p.add_argument('--build', action='store_true', help='load the carried libraries, or build them')
    a = p.parse_args(args)
    if a.minutes is not None and a.minutes <= 0: p.error(f'argument --minutes: expected a number above zero, got {a.minutes}')
    if a.prepare: sys.exit(not prepare())
    if a.build:
        for kind in ('cpu', 'cuda'):        # the tests compare with the CPU; the op itself needs only the last
            try: print(f'{kind}: {build(kind)}', flush=True)
            except Exception as e: print(f'{kind} failed: {e}', flush=True)
        return
    steps = plan(a.out)
    for o in a.only or ():
        if o not in {s.name for s in steps}: p.error(f"argument --only: expected some of {', '.join(repr(s.name) for s in steps)}, got {o!r}")
    steps = [o for o in steps if not a.only or o.name in a.only or o.always]
    if a.dry_run:
        left = {o.name for o in todo(steps, read(a.out), results.kernels_hash())}
        for o in steps: print(f"{o.name} ({o.limit:g} s at most){'' if o.name in left else ', done'}{f', {o.lacks}' if o.lacks else ''}: {' '.join(str(c).replace(str(root) + os.sep, '') for c in o.command)}")
        print(f'{sum(o.limit for o in steps if o.name in left) / 60:.0f} minutes at most', flush=True)
        sys.exit(subprocess.run([sys.executable, here/'predict.py', '--out', a.out], env=environment()).returncode)
    begin(a.out)
    state = go(steps, a.out, a.minutes, lambda line: print(line, flush=True))
    sys.exit(any(state.get(o.name, {}).get('status') != 'done' for o in steps))

if __name__ == '__main__': main()
