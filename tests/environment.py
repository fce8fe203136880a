"""Environments for tests: small ones that see the packages of the running one without copying them."""
import os, subprocess, sys, sysconfig, venv
from pathlib import Path

def make(folder, *install):
    """An environment of its own in `folder`, with `install` as pip's arguments, and for all else the packages of the running one.

    They are put on the path by a .pth file, which does not follow the .pth files in turn: an editable install stays unseen.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != 'nt', clear=True)
    python = Path(folder)/('Scripts' if os.name == 'nt' else 'bin')/'python'
    r = subprocess.run([sys.executable, '-m', 'pip', '--python', str(python), 'install', '--no-input', '--disable-pip-version-check', '-q', *install],
                       capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if r.returncode: raise OSError(r.stderr.strip()[-600:] or r.stdout[-600:])
    site = subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])'], capture_output=True, text=True, check=True).stdout.strip()
    paths = dict.fromkeys(sysconfig.get_paths()[o] for o in ('purelib', 'platlib'))
    (Path(site)/'borrowed.pth').write_text('\n'.join(paths) + '\n')
    return python
