"""Importing the package is quick and changes nothing."""
import os, subprocess, sys
import pytest
from chapters import chapters, number
from notebooks import root

heavy = 'torchvision timm fastai matplotlib sklearn skimage transformers'.split()
light = [o for o in chapters if not 31 <= number[o] < 40]    # 31-39 are fastai's side: data, metrics, learner, commands

def fresh(code):
    "What `code` prints in a new process."
    env = {**os.environ, 'PYTHONPATH': str(root)}
    r = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout

def test_import_is_light():
    assert fresh(f'import sys, deformlit; print([o for o in {heavy + ["torch"]} if o in sys.modules])').strip() == '[]'

@pytest.mark.parametrize('module', light)
def test_module_is_light(module):
    assert fresh(f'import torch, sys, deformlit.{module}; print([o for o in {heavy} if o in sys.modules])').strip() == '[]'

def test_all_modules_within_two_seconds():
    "Beyond torch and fastai; processor time, since other tests run at the same time."
    imports = '\n'.join(f'import deformlit.{o}' for o in ['core', *chapters] if o in chapters) or 'import deformlit'
    code = f'import torch, fastai.vision.all, time\nt = time.process_time()\n{imports}\nprint(time.process_time() - t)'
    assert min(float(fresh(code)) for _ in range(2)) < 2

def test_import_changes_nothing():
    state = '''def state():
    import os, random, signal, threading, warnings
    import numpy, torch, scipy.optimize      # what these do themselves is not ours
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
            dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT), threading.active_count(), len(warnings.filters))'''
    imports = '; '.join(['import deformlit'] + [f'import deformlit.{o}' for o in light])
    assert fresh(f'{state}\nbefore = state()\n{imports}\nprint(before == state())').strip() == 'True'

# ---- names at the top

def homes():
    import deformlit
    return deformlit._home

@pytest.mark.parametrize('name', homes())
def test_top_level_name(name):
    "Each name in `deformlit` is its module's, and hides no module."
    import deformlit, importlib
    module = homes()[name]
    assert name in dir(deformlit) and name in deformlit.__all__
    assert name not in chapters, f'`deformlit.{name}` is a module; a function of this name is imported from it'
    assert getattr(deformlit, name) is getattr(importlib.import_module(f'deformlit.{module}'), name)

def test_unknown_name():
    import deformlit
    with pytest.raises(AttributeError, match='no_such_name'): deformlit.no_such_name
    assert deformlit.__version__.count('.') == 2
