"""Measure the ops beside their peers: `make bench`, or `python nbs/bench/bench.py`.

    make bench                       everything; a quarter of an hour on two cores
    make bench ARGS="--quick"        the main rows, under two minutes
    make bench ARGS="--choose"       which way is fastest for which kind of input -> deformlit/choices.json

Each setting that holds for a whole process (threads, malloc, instruction set) is measured in a process of its own, one
after the other; within it peers and our ways take turns. Results go to runs/bench/<op>.json when all are there: rows that
were measured again replace the old ones, the others stay. The page `speed.ipynb` is made from these files."""
import argparse, json, os, platform, re, shlex, subprocess, sys, tempfile, time
from pathlib import Path
import results

here, root = Path(__file__).resolve().parent, results.root
NAMES = ('multiscale', 'dilated', 'deformed_keys')      # the entries of ops.py, which is not imported here: this process stays small and loads no torch
CHOICES = root/'deformlit'/'choices.json'
WAYS = ('native', 'compiled', 'eager')
TUNED = dict(MALLOC_MMAP_THRESHOLD_=str(1 << 30), MALLOC_TRIM_THRESHOLD_=str(1 << 31), MALLOC_TOP_PAD_=str(1 << 26))

# ---- the machine ----------------------------------------------------------------------------------------------------

def cpu():
    "Model, instruction sets and cores."
    try: text = Path('/proc/cpuinfo').read_text()
    except OSError: return platform.processor() or platform.machine(), platform.machine(), os.cpu_count()
    field = lambda name: (re.search(rf'^{name}\s*:\s*(.*)$', text, re.M) or ['', ''])[1]
    flags = set(field('flags').split())
    family = f", family {field('cpu family')} model {field('model')}" if field('cpu family') else ''
    isa = 'avx512' if {'avx512f', 'avx512bw', 'avx512vl', 'avx512dq'} <= flags else 'avx2' if {'avx2', 'fma'} <= flags else 'baseline'
    return (field('model name') or platform.machine()) + family, isa, len(os.sched_getaffinity(0))

ABOUT = '''import importlib.metadata as m, json, platform, sys, torch, ops
def version(o):
    try: return m.version(o)
    except m.PackageNotFoundError: return None
device = sys.argv[1]
def about(e): return dict(op=e.op, workloads=list(e.on(device)), peers=list(e.peers), elsewhere=[] if device == 'cuda' else e.cuda_peers, points=list(e.points), slow=e.slow_peers, sweeps={k: v[1] for k, v in e.sweeps.items()}, kinds=list(e.kinds))
versions = dict(python=platform.python_version(), torch=torch.__version__, **{o: version(o) for o in ('transformers', 'deformlit')})
if device == 'cuda': versions.update(cuda=torch.version.cuda, triton=version('triton'), deformops=version('deformops'))
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps(dict(versions=versions, gpu=gpu, entries={o: about(ops.entry(o)) for o in sys.argv[2:]})))'''

def driver():
    "The version of NVIDIA's driver, or None."
    try: return subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True, timeout=30).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired): return None

def about(names, args, device='cpu'):
    "The description of this run, and what ops.py says of each op; asked in a process of its own."
    r = subprocess.run([sys.executable, '-c', ABOUT, device, *names], cwd=here, env=environment(1), capture_output=True, text=True)
    if r.returncode: sys.exit(r.stderr)
    found, (model, isa, cores) = json.loads(r.stdout.splitlines()[-1]), cpu()
    if found['versions']['deformlit'] is None: found['versions']['deformlit'] = re.search(r'__version__ = "(.*)"', (root/'deformlit'/'__init__.py').read_text())[1]
    if device == 'cuda': found['versions']['driver'] = driver()
    given = [o for i, o in enumerate(args) if not o.startswith('--out') and (i == 0 or args[i - 1] != '--out')]      # where the file lies is nobody's business
    run = dict(date=time.strftime('%Y-%m-%d %H:%M:%S'), command=' '.join(['make bench', *([f'ARGS="{shlex.join(given)}"'] if given else [])]),
               machine=dict(cpu=model, isa=isa, cores=cores, gpu=found['gpu']), versions=found['versions'], load=dict(before=[round(o, 2) for o in os.getloadavg()]))
    return run, found['entries']

def environment(threads, malloc='default', isa='default'):
    "The environment of one process."
    env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_') and k not in ('DEFORMLIT_ISA', 'DEFORMLIT_DEBUG')}
    env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OMP_WAIT_POLICY='passive', HF_HUB_OFFLINE='1', PYTHONWARNINGS='ignore', TORCHINDUCTOR_COMPILE_THREADS='1')
    env['PYTHONPATH'] = os.pathsep.join([str(root), *filter(None, [env.get('PYTHONPATH')])])
    if malloc == 'tuned': env.update(TUNED)
    if isa != 'default': env['DEFORMLIT_ISA'] = isa
    return env

def work(job):
    "Run one job in a process of its own and return its rows; exits with the reason if that fails."
    setting = ', '.join([f"{job['threads']} thread{'s' * (job['threads'] > 1)}", *(f'{o} {job[o]}' for o in ('malloc', 'isa') if job[o] != 'default')])
    print(f"{job['name']} on {job['device']}, {setting}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/'rows.json'
        r = subprocess.run([sys.executable, here/'worker.py'], input=json.dumps(dict(job, out=str(out))), text=True, env=environment(job['threads'], job['malloc'], job['isa']))
        if r.returncode: sys.exit(f'{job["name"]}: the measurement failed, nothing was written; the lines above say why')
        return json.loads(out.read_text())

# ---- what is measured -----------------------------------------------------------------------------------------------

def cases(workloads, points, dtypes, directions):
    return [dict(workload=w, dtype=t, points=p, direction=d) for w in workloads for t in dtypes for p in points for d in directions]

def jobs(name, a, entry):
    """The processes for one op. `entry` is what `about` says of it. A job has
    name, op, device; threads, malloc, isa: its process; implementations; cases: what is measured; budget: seconds for each;
    memory, limits: whether these are measured too."""
    names = [o for o in entry['peers'] if o not in entry.get('elsewhere', ()) and (a.all or o not in entry['slow'])] + list(WAYS)
    if a.device == 'cuda': names.append('native deterministic')
    if a.implementation: names = list(dict.fromkeys([entry['peers'][0], *a.implementation]))
    if a.limits: names = []
    workloads, threads = a.workload or entry['workloads'], a.threads
    dtypes = a.dtype or (['float32'] if a.quick else ['float32', 'bfloat16'])
    common = dict(name=name, op=entry['op'], device=a.device, malloc='default', isa='default', implementations=names, budget=a.seconds or (1.5 if a.quick else 5))
    both, main, points = ['fwd', 'fwd_bwd'], threads[-1], entry['points']
    if a.limits or a.device == 'cuda':
        yield dict(common, threads=main, limits=a.limits, cases=cases(workloads, points, dtypes, ['fwd', 'bwd', 'fwd_bwd']))
        return
    for t in threads[-1:] if a.quick else threads:
        if a.quick: todo = cases(workloads, points[:1], dtypes, both)
        else: todo = cases(workloads, points, [o for o in dtypes if o == 'float32'], ['fwd', 'bwd', 'fwd_bwd']) + cases(workloads, points[:1], [o for o in dtypes if o != 'float32'], both)
        yield dict(common, threads=t, memory=True, limits=True, cases=todo)
    if a.quick: return
    for t in threads: yield dict(common, threads=t, malloc='tuned', cases=cases(workloads, points, ['float32'], both))
    order = ['baseline', 'avx2', 'avx512']
    for isa in order[:order.index(cpu()[1]) + 1]:
        yield dict(common, threads=main, isa=isa, implementations=[entry['peers'][0], 'native'], cases=cases(workloads, points[:1], ['float32'], both))
    if not a.workload: yield dict(common, threads=main, budget=min(1.5, common['budget']), cases=[
        dict(workload='sweep', against=what, at=x, points=points[0], dtype='float32', direction=d) for what, xs in entry['sweeps'].items() for d in both for x in xs])

def bench(name, a, run, entry):
    "Measure one op and merge the rows into its file."
    new = dict(format=results.FORMAT, op=name, runs={}, **{o: [] for o in results.LISTS})
    for job in jobs(name, a, entry):
        for o, rows in work(job).items(): new[o] += rows
    run['load'].update(after=[round(o, 2) for o in os.getloadavg()], others=max([row['others'] for o in ('rows', 'sweeps') for row in new[o] if row['others'] is not None], default=0.))
    stamp = run['date'].replace(' ', '_')
    new['runs'][stamp] = run
    for o in results.LISTS: new[o] = [dict(run=stamp, **row) for row in new[o]]
    new['left_out'] = list({results.key(row): row for row in new['left_out']}.values())
    path = a.out/f'{name}.json'
    results.write(path, results.dumps(results.merge(results.read(path), new)))
    reasons = {(row['implementation'], row['why']) for row in new['left_out']}
    for who, why in sorted(reasons): print(f'left out: {who}: {why}', file=sys.stderr)
    if run['load']['others'] > .2: print(f"other processes used up to {run['load']['others']} cores meanwhile: do not trust these figures", file=sys.stderr)
    print(f"{sum(len(new[o]) for o in results.LISTS[:3])} rows written to {path}")

def choose(name, a, run, entry):
    "Rank our ways for each kind of input by time, and write the ranking where `ranking` of the core reads it."
    todo = [dict(workload=f'1e{kind}', kind=kind, points=entry['points'][0], dtype='float32', direction=d) for d in ('fwd', 'fwd_bwd') for kind in entry['kinds']]
    job = dict(name=name, op=entry['op'], device=a.device, threads=a.threads[-1], malloc='default', isa='default', implementations=list(WAYS), budget=a.seconds or (1 if a.quick else 3), cases=todo)
    found = work(job)
    by_kind = {}
    for row in found['rows']:
        if row['timing'] == 'graph': continue
        kind = f"{row['device']} {dict(fwd='forward', fwd_bwd='forward+backward')[row['direction']]} {row['workload']}"
        by_kind.setdefault(kind, []).append((row['median_ms'], row['implementation']))
    old = json.loads(a.choices.read_text()) if a.choices.exists() else {}
    ranked = {kind: [name for _, name in sorted(rows)] for kind, rows in by_kind.items()}
    made = {**old.get('_made', {}), f"{entry['op']} {a.device}": {o: run[o] for o in ('date', 'machine', 'versions', 'kernels')}}
    old.update({'_made': made, entry['op']: dict(sorted({**old.get(entry['op'], {}), **ranked}.items()))})
    text = re.sub(r'\[\s+([^\]]*?)\s+\]', lambda m: '[' + ' '.join(m[1].split()) + ']', json.dumps(old, indent=1))      # a ranking on one line
    results.write(a.choices, text + '\n')
    for kind, ways in ranked.items(): print(f"{entry['op']} {kind}: {' < '.join(ways)}")

# ---- the command ----------------------------------------------------------------------------------------------------

def parser():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    p = argparse.ArgumentParser(prog='bench', description=__doc__.split('\n', 1)[0], allow_abbrev=False)
    p.add_argument('--quick', action='store_true', help='the main rows, under two minutes on two cores')
    p.add_argument('--op', nargs='+', choices=NAMES, default=list(NAMES), help='only these ops')
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where to run (default: cpu)')
    p.add_argument('--threads', nargs='+', type=int, default=sorted({1, min(2, cores)}), help='numbers of threads, the last is the main one (default: 1 2)')
    p.add_argument('--workload', nargs='+', help='only these workloads, and no sweeps')
    p.add_argument('--dtype', nargs='+', choices=('float32', 'bfloat16'), help='only these dtypes')
    p.add_argument('--all', action='store_true', help='with the peers that are slow to compile')
    p.add_argument('--implementation', nargs='+', metavar='NAME', help='only these peers and ways, beside the baseline')
    p.add_argument('--limits', action='store_true', help='only the micro-benchmarks')
    p.add_argument('--seconds', type=float, help='how long to repeat each measurement (at least 5 rounds)')
    p.add_argument('--choose', action='store_true', help='rank our ways by kind of input instead, and write deformlit/choices.json')
    p.add_argument('--out', type=Path, default=root/'runs'/'bench', help='folder of the results')
    p.add_argument('--choices', type=Path, default=CHOICES, help=argparse.SUPPRESS)
    return p

def main(args=None):
    args = sys.argv[1:] if args is None else args
    p = parser()
    a = p.parse_args(args)
    if min(a.threads) < 1: p.error(f'argument --threads: expected numbers above zero, got {min(a.threads)}')
    if a.seconds is not None and a.seconds <= 0: p.error(f'argument --seconds: expected a number above zero, got {a.seconds}')
    run, entries = about(a.op, args, a.device)
    for name in a.op:
        known = [*entries[name]['peers'], *WAYS, 'native deterministic']
        for o in a.implementation or ():
            if o not in known: p.error(f"argument --implementation: expected one of {', '.join(known)} for {name}, got {o!r}")
        for o in a.workload or ():
            if o not in entries[name]['workloads']: p.error(f"argument --workload: expected one of {', '.join(entries[name]['workloads'])} for {name}, got {o!r}")
    if a.device == 'cuda' and run['machine']['gpu'] is None: p.error('argument --device: PyTorch sees no CUDA device here')
    try:
        for name in a.op: (choose if a.choose else bench)(name, a, {**run, 'kernels': results.kernels_hash(op=name), 'load': dict(run['load'])}, entries[name])
    except KeyboardInterrupt: sys.exit('\nbench: interrupted; the files are as they were')

if __name__ == '__main__': main()
