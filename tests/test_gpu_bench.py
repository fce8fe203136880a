"""What a call on a GPU would do, tried without one: the plan, going on, the deadline, failures, predictions, and the paths of the timing."""
import contextlib, json, math, os, subprocess, sys, time
import pytest, torch
import toy
from notebooks import nbs, root

sys.path.insert(0, str(nbs/'bench'))
import bench, gpu, kernel_2020, limits, ops, predict, report, results, worker
from gpu import Step
from test_bench import TINY, entry, results_of, row_of, run_of      # noqa: `entry` is a fixture

def sh(name, text, limit=20, **kw): return Step(name, limit, ['sh', '-c', text], **kw)
def go(steps, out, minutes=None, say=lambda line: None): out.mkdir(exist_ok=True); return gpu.go(steps, out, minutes, say)
def counted(out, name): return len((out/name).read_text()) if (out/name).exists() else 0

# ---- the plan

def test_plan(tmp_path):
    names = [o.name for o in gpu.plan(tmp_path, ('multiscale', 'dilated', 'deformed_keys'))]
    assert len(set(names)) == len(names)
    order = ['build', 'limits of multiscale', 'tests', 'memcheck', 'racecheck', 'multiscale', 'peers of multiscale', 'training step, native, 8 workers', 'dilated', 'deformed_keys', 'peers of dilated', 'peers of deformed_keys', 'training']
    assert [o for o in names if o in order] == order
    assert not [o.name for o in gpu.plan(tmp_path, ('multiscale',)) if 'dilated' in o.name]
    assert all(o.limit <= 8.5 * 60 for o in gpu.plan(tmp_path))

def test_commands_are_understood(tmp_path):
    "By the programs they call: the benchmark, the trainer, the tests."
    about = {o: dict(op=e.op, workloads=list(e.on('cuda')), peers=list(e.peers), points=e.points, slow=e.slow_peers, sweeps={}, kinds=[]) for o in ops.ENTRIES for e in [ops.entry(o)]}
    text = ''.join(p.read_text() for p in (root/'tests').glob('test_*cuda*.py'))
    for step in gpu.plan(tmp_path):
        command = [str(o) for o in step.command]
        if command[1].endswith('bench.py'):
            a = bench.parser().parse_args(command[2:])
            assert a.device == 'cuda' and a.out == tmp_path
            jobs = [o for name in a.op for o in bench.jobs(name, a, about[name])]
            assert len(jobs) == len(a.op) and all(bool(o['limits']) == ('limits' in step.name) == (not o['implementations']) for o in jobs)
            for o in a.op: assert set(a.implementation or ()) <= {*about[o]['peers'], *worker.WAYS, 'native deterministic'} and set(a.workload or ()) <= set(about[o]['workloads'])
        elif '--device' in command:
            train = pytest.importorskip('deformlit.train')
            train.train_parser(train.chosen_task([])).parse_args(command[3:])
        elif 'pytest' in command: assert any(o.endswith('test_cuda.py') for o in command) and (step.name == 'tests' or f"'{step.name}'" in text)

def test_dry_run(tmp_path):
    r = subprocess.run([sys.executable, nbs/'bench'/'gpu.py', '--dry-run', '--only', 'tests', '--out', tmp_path], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert 'tests (200 s at most)' in r.stdout and 'multiscale encoder near float32: fwd' in r.stdout and not list(tmp_path.iterdir())

# ---- running it

def test_goes_on_where_it_ended(tmp_path):
    out = tmp_path/'out'
    steps = [sh('build', f'printf x >> {out}/build', always=True), sh('one', f'printf x >> {out}/one; echo 3 passed', proof=r'\d+ passed'), sh('two', f'printf x >> {out}/two')]
    def stop(line):
        if line.startswith('one'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go(steps, out, say=stop)
    assert [counted(out, o) for o in ('build', 'one', 'two')] == [1, 1, 0] and gpu.read(out)['one']['status'] == 'done'
    for _ in range(2): state = go(steps, out)
    assert [counted(out, o) for o in ('build', 'one', 'two')] == [3, 1, 1]
    assert {k: v['status'] for k, v in state.items()} == dict(build='done', one='done', two='done') and state['one']['why'] == '3 passed'

def test_other_kernels_are_measured_anew(tmp_path, monkeypatch):
    steps = [sh('one', f'printf x >> {tmp_path}/one')]
    for kernels in ('a', 'a', 'b'):
        monkeypatch.setattr(results, 'kernels_hash', lambda: kernels)
        go(steps, tmp_path)
    assert counted(tmp_path, 'one') == 2

def test_a_failure_is_told_and_the_rest_goes_on(tmp_path):
    out, said = tmp_path/'out', []
    broken = sh('broken', 'echo "Traceback"; echo "ValueError: no such thing"; echo bye; exit 3')
    steps = [broken, sh('unproved', 'echo 3 skipped', proof='passed'), sh('gone', 'true', lacks='not installed: x'), sh('fine', 'echo yes')]
    state = go(steps, out, say=said.append)
    assert [state[o.name]['status'] for o in steps] == ['failed', 'failed', 'failed', 'done']
    assert state['broken']['why'] == 'ValueError: no such thing' and '3 skipped' in state['unproved']['why'] and state['gone']['why'] == 'not installed: x'
    assert len(said) == 4 and 'ValueError' in (out/'log.txt').read_text()
    # again: what failed comes after what was not tried
    assert [o.name for o in gpu.todo([broken, sh('new', 'true')], state, results.kernels_hash())] == ['new', 'broken']

def test_deadline(tmp_path):
    "A step that could end too late is not begun; a shorter one after it is."
    said = []
    steps = [sh('long', f'printf x >> {tmp_path}/long', limit=100), sh('short', f'printf x >> {tmp_path}/short', limit=1)]
    state = go(steps, tmp_path, minutes=.5, say=said.append)
    assert (counted(tmp_path, 'long'), counted(tmp_path, 'short')) == (0, 1) and 'long' not in state and 'left for the next call' in said[0]
    assert go(steps, tmp_path, minutes=5)['long']['status'] == 'done' and (counted(tmp_path, 'long'), counted(tmp_path, 'short')) == (1, 1)

def test_a_step_is_stopped_with_all_it_started(tmp_path):
    state = go([sh('slow', f'sleep 60 & echo $! > {tmp_path}/child; echo begun; sleep 60', limit=.5)], tmp_path)
    assert state['slow']['status'] == 'failed' and 'stopped after 0.5 seconds' in state['slow']['why'] and 'begun' in state['slow']['why']
    child = int((tmp_path/'child').read_text())
    for _ in range(100):
        if gone(child): return
        time.sleep(.05)
    pytest.fail('the child is still there')

def gone(pid):
    try: return (open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]) == 'Z'
    except FileNotFoundError: return True

def test_begins_with_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'GPU', tmp_path/'gpu')
    (tmp_path/'gpu'/'out').mkdir(parents=True)
    (tmp_path/'gpu'/'out'/'state.json').write_text('{"one": {"status": "done"}}')
    gpu.begin(tmp_path/'out')
    assert gpu.read(tmp_path/'out') == {'one': {'status': 'done'}} and results.read(tmp_path/'out'/'multiscale.json') == results.read(root/'runs'/'bench'/'multiscale.json')

# ---- carried libraries

BUILD = 'import sys; sys.path.insert(0, {bench!r}); import gpu; from pathlib import Path; print(gpu.build("cpu", {folder!r}, Path({carried!r})))'

def test_carried_library(tmp_path):
    "It is found under the name that it has on this machine, with a compiler that builds nothing; one that does not load is not used."
    from deformlit import native
    folder, carried, cxx = toy.make(tmp_path/'toy'), tmp_path/'carried', tmp_path/'c++'
    carried.mkdir()
    try: native.build('cpu', carried/f'cpu-{gpu.digest("cpu", folder)}.so', folder)
    except native.BuildError as e: pytest.skip(str(e))
    cxx.write_text('#!/bin/sh\n[ "$1" = --version ] && echo another compiler && exit 0\necho error: it builds nothing; exit 1\n')
    cxx.chmod(0o755)
    def call(cache):
        env = toy.environment(CXX=cxx, DEFORMLIT_CACHE=cache)
        return subprocess.run([sys.executable, '-c', BUILD.format(bench=str(nbs/'bench'), folder=str(folder), carried=str(carried))], env=env, capture_output=True, text=True)
    first, again = call(tmp_path/'a'), call(tmp_path/'a')
    assert (first.stdout, again.stdout) == ('carried\n', 'there\n'), first.stderr + again.stderr
    next(carried.iterdir()).write_bytes(b'not a library')
    wrong = call(tmp_path/'b')
    assert wrong.returncode and 'does not fit' in wrong.stdout and 'it builds nothing' in wrong.stderr
    (folder/'kernels'/'gate.cpp').write_text(toy.CPP + '// changed')
    assert not (carried/f'cpu-{gpu.digest("cpu", folder)}.so').exists()

# ---- predictions

GROUND = dict(copy_gb_s=1000., gflops=1000., l2_gb_s=2000., reduce_gb_s={'4 at a time': 500.}, issue_g_s=4000., launch_us=2.)

def test_predictions():
    "By hand: 1 MB at 1000 GB/s takes 1 µs."
    count = dict(compulsory=dict(fwd=1e6, bwd=3e6), gathered=8e6, operations=dict(fwd=1e6, bwd=2e6), reduced=5e6)
    got = predict.predict(count, GROUND)
    assert got['fwd'] == dict(memory=1, cache=4, arithmetic=1, launch=2, total=6) and predict.longest(got['fwd']) == 'cache'
    assert got['bwd'] == dict(memory=3, cache=4, arithmetic=2, reductions=10, launch=2, total=12) and got['fwd_bwd'] == dict(total=18)
    assert predict.predict(count, GROUND, reads=2e6)['fwd']['total'] == 3 and predict.longest(predict.predict(count, GROUND, dict(fwd=20e6))['fwd']) == 'instructions'
    assert predict.ground(dict(copy_gb_s=1)) is None and predict.ground(GROUND) is GROUND

def test_predictions_of_an_entry(entry):
    sizes = dict(b=1, shapes=[(9, 7), (3, 2)], n=2, d=8, q=69, k=2)
    import dataclasses
    small = dataclasses.replace(entry, cuda_workloads=dict(tiny=sizes))
    rows = small.rows(small.inputs(sizes, 'near', torch.Generator().manual_seed(0)))
    got = predict.predictions(small, dict(GROUND, workload='tiny'), rows)
    assert set(got) == {'float32', 'bfloat16'} and set(got['float32']) == {'fwd', 'bwd', 'fwd_bwd'}
    c = small.count(sizes, 4)
    assert c['reduced'] == c['gathered'] == 4 * c['samples'] * 8 * 4
    assert got['float32']['fwd']['cache'] == round(small.reads(rows, 4) / 2e6, 2) <= c['gathered'] / 2e6

@pytest.mark.parametrize('queries', [1, 4, 100])
def test_distinct(entry, queries):
    rows = entry.rows(entry.inputs(TINY, 'uniform', torch.Generator().manual_seed(0)))
    numbers, want = limits.four(rows)[0].view(*rows['first'].shape[:2], -1), 0
    for table in numbers.tolist():
        for i in range(0, len(table), queries): want += len({o for q in table[i:i + queries] for o in q})
    assert limits.distinct(rows, queries) == want

def test_micro_benchmarks_compile():
    from deformlit import native
    try: native._nvrtc()
    except native.BuildError as e: pytest.skip(str(e))
    for arch in ('80', '90', '100'): assert native.cubin((nbs/'bench'/'limits.cu').read_text(), arch)

# ---- peers and timing

def test_peers_say_why_they_are_missing(entry, monkeypatch):
    monkeypatch.delenv('DEFORMLIT_MMCV', raising=False)
    args = entry.inputs(TINY, 'near', torch.Generator().manual_seed(0))
    for name in entry.cuda_peers:
        with pytest.raises(ops.Missing, match=r'\w+ .*\w+'): entry.peers[name](args)

@pytest.mark.parametrize('dilations, ks', [((1, 2), 3), ((3,), 3), ((2,), 5)])
def test_flex_attention_computes_the_same(dilations, ks):
    "As it is run on a GPU, but not compiled."
    q, k, v, *rest = ops.dilated_inputs(ops.dilated_sizes(2, 7, 9, 2, 24, dilations, ks), 'none', torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.dilated_by_flex(q, ks, dilations)(q, k, v, *rest), ops.unfold(q, k, v, *rest))

def test_source_of_the_2020_kernel(tmp_path):
    with pytest.raises(FileNotFoundError, match='ms_deform_attn_cuda.cu'): kernel_2020.source(tmp_path)
    for name, text in {'ms_deform_attn_cuda.cu': '#include <ATen/ATen.h>\ntemplate <typename scalar_t>\nvoid launch();\nat::Tensor ms_deform_attn_cuda_forward() {}', 'common_cuda_helper.hpp': '#define A', 'ms_deform_attn_cuda_kernel.cuh': '#include "x"\nkernels'}.items(): (tmp_path/name).write_text(text)
    text = kernel_2020.source(tmp_path)
    assert 'ATen' not in text and 'at::' not in text and text.index('#define A') < text.index('kernels') < text.index('void launch();') < text.index('extern "C"')

@pytest.mark.parametrize('direction', ['fwd', 'bwd', 'fwd_bwd'])
def test_timing_on_cuda_runs_what_it_says(entry, direction, monkeypatch):
    "With clocks and graphs that only run the work: each way under its own name, gradients where they are asked for."
    ran = []
    def once(work, around=contextlib.nullcontext):
        def seconds(goes):
            with around(): got = work()
            ran.append((torch.is_grad_enabled(), got))
            return 1e-3
        return seconds
    def graph(prepare, around):
        with around(): work = prepare(); got = work()
        return lambda: got
    monkeypatch.setattr(worker, 'on_cuda', once); monkeypatch.setattr(worker, 'captured', graph)
    case, left_out = dict(workload='tiny', sizes=TINY, device='cpu', dtype='float32', points='near', direction=direction, threads=1), []
    found = worker.calls(entry, ['transformers', 'eager', 'loop', 'eager deterministic'], worker.arguments(entry, case), left_out, case)
    plans = worker.cuda_plans(found, case, left_out)
    assert not left_out and [list(o) for o in plans.values()] == [[o.name for o in found]] * 2 and not torch.are_deterministic_algorithms_enabled()
    got = [timer(1) and ran[-1][1] for o in plans.values() for timer in o.values()]
    want = worker.reference(entry, worker.arguments(entry, case), True)
    for o in got:
        if direction == 'fwd': torch.testing.assert_close(o, want['out'], rtol=1e-4, atol=1e-4); assert not o.requires_grad
        else: assert [x.shape for x in o] == [x.shape for x in want['grads']]

def test_deterministic_while_it_runs(entry):
    case = dict(workload='tiny', sizes=TINY, device='cpu', dtype='float32', points='near')
    seen = []
    def watched(*args): seen.append(torch.are_deterministic_algorithms_enabled()); return entry.ours(*args)
    import dataclasses
    for name in ('eager', 'eager deterministic'): worker.Call(dataclasses.replace(entry, ours=watched), name, worker.arguments(entry, case)).both()
    assert seen == [False, False, True, True] or seen == [False, True]

@pytest.mark.parametrize('error', [RuntimeError('out of\nmemory'), worker.WrongResult('off')], ids=['fails', 'wrong'])
def test_a_peer_that_fails_is_left_out(entry, error):
    "It costs only its own rows."
    import dataclasses
    from test_bench import job
    def build(args):
        def peer(value, shapes, points, weights):
            if isinstance(error, RuntimeError): raise error
            return 2 * entry.ours(value, shapes, points, weights)
        return peer, args
    e = dataclasses.replace(entry, peers={**entry.peers, 'other': build})
    found = worker.run(job(e, ('transformers', 'other', 'eager'), ['fwd'], cases=[dict(workload='tiny', sizes=TINY, dtype='float32', points='near', direction='fwd')]), e)
    assert {row['implementation'] for row in found['rows']} == {'transformers', 'eager'}
    assert [('out of' in row['why']) or ('differs' in row['why']) for row in found['left_out']] == [True]

# ---- the page

def test_report_of_a_gpu(tmp_path):
    row = lambda who, ms, **kw: row_of(**{**dict(implementation=who, ms=ms, device='cuda', workload='encoder', timing='graph'), **kw})
    rows = [row('transformers', 4.), row('native', .1), row('native', .125, timing='eager'), row('2020 kernel', .5), row('deformops CUDA', .2), row('deformops Triton', .12),
            row('native', 1., direction='bwd'), row('2020 kernel', 1.2, direction='bwd'), row('native deterministic', 1.6, direction='bwd')]
    limit = dict(run='r', op='ms_deform_attn', device='cuda', workload='encoder', points='near', threads=2, how='limits.cu', samples=1, operations=dict(fwd=1), gathered_mb=1., compulsory_mb=dict(fwd=1.),
                 gather_ms=.1, scatter_ms=.9, others=0., **GROUND, predicted_us=dict(float32=predict.predict(dict(compulsory=dict(fwd=1e6, bwd=3e6), gathered=160e6, operations=dict(fwd=1e6, bwd=2e6)), GROUND)))
    data = dict(results_of(rows), limits=[limit])
    data['runs']['r']['machine']['gpu'] = 'a GPU'
    results.write(tmp_path/'multiscale.json', results.dumps(data))
    r = report.Report('multiscale', 'cuda', folder=tmp_path, kernels='aa')
    assert r.kernels().rows[0] == ('encoder', 'near', 'float32', 'forward', '82.0', 'cache', '100.0', '1.2x', '125.0', '120 (yes)')
    near = {(o[0], o[1], o[5]): o[6:] for o in r.ratios().rows if o[3] == 'near'}
    assert near['native', 'forward', '2020 kernel'] == ('5x', '3x', 'yes') and near['native', 'forward', 'deformops Triton'] == ('1.2x', '1.3x', 'no')
    assert near['native', 'backward', '2020 kernel'] == ('1.2x', '1.33x', 'no') and near['native', 'backward', 'limits.cu'] == ('0.9x', '0.8x', 'yes') and near['native deterministic', 'backward', 'native'] == ('0.625x', '0.5x', 'yes')
    assert '2000 GB/s' in repr(r.ground()) and 'a GPU' in repr(r.about())
    for f in (r.times, r.memory, r.limits, r.goals, r.short, r.stale, lambda: r.times(dtype='bfloat16')): f()
    empty = report.Report('multiscale', 'cuda', folder=tmp_path/'none')
    assert 'gpu.py' in repr(empty.about()) and empty.kernels() is empty.ratios() is empty.ground() is None      # said once
