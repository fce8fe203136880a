"""The wheel: built, installed in an environment of its own over the installed packages, used from another folder."""
import os, shutil, subprocess, sys, tarfile, zipfile
import pytest
import toy
from environment import make
from notebooks import root

pytestmark = pytest.mark.slow

def clean_env(): return {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "A copy of the checkout, so that no build folder is left in it; where there are no kernels yet, with the toy in their place."
    names = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True)
    folder = tmp_path_factory.mktemp('source')
    for o in filter(None, names.stdout.split('\0')):
        if not (root/o).is_file(): continue
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        (folder/o).write_bytes((root/o).read_bytes())
    if not (folder/'kernels').exists(): toy.make(folder)
    return folder

def make_wheel(source, folder, **kw):
    "Without isolation, so that the build sees the running environment; nvcc, which takes its time, is out of sight."
    env = toy.environment(PYTHONPATH=None, CUDA_HOME=folder, **kw)
    code = 'import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))'
    r = subprocess.run([sys.executable, '-c', code, folder], cwd=shutil.copytree(source, folder/'source'), env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return next(folder.glob('*.whl')), r.stdout

@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory): return make_wheel(source, tmp_path_factory.mktemp('wheel'))[0]

@pytest.fixture(scope='module')
def pure(source, tmp_path_factory): return make_wheel(source, tmp_path_factory.mktemp('pure'), CXX='no-such++')

def install(wheel, folder): return make(folder, '--no-deps', '--no-index', str(wheel))

@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory): return install(wheel, tmp_path_factory.mktemp('installed'))

def test_wheel_holds_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {f'deformlit/{p.relative_to(root/"deformlit").as_posix()}' for p in (root/'deformlit').rglob('*.py')}
    assert package <= set(names)
    assert any(o.endswith('LICENSE') for o in names)
    assert {o.split('/')[0].split('-')[0] for o in names} == {'deformlit'}

def test_installed_wheel(python, tmp_path):
    modules = ['deformlit'] + [f'deformlit.{p.stem}' for p in (root/'deformlit').glob('*.py') if p.stem != '__init__']
    code = ('import importlib, importlib.metadata, deformlit\n'
            f'for o in {modules}: importlib.import_module(o)\n'
            'assert importlib.metadata.version("deformlit") == deformlit.__version__\n'
            'print(deformlit.__file__)')
    r = subprocess.run([python, '-c', code], cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith(str(python.parent.parent)), f'imported from {r.stdout}, not from the wheel'

@pytest.mark.parametrize('command', ['deformlit-train', 'deformlit-detect'])
def test_commands(python, tmp_path, command):
    if not (root/'deformlit'/'train.py').exists(): pytest.skip('the chapter `train` is not written yet')
    r = subprocess.run([python.parent/command, '--help'], cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
    assert r.returncode == 0 and 'usage' in r.stdout.lower(), r.stderr

# ---- the native ops

def names(wheel): return zipfile.ZipFile(wheel).namelist()

def use(python, folder, **kw):
    "Whether the installed package has its CPU library, asked from a folder that knows nothing of the checkout."
    code = 'from deformlit.native import needs_library; print(needs_library("cpu"))'
    r = subprocess.run([python, '-c', code], cwd=folder, env=toy.environment(PYTHONPATH=None, **kw), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip(), r.stderr

compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')

@compiler
def test_wheel_with_the_library(wheel, python, tmp_path):
    "One wheel for all Pythons of a platform; it needs no compiler where it is installed."
    assert '-cp311-abi3-' in wheel.name and 'deformlit/_cpu.abi3.so' in names(wheel)
    empty = tmp_path/'empty'
    empty.mkdir()
    assert use(python, tmp_path, PATH=empty, DEFORMLIT_CACHE=tmp_path/'cache') == ('None', '')
    assert not (tmp_path/'cache').exists()

def test_wheel_without_a_compiler(pure, tmp_path):
    "Is made all the same, says in a line what is missing, and holds the sources."
    wheel, said = pure
    assert wheel.name.endswith('-py3-none-any.whl') and not [o for o in names(wheel) if o.endswith('.so')]
    lines = [o for o in said.splitlines() if o.startswith('deformlit:')]
    assert len(lines) == 2 and 'no-such++' in lines[0] and 'built at first use' in lines[0]
    assert {'deformlit/_kernels/settings.ini'} < {o for o in names(wheel) if '/_kernels/' in o}

@compiler
def test_pure_wheel_builds_at_first_use(pure, tmp_path):
    python = install(pure[0], tmp_path/'installed')
    why, _ = use(python, tmp_path, CXX='no-such++', DEFORMLIT_CACHE=tmp_path/'cache')
    assert 'no-such++' in why
    out, err = use(python, tmp_path, DEFORMLIT_CACHE=tmp_path/'cache')
    assert out == 'None' and 'building the native ops' in err
    assert use(python, tmp_path, DEFORMLIT_CACHE=tmp_path/'cache') == ('None', '')

@compiler
def test_wheel_from_an_isolated_build(source, tmp_path):
    "pip builds in an environment of its own, without torch: the headers are those of the environment that it installs into."
    shutil.copytree(source, tmp_path/'source')
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--disable-pip-version-check', '-w', tmp_path, tmp_path/'source'],
                       env=toy.environment(PYTHONPATH=None, CUDA_HOME=tmp_path), capture_output=True, text=True)
    if r.returncode and 'No matching distribution found for setuptools' in r.stderr: pytest.skip('setuptools could not be installed')
    assert r.returncode == 0, r.stderr
    assert 'deformlit/_cpu.abi3.so' in names(next(tmp_path.glob('*.whl')))

def test_sdist(source, tmp_path):
    shutil.copytree(source, tmp_path/'source')
    code = 'import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))'
    r = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=tmp_path/'source', env=clean_env(), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    inside = tarfile.open(next(tmp_path.glob('*.tar.gz'))).getnames()
    wanted = ['setup.py', 'settings.ini', 'pyproject.toml', 'deformlit/native.py'] + [p.relative_to(source).as_posix() for p in (source/'kernels').rglob('*') if p.is_file()]
    assert set(wanted) <= {o.split('/', 1)[-1] for o in inside}
