"""The native side of a wheel: the sources and settings.ini, and the libraries that can be built here and now.

All else stands in pyproject.toml. No failure here stops an installation: what is missing is built when an op first asks for it,
and without a compiler the ops run in their PyTorch form. An editable installation uses the checkout and builds nothing here.
"""
import importlib.util, os, shutil, sys, tempfile
from pathlib import Path
from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location('native', root/'deformlit'/'native.py')   # by path: the package imports torch, which need not be here
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

def libraries(folder):
    "Build what can be built into `folder`, and say in a line what cannot; the files."
    for kind in ('cpu', 'cuda'):
        try:
            if os.environ.get('DEFORMLIT_BUILD') == '0': raise native.BuildError('DEFORMLIT_BUILD=0 forbids building')
            if kind == 'cuda' and not list((native.torch_folder()/'lib').glob('libtorch_cuda.*')): raise native.BuildError('this PyTorch is built without CUDA')
            native.build(kind, folder/f'_{kind}.abi3.so', root)
        except Exception as e: print(f'deformlit: the {kind} library is not in the wheel ({e}); it will be built at first use', flush=True)
    return sorted(folder.glob('_*.abi3.so'))

scratch = tempfile.TemporaryDirectory(prefix='deformlit-')
built = libraries(Path(scratch.name)) if 'bdist_wheel' in sys.argv else []

class Native(Distribution):
    "A wheel with a library is for one platform."
    def has_ext_modules(self): return bool(built)

class CopySources(build_py):
    "Takes sources, settings and libraries into the wheel."
    def run(self):
        super().run()
        if self.editable_mode: return
        package = Path(self.build_lib)/'deformlit'
        s = native.settings(root)
        shutil.rmtree(package/'_kernels', ignore_errors=True)
        for o in s['torch']['headers']:
            if (root/o).is_dir(): shutil.copytree(root/o, package/'_kernels'/o)
        (package/'_kernels').mkdir(parents=True, exist_ok=True)
        shutil.copy(root/'settings.ini', package/'_kernels')
        for o in package.glob('_*.abi3.so'): o.unlink()
        for o in built: shutil.copy(o, package)

class Abi3Wheel(bdist_wheel):
    "The libraries use PyTorch's stable ABI and nothing of Python: any Python 3.11 or newer will do."
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ('cp311', 'abi3', platform) if built else (python, abi, platform)

setup(distclass=Native, cmdclass={'build_py': CopySources, 'bdist_wheel': Abi3Wheel})
