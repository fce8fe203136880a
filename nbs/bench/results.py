"""The files of `make bench`: what is in them, how a new run is merged into an old one, and when a row is stale.

`runs/bench/<op>.json` holds
    format    the number of this format
    op        name of the op
    runs      by id, what a run was made on and with: date, command, machine, versions, kernels (the digest of the op's sources), load
    rows      one measurement each, see `ROW`; `speedup_over_eager` is the median over rounds of the peer's eager time / this time;
              `first_ms` and `first_speedup`: the same for the first call of each turn, which is not in `median_ms`
    sweeps    rows again, with `against` (what is varied) and `at` (its value)
    limits    one for each workload: counts, and what micro-benchmarks of the same run took, see `LIMIT`
    left_out  implementations that could not be measured, and why
This module needs the standard library only."""
import hashlib, json, os, re, tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[2]
FORMAT = 2
LISTS = ('rows', 'sweeps', 'limits', 'left_out')
KEY = ('device', 'workload', 'points', 'dtype', 'direction', 'threads', 'malloc', 'isa', 'timing', 'against', 'at', 'implementation')
number, text = (int, float), str
maybe = (*number, type(None))
RUN = dict(date=text, command=text, machine=dict, versions=dict, kernels=text, load=dict)
ROW = dict(run=text, op=text, device=text, workload=text, points=text, dtype=text, direction=text, threads=int, malloc=text, isa=text, timing=text,
           implementation=text, median_ms=number, iqr_ms=number, peak_mb=maybe, speedup_over_eager=maybe, rounds=int, others=maybe, first_ms=maybe, first_speedup=maybe)
LIMIT = dict(run=text, op=text, device=text, workload=text, points=text, threads=int, how=text, samples=int, operations=dict, gathered_mb=number, compulsory_mb=dict,
             gather_ms=maybe, scatter_ms=maybe, copy_gb_s=number, gflops=number, others=maybe)
CHOICES = dict(points=('near', 'uniform', 'none'), direction=('fwd', 'bwd', 'fwd_bwd'), malloc=('default', 'tuned'), timing=('wall', 'eager', 'graph'))

def check(results:dict) -> dict:
    "`results` if it is whole; raises ValueError with the first thing that is not."
    def ok(it, what):
        if not it: raise ValueError(f'not a file of `make bench`: {what}')
    ok(isinstance(results, dict) and results.get('format') == FORMAT, f'format {FORMAT} was expected')
    for o in LISTS: ok(isinstance(results.get(o), list), f'no list `{o}`')
    for name, run in results.get('runs', {}).items():
        for field, kind in RUN.items(): ok(isinstance(run.get(field), kind), f'run {name}: `{field}` is {run.get(field)!r}')
    for name in LISTS[:3]:
        seen = set()
        for row in results[name]:
            for field, kind in (LIMIT if name == 'limits' else ROW).items(): ok(isinstance(row.get(field), kind), f'{name}: `{field}` is {row.get(field)!r}')
            for field, known in CHOICES.items(): ok(row.get(field, known[0]) in known, f'{name}: `{field}` is {row.get(field)!r}')
            ok(row['run'] in results['runs'], f"{name}: no run {row['run']}")
            ok(key(row) not in seen, f'{name}: twice {key(row)}')
            seen.add(key(row))
    return results

def key(row): return tuple(row.get(o) for o in KEY)

def sources(folder=root/'kernels', op=None) -> list:
    """The source files in `kernels/` (not those of the ladder below it); with `op` only those that begin with this name, such as
    multiscale.cpp and multiscale_cpu.h, and what they include."""
    built = {'.o', '.so', '.pyc', '.pyd', '.dll'}
    files = {p.name: p for p in sorted(Path(folder).glob('*')) if p.is_file() and p.suffix not in built and p.name[0] not in '._'}
    if op is None: return list(files.values())
    wanted = [name for name in files if re.match(rf'{op}[._]', name)]
    for name in wanted: wanted += [o for o in re.findall(r'"([\w.]+)"', files[name].read_text()) if o in files and o not in wanted]
    return [files[name] for name in sorted(wanted)]

def kernels_hash(folder=root/'kernels', op=None) -> str:
    "A digest of `sources`, names and contents; 'none' if there are none."
    files = sources(folder, op)
    if not files: return 'none'
    h = hashlib.sha256()
    for p in files: h.update(p.relative_to(folder).as_posix().encode() + b'\0' + hashlib.sha256(p.read_bytes()).digest())
    return h.hexdigest()

def is_stale(results:dict, row:dict, now:str) -> bool:
    "Was the row measured with other kernels than those whose digest is `now`?"
    return results['runs'][row['run']]['kernels'] != now

def same_ground(a:dict, b:dict, device:str) -> bool:
    "Can rows of run `a` stand beside rows of run `b`? The same machine, torch and peers; the kernels may differ (`is_stale` tells)."
    machine = lambda run: [run['machine'].get(o) for o in ('cpu', 'cores', *(['gpu'] if device == 'cuda' else []))]
    versions = lambda run: {k: v for k, v in run['versions'].items() if k not in ('python', 'deformlit')}
    return machine(a) == machine(b) and versions(a) == versions(b)

def merge(old, new:dict) -> dict:
    "The rows of `new`, and those of `old` that it does not measure again, if they come from the same machine, torch and peers."
    if old is None: return check(new)
    runs, latest = {**old['runs'], **new['runs']}, list(new['runs'].values())[-1]
    devices = {row['device'] for o in LISTS for row in new[o]}
    out = dict(format=FORMAT, op=new['op'], runs={})
    for name in LISTS:
        again = {key(row) for row in new[name]}
        # what runs now is no longer left out, and the other way round
        if name == 'left_out': again |= {key(row) for row in new['rows'] + new['sweeps']}
        if name in ('rows', 'sweeps'): again |= {key(row) for row in new['left_out']}
        stands = lambda row: row['device'] not in devices or same_ground(runs[row['run']], latest, row['device'])
        out[name] = sorted([row for row in old[name] if key(row) not in again and stands(row)] + new[name], key=order)
    used = {row['run'] for o in LISTS for row in out[o]}
    out['runs'] = {k: v for k, v in sorted(runs.items()) if k in used}
    return check(out)

def order(row): return [(o is not None, str(type(o)), o) if o is not None else (False, '', '') for o in key(row)]

def read(path):
    "The results in the file, or None if there is no file."
    try: found = Path(path).read_text(encoding='utf-8')
    except FileNotFoundError: return None
    return check(json.loads(found))

def write(path, text:str):
    "Write a file whole or not at all: beside it first, then in its place."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as f: f.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException: Path(part).unlink(missing_ok=True); raise

def dumps(data:dict) -> str:
    "JSON with one row on a line, so that git shows which rows changed."
    def value(v):
        if isinstance(v, list) and v and isinstance(v[0], dict): return '[\n' + ',\n'.join('  ' + json.dumps(o, ensure_ascii=False) for o in v) + '\n ]'
        return json.dumps(v, ensure_ascii=False)
    body = lambda d, pad: '{\n' + ',\n'.join(f'{pad}{json.dumps(k)}: ' + (body(v, pad + ' ') if k == 'runs' and v else value(v)) for k, v in d.items()) + f'\n{pad[1:]}}}'
    return body(data, ' ') + '\n'
