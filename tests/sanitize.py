"""Runs tests on a build of the CPU library in which every access is checked: address and undefined behaviour sanitizers (`make test-sanitize`).

    python tests/sanitize.py                          the fuzz tests, and those of dilated windows
    python tests/sanitize.py tests/test_core.py -x    other tests; arguments are pytest's
"""
import os, subprocess, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

FLAGS = '-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1'

def environment():
    "What a process needs to load such a build: the sanitizers' own library first, before Python; None if this compiler has none."
    from deformlit.native import BuildError, compiler
    try: cxx = compiler('cpu')
    except BuildError: return None
    found = [subprocess.run([cxx, f'-print-file-name={o}'], capture_output=True, text=True).stdout.strip() for o in ('libasan.so', 'libubsan.so', 'libstdc++.so.6')]
    if not all('/' in o for o in found): return None
    return dict(LD_PRELOAD=' '.join(found), DEFORMLIT_FLAGS=FLAGS, ASAN_OPTIONS='detect_leaks=0:detect_odr_violation=0:abort_on_error=0:protect_shadow_gap=0',
                UBSAN_OPTIONS='print_stacktrace=1', OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONMALLOC='malloc')

def main():
    env = environment()
    if env is None: sys.exit('no address sanitizer: it comes with g++ (Debian and Ubuntu: g++ and libasan)')
    fuzz = root/'tests'/'test_fuzz.py'
    tests = sys.argv[1:] or [*map(str, (fuzz, root/'tests'/'test_dilated_kernel.py')), '-k', 'not exponential and not no_compiler and not memory and not opcheck']
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests]
    sys.exit(subprocess.run(command, cwd=root, env={**os.environ, 'PYTHONPATH': str(root), **env}).returncode)

if __name__ == '__main__': main()
