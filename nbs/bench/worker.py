"""One process of `make bench`: one op, one number of threads, one setting of malloc and of the instruction set.

`bench.py` starts it with a job on standard input and reads the rows from a file. In turn, in this one process, it
measures peak memory (each call in a fork that has run nothing before), compares every implementation with the
baseline, and times all of them in rounds: first each one, then each one again, beginning with another. A turn is a first call, kept apart, and the calls that count."""
import contextlib, ctypes, functools, gc, importlib, json, math, os, select, statistics, sys, time
from pathlib import Path
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')     # before torch is imported: idle threads of one op must not take the core from the next
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import limits, ops, predict, results
from deformlit.core import BackendError, backend
from deformlit.native import needs_nvrtc

TOLERANCE = {'float32': (1e-5, 1e-4), 'bfloat16': (2e-2, 4e-2)}      # of outputs and of gradients, in parts of the largest; the reference is the baseline in float32
WAYS = ('native', 'compiled', 'eager')
DETERMINISTIC = ' deterministic'     # behind the name of a way: under `torch.use_deterministic_algorithms`

class WrongResult(AssertionError): "An implementation does not compute what the baseline does."

def say(*words): print(*words, file=sys.stderr, flush=True)
def first_line(e): return (str(e).strip() or type(e).__name__).splitlines()[0][:300]

# ---- what can run ---------------------------------------------------------------------------------------------------

def prepare(entry, name, args):
    "Implementation `name` and its arguments, float tensors as leaves that take gradients. Raises `Missing`."
    f, args = entry.peers[name](args) if name in entry.peers else (entry.ours, args)
    return f, [o.detach().requires_grad_() if isinstance(o, torch.Tensor) and o.is_floating_point() else o for o in args]

class Call:
    "One implementation on its arguments. `call(direction)` gives seconds for one go on the CPU."
    def __init__(self, entry, name, args):
        self.entry, self.name, (self.f, self.args) = entry, name, prepare(entry, name, args)
        self.first = []
        self.wrt = [o for o in self.args if isinstance(o, torch.Tensor) and o.requires_grad]
    @contextlib.contextmanager
    def mode(self):
        "Deterministic algorithms within the block, if the name says so."
        torch.use_deterministic_algorithms(self.name.endswith(DETERMINISTIC))
        try: yield
        finally: torch.use_deterministic_algorithms(False)
    @contextlib.contextmanager
    def way(self):
        "Within the block our way is the one asked for; at its end, it is the one that ran. Around many goes, so that it is in no time."
        if self.name in self.entry.peers: yield; return
        name = self.name.removesuffix(DETERMINISTIC)
        with self.mode(), backend(name, self.entry.op): yield
        ran = self.entry.handle.ran
        assert ran == name, f"asked for '{name}', but '{ran}' ran"
    def forward(self):
        with torch.no_grad(), self.way(): return self.f(*self.args)
    @functools.cached_property
    def ones(self): return torch.ones_like(self.forward())      # the gradient of the output is an input: made before anything is measured
    def both(self, grad=None):
        grad = self.ones if grad is None else grad
        with self.way():
            out = self.f(*self.args)
            return out, torch.autograd.grad(out, self.wrt, grad)
    def once(self, direction): return self.forward() if direction == 'fwd' else self.both()
    def seconds(self, direction, goes=1):
        "The mean of a few goes after a first one, which finds the caches full of others' numbers and goes to `first`. A backward pass has its own forward pass."
        now, taken = time.perf_counter, []
        grad = self.ones if direction != 'fwd' else None
        with torch.set_grad_enabled(direction != 'fwd'), self.way():
            for _ in range(1 + goes):
                a = now(); out = self.f(*self.args); b = now()
                if direction != 'fwd': torch.autograd.grad(out, self.wrt, grad)
                del out
                taken.append(dict(fwd=b - a, bwd=now() - b, fwd_bwd=now() - a)[direction])
        self.first.append(taken[0])
        return sum(taken[1:]) / goes

def calls(entry, names, args, left_out, case):
    "The implementations that can run on these arguments, warm; the others go to `left_out` with the reason."
    found = []
    for name in names:
        try:
            call = Call(entry, name, args)
            for _ in range(2): call.once(case['direction'])
        except (ops.Missing, BackendError) as e: left_out.append(dict(case, implementation=name, why=str(e).rpartition('cannot run: ')[2]))
        except Exception as e:
            if name not in entry.peers: raise
            left_out.append(dict(case, implementation=name, why=f'it fails: {first_line(e)}'))      # a peer's failure is its own
        else: found.append(call)
    return found

# ---- is it right ----------------------------------------------------------------------------------------------------

def compare(call, want, dtype, gradients):
    "Raise `WrongResult` unless outputs (and gradients) are those of the baseline."
    if gradients: out, grads = call.both(want['grad'].to(want['out'].dtype if dtype == 'float32' else getattr(torch, dtype)))
    else: out, grads = call.forward(), ()
    slack = 3 if out.device.type == 'cuda' else 1       # its sums are in another order each time, and some peers divide roughly
    for what, a, b, tolerance in [('output', out, want['out'], slack * TOLERANCE[dtype][0])] + [(f'gradient {i}', a, b, slack * TOLERANCE[dtype][1]) for i, (a, b) in enumerate(zip(grads, want['grads']))]:
        off = ((a.float() - b).abs().max() / b.abs().max()).item() if a.shape == b.shape else math.nan
        if not off <= tolerance: raise WrongResult(f"{call.name} in {dtype}: {what} differs from the baseline's by {off:.2g} of its largest value; {tolerance:.2g} is allowed")

def reference(entry, args, gradients):
    "What the baseline computes in float32: output, and gradients for a fixed random gradient of the output."
    call = Call(entry, next(iter(entry.peers)), [o.float() if isinstance(o, torch.Tensor) and o.is_floating_point() else o for o in args])
    out = call.forward()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device).to(args[0].dtype).float()
    return dict(out=out, grad=grad, grads=call.both(grad)[1] if gradients else ())

# ---- time -----------------------------------------------------------------------------------------------------------

def rounds(timers, budget, least=5, most=30):
    "Seconds of each timer in each round: all in turn, each round beginning with another, for about `budget` seconds."
    goes = [max(1, min(50, round(.003 / max(t(1), 1e-7)))) for t in timers]      # a sample of about 3 ms
    taken, start = [[] for _ in timers], time.perf_counter()
    gc.collect(); gc.disable()
    try:
        while (done := len(taken[-1])) < least or (done < most and time.perf_counter() - start < budget):
            for i in range(len(timers)):
                turn = (i + done) % len(timers)
                taken[turn].append(timers[turn](goes[turn]))
    finally: gc.enable()
    return taken

def spread(xs):
    q = statistics.quantiles(xs, n=4, method='inclusive') if len(xs) > 1 else [xs[0]] * 3
    return dict(median_ms=round(q[1] * 1e3, 5), iqr_ms=round((q[2] - q[0]) * 1e3, 5), rounds=len(xs))

def on_cuda(work, around=contextlib.nullcontext):
    "Seconds of one go by CUDA events around several, within `around()`. Launches may take longer than the kernels: this is what a user without graphs waits."
    def seconds(goes):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with around():
            torch.cuda.synchronize(); a.record()
            for _ in range(goes): work()
            b.record(); b.synchronize()
        return a.elapsed_time(b) / 1e3 / goes
    return seconds

def captured(prepare, around=contextlib.nullcontext):
    """`prepare()` gives some work. That work as a CUDA graph, so that replaying it is the kernels' time and no Python's; returns the function that replays.
    All on one stream, since a backward pass goes back to the stream of its forward pass."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with around():
        with torch.cuda.stream(stream):
            work = prepare()
            for _ in range(3): work()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream): work()
    def replay(): graph.replay()
    replay.keep = graph, work
    return replay

def passes(call, direction):
    "A function that gives the work of a call in one direction. For the backward pass alone it does the forward pass, once."
    f, args, wrt = call.f, call.args, call.wrt
    if direction == 'fwd': return lambda: lambda: f(*args)
    grad = call.ones
    if direction == 'fwd_bwd': return lambda: lambda: torch.autograd.grad(f(*args), wrt, grad)
    def backward():
        out = f(*args)
        return lambda: torch.autograd.grad(out, wrt, grad, retain_graph=True)
    return backward

def cuda_plans(found, case, left_out):
    "Timers by kind of timing and implementation."
    plans, direction = dict(eager={}, graph={}), case['direction']
    for o in found:
        prepare = passes(o, direction)
        @contextlib.contextmanager
        def around(o=o):
            with torch.set_grad_enabled(direction != 'fwd'), o.way(): yield
        with around(): work = prepare(); work()
        plans['eager'][o.name] = on_cuda(work, o.mode if direction == 'bwd' else around)
        try: plans['graph'][o.name] = on_cuda(captured(prepare, around))
        except Exception as e:      # something in it copies from the host, or waits for it
            if o.name not in o.entry.peers and not isinstance(e, RuntimeError): raise
            torch.cuda.synchronize()
            left_out.append(dict(case, timing='graph', implementation=o.name, why=f'cannot be captured: {first_line(e)}'))
    return {timing: timers for timing, timers in plans.items() if timers}

class Others:
    "Cores that other processes of the machine are using, since the last time it was asked."
    def __init__(self): self.last = self.read()
    def read(self):
        try: fields = [int(o) for o in Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:]]
        except OSError: return None
        idle, stolen = fields[3] + fields[4], fields[7]
        mine = os.times()
        return (sum(fields[:8]) - idle - stolen) / os.sysconf('SC_CLK_TCK'), sum(mine[:4]), time.perf_counter()
    def __call__(self):
        if self.last is None: return None
        was, self.last = self.last, self.read()
        busy, mine, wall = (b - a for a, b in zip(was, self.last))
        return round(max(0., (busy - mine) / max(wall, 1e-3)), 2)

# ---- memory ---------------------------------------------------------------------------------------------------------

def status(field):
    line = next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(field + ':'))
    return int(line.split()[1]) * 1024

def peak_here(entry, name, case):
    "Megabytes that the second call needs on top of its arguments. For a process of its own."
    TRIM, MMAP = -1, -3
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(MMAP, 65536); libc.mallopt(TRIM, 65536)       # what is freed goes back at once, so that every peak is seen
    torch.set_num_threads(case['threads'])
    call = Call(entry, name, arguments(entry, case))
    for _ in range(2): call.once(case['direction'])
    gc.collect(); libc.malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')                   # forget the highest so far
    before = status('VmRSS')
    call.once(case['direction'])
    return round((status('VmHWM') - before) / 1e6, 2)

def forked(f, limit=300):
    "`f()` in a fork of this process, or None if that fails or takes too long."
    get, put = os.pipe()
    sys.stdout.flush(); sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(get)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.write(put, json.dumps(f()).encode())
        finally: os._exit(0)
    os.close(put)
    got = b''
    try:
        if select.select([get], [], [], limit)[0]: got = os.read(get, 1000)
        else: os.kill(child, 9)
    finally: os.close(get); os.waitpid(child, 0)
    return json.loads(got) if got else None

def peak_cuda(call, direction):
    call.once(direction); torch.cuda.synchronize(); gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call.once(direction); torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)

# ---- a job ----------------------------------------------------------------------------------------------------------

def sizes_of(entry, case):
    if 'against' in case: return entry.sweeps[case['against']][0](entry.small, case['at'])
    return entry.kinds[case['kind']] if 'kind' in case else case.get('sizes') or entry.on(case['device'])[case['workload']]

made = {}       # the last inputs: those of a GPU's workloads take seconds

def arguments(entry, case):
    "The same numbers in every process, for every dtype and device."
    what = entry.op, repr(sizes_of(entry, case)), case['points']
    if what not in made:
        made.clear()
        made[what] = entry.inputs(sizes_of(entry, case), case['points'], torch.Generator().manual_seed(0))
    args = [o.to(case['device']) if isinstance(o, torch.Tensor) else o for o in made[what]]
    return entry.cast(args, getattr(torch, case['dtype']))

def measure(entry, case, names, budget, left_out, memory, others, rows):
    "Rows of one case: all implementations, compared and timed."
    args, base = arguments(entry, case), next(iter(entry.peers))
    cuda, direction = case['device'] == 'cuda', case['direction']
    found = calls(entry, names, args, left_out, case)
    with contextlib.suppress(ops.Missing):
        want = reference(entry, args, direction != 'fwd')
        for call in list(found):
            if case['dtype'] != 'float32' and call.name in entry.peers: continue
            try: compare(call, want, case['dtype'], direction != 'fwd')
            except WrongResult as e:
                if call.name not in entry.peers: raise
                found.remove(call); left_out.append(dict(case, implementation=call.name, why=f'it is wrong: {e}'))
        del want
    if cuda: plans = cuda_plans(found, case, left_out)
    else: plans = {'wall': {o.name: functools.partial(o.seconds, direction) for o in found}}
    for timing, timers in plans.items():
        others()
        taken = rounds(list(timers.values()), budget)
        busy, by_name, of = others(), dict(zip(timers, taken)), {o.name: o for o in found}
        for call in (o for o in found if o.name in timers):
            ratio = statistics.median(b / t for b, t in zip(by_name[base], by_name[call.name])) if base in by_name else None
            n, first = len(by_name[call.name]), None
            if not cuda: first = ratio and statistics.median(b / t for b, t in zip(of[base].first[-n:], call.first[-n:]))
            peak = (peak_cuda(call, direction) if direction != 'bwd' else None) if cuda else memory.get((call.name, case['workload'], case['dtype'], direction))
            rows.append(dict(case, timing=timing, implementation=call.name, **spread(by_name[call.name]), peak_mb=peak,
                             speedup_over_eager=ratio and round(ratio, 3), others=busy,
                             first_ms=None if cuda else round(statistics.median(call.first[-n:]) * 1e3, 5), first_speedup=first and round(first, 3)))

def measure_limits(entry, case, budget, others):
    "Counts of one workload, and what its bare reads and writes take."
    cpu, threads, sizes = case['device'] == 'cpu', case['threads'], sizes_of(entry, case)
    gpu, count, rows, how, gather, scatter, more = not cpu and needs_nvrtc() is None, entry.count(sizes, 4), None, '', None, None, {}
    if entry.rows:
        rows = entry.rows(entry.inputs(sizes, case['points'], torch.Generator().manual_seed(0)))
        rows = {k: v.to(case['device']) if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
        if cpu: how, gather, scatter = 'limits.cpp', limits.native_gather(rows, threads), limits.native_scatter(rows, threads)
        elif gpu: how, gather, scatter = 'limits.cu', limits.cuda_gather(rows), limits.cuda_scatter(rows)
        if not gather:      # index_add_ on the CPU is no bound: a native op beats it
            how, gather = 'embedding_bag' if cpu else 'embedding_bag and index_add_', limits.torch_gather(rows)
            if not cpu: scatter = limits.torch_scatter(rows)
    (copy, moved), (multiply, flops) = limits.copy(case['device']), limits.multiply(case['device'])
    def timer(f):
        if not cpu: return on_cuda(captured(lambda: f) if gpu else f)
        def seconds(goes):
            start = time.perf_counter()
            for _ in range(goes): f()
            return (time.perf_counter() - start) / goes
        return seconds
    def median(f): return statistics.median(rounds([timer(f)], budget / 4)[0]) if f else None
    others()
    got, mb = [median(f) for f in (gather, scatter, copy, multiply)], lambda x: round(x / 1e6, 3)
    if gpu:
        found = {name: (median(f), moves) for name, (f, moves) in limits.cuda_ground(rows['table'] if rows else torch.randn(2**23, device='cuda')).items()}
        gb_s = {name: round(moves / t / 1e9, 1) for name, (t, moves) in found.items() if moves}
        more = dict(l2_gb_s=gb_s.pop('l2'), issue_g_s=gb_s.pop('issue'), launch_us=round(found['launch'][0] * 1e6, 2), reduce_gb_s=gb_s)
    row = dict(case, how=how, samples=count['samples'], operations=count['operations'], gathered_mb=mb(count['gathered']),
               compulsory_mb={k: mb(v) for k, v in count['compulsory'].items()}, gather_ms=got[0] and round(got[0] * 1e3, 5), scatter_ms=got[1] and round(got[1] * 1e3, 5),
               copy_gb_s=round(moved / got[2] / 1e9, 2), gflops=round(flops / got[3] / 1e9, 1), others=others(), **more)
    if gpu: row['predicted_us'] = predict.predictions(entry, row, rows)
    return row

def run(job, entry=None):
    "The rows of one job. The job is described in bench.py."
    entry, common = entry or ops.entry(job['name']), {k: job[k] for k in ('op', 'device', 'threads', 'malloc', 'isa')}
    out = {o: [] for o in results.LISTS}
    memory, others = {}, Others()
    cases = [{**common, **case} for case in job['cases']]
    if 'compiled' in job['implementations']: importlib.import_module('torch._inductor.compile_fx')      # once, not in every fork
    torch.set_num_threads(1)        # no pool of threads before the forks
    for name in job['implementations'] if job['device'] == 'cpu' else ():
        with contextlib.suppress(ops.Missing): prepare(entry, name, arguments(entry, cases[0]))      # imports what the peers need
    if job.get('memory') and job['device'] == 'cpu' and Path('/proc/self/clear_refs').exists():
        for case in cases:
            if case['points'] != entry.points[0] or case['direction'] == 'bwd' or 'against' in case: continue
            for name in job['implementations']: memory[name, case['workload'], case['dtype'], case['direction']] = forked(functools.partial(peak_here, entry, name, case))
            say(f"  memory of {case['workload']} {case['dtype']} {case['direction']}")
    torch.set_num_threads(job['threads'])
    with contextlib.suppress(AttributeError): torch._dynamo.config.fail_on_recompile_limit_hit = True       # or 'compiled' would quietly be something else
    with contextlib.suppress(AttributeError): torch._functorch.config.donated_buffer = False                # the backward pass alone runs many times after one forward pass
    before = None
    for case in cases if job['implementations'] else ():
        if case['direction'] == 'fwd': names = [o for o in job['implementations'] if not o.endswith(DETERMINISTIC)]
        else: names = job['implementations']
        what = (case['workload'], case['dtype']) if 'against' not in case else case['against']
        if what != before: torch.compiler.reset()
        before = what
        rows = out['sweeps' if 'against' in case else 'rows']
        n = len(rows)
        measure(entry, case, names, job['budget'], out['left_out'], memory, others, rows)
        for row in rows[n:] + out['left_out']: row.pop('sizes', None)
        base = ', '.join(f"{r['implementation']} {r['median_ms']:.3g} ms" + (f" ({r['speedup_over_eager']:.3g}x)" if r['speedup_over_eager'] else '') for r in rows[n:])
        say(' ', case['workload'], *(f'{case[o]}' for o in ('against', 'at') if o in case), case['points'], case['dtype'], case['direction'] + ':', base, *([f"(others use {rows[-1]['others']} cores)"] if rows[n:] and (rows[-1]['others'] or 0) > .2 else []))
    if job.get('limits'):
        for points in dict.fromkeys(o['points'] for o in cases if 'against' not in o):
            for sizes in {o['workload']: {k: o[k] for k in ('workload', 'sizes') if k in o} for o in cases if 'against' not in o}.values():
                case = {**common, **sizes, 'points': points}
                out['limits'].append(measure_limits(entry, case, job['budget'], others))
                out['limits'][-1].pop('sizes', None)
                workload = case['workload']
                say(f"  limits of {workload} {points}: copies {out['limits'][-1]['copy_gb_s']} GB/s")
    return out

def main():
    job = json.loads(sys.stdin.read())
    if job['malloc'] == 'tuned': assert 'MALLOC_TRIM_THRESHOLD_' in os.environ      # bench.py has set it: it must be there when the process starts
    try: found = run(job)
    except WrongResult as e: sys.exit(f'wrong: {e}')
    Path(job['out']).write_text(json.dumps(found))

if __name__ == '__main__': main()
