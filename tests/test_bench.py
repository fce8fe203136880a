"""`make bench`: the files it writes, what is merged and what is stale, and that a wrong implementation gets no row."""
import dataclasses, json, os, sys
import pytest, torch
from notebooks import nbs, root

sys.path.insert(0, str(nbs/'bench'))
pytest.importorskip('transformers', reason='the peer is not installed (extra `peers`)')
import bench, limits, ops, report, results, worker

TINY = dict(b=2, shapes=[(5, 4), (2, 3)], n=2, d=8, q=7, k=2)

def job(entry, implementations=('transformers', 'eager'), directions=('fwd', 'fwd_bwd'), **kw):
    cases = [dict(workload='tiny', sizes=TINY, dtype=t, points=p, direction=d) for t in ('float32', 'bfloat16') for p in ('near', 'uniform') for d in directions]
    return dict(dict(name='multiscale', op=entry.op, device='cpu', threads=1, malloc='default', isa='default', implementations=list(implementations), budget=1e-3, cases=cases), **kw)

@pytest.fixture(scope='module')
def entry(): return ops.entry('multiscale')

# ---- the file

def run_of(kernels='aa', date='2030-01-01 00:00:00', cpu='x', torch='2'):
    return dict(date=date, command='make bench', machine=dict(cpu=cpu, isa='avx2', cores=2, gpu=None), versions=dict(python='3', torch=torch, transformers='5'), kernels=kernels, load=dict(others=0.))

def row_of(run='r', implementation='native', ms=1., **kw):
    return {**dict(run=run, op='ms_deform_attn', device='cpu', workload='enc', points='near', dtype='float32', direction='fwd', threads=2, malloc='default', isa='default', timing='wall',
                   implementation=implementation, median_ms=ms, iqr_ms=.1, peak_mb=None, speedup_over_eager=1., rounds=5, others=0., first_ms=None, first_speedup=None), **kw}

def results_of(rows, run='r', left_out=(), **kw):
    return dict(format=2, op='multiscale', runs={run: run_of(**kw)}, rows=rows, sweeps=[], limits=[], left_out=list(left_out))

def test_schema():
    results.check(results_of([row_of()]))
    for broken in (dict(median_ms='1'), dict(points='far'), dict(direction='back'), dict(run='other'), dict(threads=None)):
        with pytest.raises(ValueError, match=next(iter(broken)) if broken != dict(run='other') else 'no run other'): results.check(results_of([row_of(**broken)]))
    with pytest.raises(ValueError, match='twice'): results.check(results_of([row_of(), row_of(ms=2.)]))
    with pytest.raises(ValueError, match='format'): results.check({})

def test_merge_keeps_what_is_not_measured_again():
    old = results_of([row_of(), row_of(workload='dec', ms=5.), row_of(device='cuda', timing='graph')])
    new = results_of([row_of('s', ms=2.), row_of('s', implementation='eager')], run='s', date='2030-01-02 00:00:00')
    got = results.merge(old, new)
    assert {(o['device'], o['workload'], o['implementation']): o['median_ms'] for o in got['rows']} == {
        ('cpu', 'enc', 'native'): 2., ('cpu', 'enc', 'eager'): 1., ('cpu', 'dec', 'native'): 5., ('cuda', 'enc', 'native'): 1.}
    assert set(got['runs']) == {'r', 's'} and results.merge(None, new) == new
    assert set(results.merge(results_of([row_of()]), results_of([row_of('s')], run='s'))['runs']) == {'s'}      # no row is left of r

@pytest.mark.parametrize('other', [dict(cpu='y'), dict(torch='3')], ids=str)
def test_merge_mixes_no_machines(other):
    old = results_of([row_of(workload='dec'), row_of(device='cuda', timing='graph')])
    got = results.merge(old, results_of([row_of('s')], run='s', **other))
    assert [(o['device'], o['workload']) for o in got['rows']] == [('cpu', 'enc'), ('cuda', 'enc')]     # what another device measured stays

def test_merge_of_what_is_left_out():
    missing = {k: v for k, v in row_of().items() if k in results.KEY or k in ('run', 'op')} | dict(why='no compiler')
    both = results.merge(results_of([row_of()]), results_of([], run='s', left_out=[dict(missing, run='s')]))
    assert [len(both[o]) for o in ('rows', 'left_out')] == [0, 1]
    back = results.merge(both, results_of([row_of('t')], run='t'))
    assert [len(back[o]) for o in ('rows', 'left_out')] == [1, 0]

def test_sources_of_an_op(tmp_path):
    for name, text in {'a.cpp': '#define KERNEL "a_cpu.h"\n#include "shared.h"\n#include <vector>', 'a_cpu.h': '', 'shared.h': '#include "deeper.h"', 'deeper.h': '#include "a_cpu.h"', 'ab.h': '', 'b.cpp': '#include "shared.h"'}.items(): (tmp_path/name).write_text(text)
    names = lambda op: [p.name for p in results.sources(tmp_path, op)]
    assert names('a') == ['a.cpp', 'a_cpu.h', 'deeper.h', 'shared.h'] and names('b') == ['a_cpu.h', 'b.cpp', 'deeper.h', 'shared.h'] and len(names(None)) == 6
    before = [results.kernels_hash(tmp_path, o) for o in 'ab']
    (tmp_path/'b.cpp').write_text('other')
    assert [results.kernels_hash(tmp_path, o) == x for o, x in zip('ab', before)] == [True, False]

def test_digest_and_staleness(tmp_path):
    assert results.kernels_hash(tmp_path/'none') == 'none'
    (tmp_path/'ladder').mkdir(); (tmp_path/'a.h').write_text('1'); (tmp_path/'ladder'/'b.cpp').write_text('2')
    first = results.kernels_hash(tmp_path)
    (tmp_path/'a.so').write_bytes(b'built'); (tmp_path/'__pycache__').mkdir(); (tmp_path/'__pycache__'/'x').write_text('')
    assert results.kernels_hash(tmp_path) == first
    (tmp_path/'a.h').rename(tmp_path/'c.h')
    second = results.kernels_hash(tmp_path)
    (tmp_path/'c.h').write_text('3')
    assert len({first, second, results.kernels_hash(tmp_path)}) == 3
    data = results_of([row_of()], kernels=first)
    assert not results.is_stale(data, data['rows'][0], first) and results.is_stale(data, data['rows'][0], second)

def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path/'new'/'a.json'
    text = results.dumps(results_of([row_of()]))
    results.write(path, text)
    assert results.read(path) == results_of([row_of()]) and results.dumps(results.read(path)) == text
    def broken(*args): raise OSError('disk full')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', broken)
        with pytest.raises(OSError): results.write(path, 'half')
    assert path.read_text() == text and [o.name for o in path.parent.iterdir()] == ['a.json']
    assert results.read(tmp_path/'none.json') is None

# ---- the command

def options(*args): return bench.parser().parse_args(args)
ABOUT = dict(op='ms_deform_attn', workloads=['enc', 'dec'], peers=['transformers', 'transformers compiled'], points=['near', 'uniform'], slow=['transformers compiled'], sweeps=dict(batch=[1, 2]), kinds=[3])

def test_jobs():
    "No setting is measured twice, in particular no row."
    plan = list(bench.jobs('multiscale', options('--threads', '1', '2'), ABOUT))
    keys = [results.key(dict(o, **case, implementation=who)) for o in plan for case in o['cases'] for who in o['implementations']]
    assert len(keys) == len(set(keys))
    assert {(o['threads'], o['malloc']) for o in plan if o['isa'] == 'default'} == {(t, m) for t in (1, 2) for m in ('default', 'tuned')}
    assert all('transformers compiled' not in o['implementations'] for o in plan)
    quick, = bench.jobs('multiscale', options('--quick', '--all', '--threads', '2'), ABOUT)
    assert quick['threads'] == 2 and 'transformers compiled' in quick['implementations'] and len(quick['cases']) == 4
    assert all(o['points'] == 'near' and o['dtype'] == 'float32' for o in quick['cases'])

def test_environment(monkeypatch):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '1'); monkeypatch.setenv('DEFORMLIT_ISA', 'avx2')
    env = bench.environment(2)
    assert env['OMP_NUM_THREADS'] == '2' and env['OMP_WAIT_POLICY'] == 'passive' and 'DEFORMLIT_ISA' not in env and not any(o.startswith('MALLOC_') for o in env)
    assert bench.environment(1, 'tuned', 'baseline')['DEFORMLIT_ISA'] == 'baseline' and int(bench.environment(1, 'tuned')['MALLOC_MMAP_THRESHOLD_']) > 1e8

@pytest.mark.parametrize('args, says', [(['--op', 'conv'], 'conv'), (['--threads', '0'], '--threads'), (['--seconds', '-1'], '--seconds'), (['--quik'], '--quik'), (['--device', 'tpu'], 'tpu')], ids=str)
def test_bad_arguments(args, says, capsys):
    with pytest.raises(SystemExit) as e: bench.main(args)
    assert e.value.code == 2 and says in capsys.readouterr().err

def fake(monkeypatch, work):
    monkeypatch.setattr(bench, 'work', work)
    monkeypatch.setattr(bench, 'about', lambda names, args, device: (run_of(), dict(multiscale=ABOUT)))

@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_interrupted(error, tmp_path, monkeypatch):
    "The second process fails: the file is as it was."
    done = []
    def work(job):
        if done: raise error
        done.append(job)
        return {**{o: [] for o in results.LISTS}, 'rows': [{k: v for k, v in row_of().items() if k != 'run'}]}
    fake(monkeypatch, work)
    results.write(tmp_path/'multiscale.json', before := results.dumps(results_of([row_of(ms=7.)])))
    with pytest.raises(SystemExit): bench.main(['--op', 'multiscale', '--out', str(tmp_path), '--threads', '1', '2'])
    assert done and (tmp_path/'multiscale.json').read_text() == before and len(list(tmp_path.iterdir())) == 1

def test_choose(tmp_path, monkeypatch):
    ms = dict(native=1., compiled=2., eager=3.)
    def work(job): return dict(rows=[row_of(implementation=o, workload=f"1e{case['kind']}", direction=case['direction'], ms=ms[o] if case['direction'] == 'fwd' else -ms[o])
                                     for case in job['cases'] for o in ms])
    fake(monkeypatch, work)
    path = tmp_path/'choices.json'
    path.write_text(json.dumps({'_made': {'another cpu': 1}, 'another': {'cpu forward 1e3': ['eager']}, 'ms_deform_attn': {'cuda forward 1e3': ['native']}}))
    bench.main(['--op', 'multiscale', '--choose', '--choices', str(path)])
    got = json.loads(path.read_text())
    assert got['ms_deform_attn'] == {'cpu forward 1e3': ['native', 'compiled', 'eager'], 'cpu forward+backward 1e3': ['eager', 'compiled', 'native'], 'cuda forward 1e3': ['native']}
    assert got['another'] and got['_made']['another cpu'] and got['_made']['ms_deform_attn cpu']['kernels'] == results.kernels_hash(op='multiscale')

# ---- the measurement

def test_a_whole_small_run(entry, tmp_path, monkeypatch):
    "A process of its own, tiny sizes, merged and written."
    todo = job(entry, ('transformers', 'eager', 'native'), ('fwd', 'bwd', 'fwd_bwd'), memory=True, limits=True)
    found = bench.work(dict(todo, cases=[o for o in todo['cases'] if o['dtype'] == 'float32']))
    data = {**results_of([], run='s'), **{o: [dict(run='s', **row) for row in found[o]] for o in results.LISTS}}
    results.write(tmp_path/'multiscale.json', results.dumps(results.merge(None, data)))
    data = results.read(tmp_path/'multiscale.json')
    ran = {row['implementation'] for row in data['rows']}
    assert {'transformers', 'eager'} <= ran
    if 'native' not in ran: assert {row['implementation'] for row in data['left_out']} == {'native'} and all(row['why'] for row in data['left_out'])
    for row in data['rows']:
        assert row['median_ms'] > 0 and row['rounds'] >= 5 and (row['speedup_over_eager'] == 1) >= (row['implementation'] == 'transformers')
        if row['points'] == 'near' and row['direction'] == 'fwd_bwd': assert row['peak_mb'] is None or 0 <= row['peak_mb'] < 50
    assert len(data['limits']) == 2 and all(row['gather_ms'] > 0 and row['samples'] == 2 * 7 * 2 * 2 * 2 for row in data['limits'])

def test_threads_of_a_row(entry):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, 'set_num_threads', lambda n: None)
        rows = worker.run(job(entry, directions=['fwd']), entry)['rows']
    assert {row['threads'] for row in rows} == {1} and not any('sizes' in row for row in rows)

def wrong_output(*args): return ops.entry('multiscale').ours(*args) * 1.001

def wrong_gradient(value, shapes, points, weights):
    return ops.entry('multiscale').ours(value, shapes, points.detach() + (points - points.detach()) * 1.01, weights)

@pytest.mark.parametrize('f, what', [(wrong_output, 'output'), (wrong_gradient, 'gradient 1')], ids=['output', 'gradient'])
def test_a_wrong_implementation_is_an_error(entry, f, what):
    with pytest.raises(worker.WrongResult, match=f'eager in float32: {what} differs'): worker.run(job(entry), dataclasses.replace(entry, ours=f))

def test_another_way_than_asked_is_an_error(entry):
    class Other: ran = 'loop'
    with pytest.raises(AssertionError, match="asked for 'eager', but 'loop' ran"): worker.run(job(entry), dataclasses.replace(entry, handle=Other))

def test_what_cannot_run_is_left_out(entry):
    def missing(args): raise ops.Missing('not installed')
    found = worker.run(job(entry, ('transformers', 'other', 'native'), ['fwd']), dataclasses.replace(entry, peers={**entry.peers, 'other': missing}))
    assert ('other', 'not installed') in {(row['implementation'], row['why']) for row in found['left_out']}
    assert {row['implementation'] for row in found['rows']} >= {'transformers'}

@pytest.mark.parametrize('points', ['near', 'uniform'])
def test_inputs(entry, points):
    for sizes in (TINY, dict(TINY, q=5*4 + 2*3), entry.workloads['dec']):
        value, shapes, xy, weights = entry.inputs(sizes, points, torch.Generator().manual_seed(0))
        wh = torch.tensor([(w, h) for h, w in shapes])[:, None]
        part = (xy * wh - .5).frac().abs()
        assert part.min() > 1e-3 and part.max() < 1 - 1e-3              # away from the jumps of the gradient
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(weights.shape[:3]))
    if points == 'near' and sizes['q'] == 300: assert ((xy.mean((2, 3, 4), keepdim=True) - xy) * wh).norm(dim=-1).mean() < 2.5

def test_limits_compute_what_they_say(entry):
    "The compiled loops, PyTorch's stand-ins and the formula agree."
    rows = entry.rows(entry.inputs(TINY, 'uniform', torch.Generator().manual_seed(0)))
    numbers, weights = limits.four(rows)
    want = (rows['table'][numbers] * weights[..., None]).sum(1)
    torch.testing.assert_close(limits.torch_gather(rows)(), want)
    back = torch.zeros_like(rows['table']).index_add_(0, numbers.flatten(), weights.flatten()[:, None].expand(-1, TINY['d']))
    torch.testing.assert_close(limits.torch_scatter(rows)(), back)
    if limits.library() is None: pytest.skip('no C++ compiler')
    torch.testing.assert_close(limits.native_gather(rows, 1)(), want)
    torch.testing.assert_close(limits.native_scatter(rows, 2)(), back)

def test_counts(entry):
    c = entry.count(entry.workloads['enc'], 4)      # by hand: 5,440 queries, 8 heads, 16 points; 4 rows of 128 bytes each
    assert c['samples'] == 5440 * 8 * 16 and c['gathered'] == c['samples'] * 512 and c['operations']['fwd'] == c['samples'] * 256
    assert c['compulsory']['fwd'] == 2 * 5440 * 256 * 4 + c['samples'] * 12

# ---- the page

def test_report(entry, tmp_path):
    rows = [row_of(implementation='transformers', ms=70., peak_mb=100.), row_of(ms=1., peak_mb=5., speedup_over_eager=70.), row_of(points='uniform', ms=1., speedup_over_eager=30.)]
    results.write(tmp_path/'multiscale.json', results.dumps(results_of(rows, kernels='aa')))
    r = report.Report('multiscale', folder=tmp_path, kernels='aa')
    line = next(o for o in r.goals().rows if o[:3] == ('native', 'forward', 'enc'))
    assert line[3:] == ('60x', '70x', '30x', '50 %')
    assert any('30x as fast' in o and 'uniform' in o for o in r.short()) and 'output + 10 %: yes' in repr(r.memory())
    assert report.STALE not in repr(r.goals()) + repr(r.stale()) and report.STALE in repr(report.Report('multiscale', folder=tmp_path, kernels='bb').goals())
    empty = report.Report('multiscale', folder=tmp_path/'none')
    for f in (empty.about, empty.goals, empty.short, empty.times, empty.memory, empty.limits, empty.bars, empty.against): assert 'make bench' in repr(f())
