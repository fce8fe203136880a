"""A few tests once more with the oldest torch that pyproject.toml allows.

Its environment is kept in `.venv-oldest-torch`; `DEFORMLIT_OLDEST_TORCH=/path/to/python` names another that has pytest and the rest.
"""
import os, re, shutil, subprocess, sys, tomllib
from pathlib import Path
import pytest
import toy
from environment import make
from notebooks import root

pytestmark = pytest.mark.slow
few = ['tests/test_import.py', 'tests/test_golden.py', 'tests/test_native.py', 'tests/test_outputs.py::test_notebook[11_multiscale]']

def oldest():
    needs = tomllib.loads((root/'pyproject.toml').read_text())['project']['dependencies']
    return next(m[1] for o in needs if (m := re.fullmatch(r'torch>=([\d.]+),<[\d.]+', o)))

def version(python):
    r = subprocess.run([python, '-c', 'import torch; print(torch.__version__)'], capture_output=True, text=True)
    return r.stdout.strip()

@pytest.fixture(scope='module')
def python():
    if named := os.environ.get('DEFORMLIT_OLDEST_TORCH'): return Path(named)
    folder = root/'.venv-oldest-torch'
    kept = folder/'bin'/'python'
    if kept.exists() and version(kept).startswith(oldest()): return kept
    try: return make(folder, f'torch=={oldest()}.*', 'torchvision')
    except OSError as e: pytest.skip(f'torch {oldest()} could not be installed: {e}')

def test_with_the_oldest_torch(python, tell):
    found = version(python)
    assert found.startswith(oldest()), f'{python} has torch {found or "none that imports"}'
    here = [o for o in few if (root/o.split('::')[0]).exists() and ('[' not in o or (root/'nbs'/f'{o.split("[")[1][:-1]}.ipynb').exists())]
    env = {**os.environ, 'PYTHONPATH': str(root)}
    for o in ('PYTEST_XDIST_WORKER', 'PYTEST_XDIST_WORKER_COUNT', 'PYTEST_CURRENT_TEST'): env.pop(o, None)
    r = subprocess.run([python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow', *here], cwd=root, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-2000:]
    tell(f'torch {found}: {r.stdout.strip().splitlines()[-1]}')

@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')
def test_one_library_for_both(python, tmp_path):
    "The very file that one torch's headers built is loaded and called by the other, both ways round."
    folder = toy.make(tmp_path/'toy')
    for i, (maker, user) in enumerate([(sys.executable, python), (python, sys.executable)]):
        cache = tmp_path/f'cache{i}'
        assert toy.call(folder, python=maker, DEFORMLIT_CACHE=cache)[0] == 'None'
        made = [(p, p.stat().st_mtime_ns) for p in cache.rglob('*.so')]
        assert toy.call(folder, python=user, DEFORMLIT_CACHE=cache) == ('None', '')
        assert len(made) == 1 and made == [(p, p.stat().st_mtime_ns) for p in cache.rglob('*.so')]
