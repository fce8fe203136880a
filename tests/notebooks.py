"""Runs notebooks as a reader would, each in a process of its own, and compares the texts they print with those stored.

    python tests/notebooks.py                        runs all and stores their outputs (`make outputs`)
    python tests/notebooks.py 04_sample --flags slow     only this one, with its slow cells
"""
import argparse, logging, os, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'

def notebooks():
    "The notebooks that are run: all below nbs/, but for hidden folders and those marked by a file `.notest`."
    found = [p for p in nbs.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(nbs).parts)]
    return sorted(p for p in found if not (p.parent/'.notest').exists())

def name(path): return path.relative_to(nbs).with_suffix('').as_posix()

# ---- one notebook

def execute(path, flags=()):
    "The notebook with fresh outputs, and the ids of the cells that ran. nbdev decides which: not `eval: false`, `skip_exec` or a flag of pyproject.toml."
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    from nbdev.test import nb_test_cells
    os.environ['IN_TEST'] = '1'     # nbdev-export called by a notebook then does nothing
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)      # "no CUDA runtime", where there is nvcc and no GPU: of the machine, not of the page
    sys.path.insert(0, str(root))
    cfg = get_config(path.parent)
    nb = NBProcessor(path, rm_directives=False, process=True).nb
    todo = {cell.id for cell in nb_test_cells(path, skip_flags=cfg.tst_flags, force_flags=list(flags))}
    shell = CaptureShell(path)
    with working_directory(path.parent):
        try: shell.run_all(nb, exc_stop=True, preproc=lambda cell: cell.id not in todo, cell_timeout=cfg.cell_timeout)
        except Exception: sys.exit(shell.prettytb(fname=path))
    clean_nb(nb)
    return nb, todo

def run(path, out, flags=()):
    "`execute` in a process of its own; the fresh notebook goes to `out`. Fails with the notebook's traceback."
    command = [sys.executable, __file__, str(path), '--out', str(out), '--flags', *flags]
    r = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=3600)
    assert r.returncode == 0, f'{path.name} failed:\n{r.stdout}{r.stderr}'
    return r.stdout.split()         # the ids of the cells that ran

# ---- stored and fresh

number = re.compile(r'[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?')

def decimals(text):
    "Places after the point: `1.50` has 2, `1.5e-3` has 4."
    mantissa, _, exponent = text.lower().partition('e')
    return len(mantissa.partition('.')[2]) - int(exponent or 0)

def same_number(a, b):
    """Whole numbers must be equal. Others may differ by one part in a thousand or by one unit of the last place printed,
    which is what another CPU's order of summation does; below 1e-5 they count as the rounding noise of float32."""
    if a == b: return True
    if not re.search('[.eE]', a + b): return int(a) == int(b)
    x, y = float(a), float(b)
    place = 1.01 * 10. ** -max(decimals(a), decimals(b))
    return abs(x - y) <= max(1e-3 * max(abs(x), abs(y)), place, 1e-5)

def same_text(a, b):
    "Equal but for white space and the last digits of numbers."
    squeeze = lambda text: [''.join(o.split()) for o in number.split(text)]
    return squeeze(a) == squeeze(b) and all(map(same_number, number.findall(a), number.findall(b)))

def texts(cell):
    "What a cell shows: its printed text, then for each output the kinds it has (so that a lost picture is noticed) and its texts."
    outputs = cell.get('outputs', [])
    printed = ''.join(''.join(o['text']) for o in outputs if o['output_type'] == 'stream' and o['name'] == 'stdout')
    res = [printed] if printed else []
    for o in outputs:
        data = o.get('data', {})
        if not data: continue
        res.append(' '.join(sorted(data)))
        res += [''.join(data[k]) for k in ('text/plain', 'text/markdown', 'text/latex') if k in data]
    return res

def differences(stored, fresh, ran):
    "A line for each cell of those that ran whose stored texts are not its fresh ones."
    res = []
    for old, new in zip(stored['cells'], fresh['cells'], strict=True):
        if old['id'] not in ran: continue
        a, b = texts(old), texts(new)
        if len(a) != len(b) or not all(map(same_text, a, b)):
            res.append('cell {}: {!r}\n  stored: {}\n  fresh:  {}'.format(old['id'], ''.join(old['source'])[:80], a, b))
    return res

# ---- the command

def main():
    p = argparse.ArgumentParser(description='Run notebooks and store their outputs.')
    p.add_argument('names', nargs='*', help='names such as 04_sample, or paths; default: all')
    p.add_argument('--flags', nargs='*', default=[], help='run the cells with these flags too: slow, cuda')
    p.add_argument('--jobs', type=int, default=2, help='how many at a time')
    p.add_argument('--out', type=Path, help='run one notebook here, write it to this file and print the ids of the cells that ran')
    a = p.parse_args()
    known = {name(o): o for o in notebooks()}
    unknown = [o for o in a.names if o not in known and not Path(o).is_file()]
    if unknown: sys.exit(f'no such notebook: {" ".join(unknown)}; there are {" ".join(known)}')
    paths = [known.get(o) or Path(o).resolve() for o in a.names] or list(known.values())
    if a.out:
        from fastcore.nbio import write_nb
        nb, ran = execute(paths[0], a.flags)
        write_nb(nb, a.out)
        return print(*ran)
    def store(path):
        try: run(path, path.with_suffix('.tmp'), a.flags)
        except AssertionError as e: return path.with_suffix('.tmp').unlink(missing_ok=True) or str(e)
        path.with_suffix('.tmp').replace(path)
        print('stored', path.name, flush=True)
    with ThreadPoolExecutor(a.jobs) as pool: failed = [o for o in pool.map(store, paths) if o]
    if failed: sys.exit('\n'.join(failed))

if __name__ == '__main__': main()
