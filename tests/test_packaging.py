"""The wheel: built, installed in an environment of its own over the installed packages, used from another folder."""
import os, subprocess, sys, zipfile
import pytest
from environment import make
from notebooks import root

pytestmark = pytest.mark.slow

def clean_env(): return {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    names = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True)
    source = folder/'source'        # built from a copy, so that no build folder is left in the checkout
    for o in filter(None, names.stdout.split('\0')):
        if not (root/o).is_file(): continue
        (source/o).parent.mkdir(parents=True, exist_ok=True)
        (source/o).write_bytes((root/o).read_bytes())
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--disable-pip-version-check', '-w', folder, source],
                       env=clean_env(), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return next(folder.glob('*.whl'))

@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory): return make(tmp_path_factory.mktemp('installed'), '--no-deps', '--no-index', str(wheel))

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
