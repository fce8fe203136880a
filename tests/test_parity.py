"""What tests write down of their comparisons, and the page made of it: a worse difference fails, nothing is lost, and the page's numbers are those of the files."""
import copy, json, re, subprocess, sys
from types import SimpleNamespace

import pytest, torch
from notebooks import nbs, root
from parity import Recorder, gather, lost, parity_report, store

SYSTEM, OFFICIAL = 'DETR', 'official files'

def recorder(test='test_x'):
    told = []
    return Recorder(test, told), told

def report(told, nodeid='tests/test_x.py::test_x[a]'): return SimpleNamespace(nodeid=nodeid, user_properties=[('tell', 'a line'), ('parity', told)])

# ---- a comparison

def test_a_worse_difference_fails():
    r, told = recorder()
    r.record(SYSTEM, OFFICIAL, 'outputs', 1e-6, 1e-5)
    for difference in (1.01e-5, float('nan'), float('inf')):
        with pytest.raises(AssertionError, match='DETR, outputs: differs from the official files'): r.record(SYSTEM, OFFICIAL, 'outputs', difference, 1e-5)
    assert [o['tensors'] for o in told] == [1]            # what failed is not written down

def test_tensors_that_differ_fail():
    r, told = recorder()
    want = torch.tensor([[1., 2.], [3., 4.]])
    close = lambda got, **kw: r.close(SYSTEM, OFFICIAL, 'outputs', got, want, **{**dict(atol=1e-3), **kw})
    close(want + 5e-4); close(want + 1e-3, rtol=1e-3)
    close(want + torch.tensor([[0., 0.], [9., 9.]]), mask=torch.tensor([[True], [False]]))
    for got in (want + 2e-3, want[:1], want.double(), want * float('nan')):
        with pytest.raises(AssertionError): close(got)
    with pytest.raises(AssertionError, match='nothing'): close(want, mask=torch.tensor(False))
    with pytest.raises(AssertionError): r.close(SYSTEM, OFFICIAL, 'indices', torch.tensor([1, 2]), torch.tensor([1, 3]), 9.)
    with pytest.raises(AssertionError): r.same(SYSTEM, OFFICIAL, 'indices', [1], [2])
    row, = told
    assert row['tensors'] == 3 and row['numbers'] == 10 and row['share'] == pytest.approx(0.5, rel=1e-3) and row['difference'] == pytest.approx(1e-3 / 4, rel=1e-2)
    for wrong in (('DETR?', OFFICIAL), (SYSTEM, 'hearsay')):
        with pytest.raises(AssertionError, match='not in SYSTEMS or AGAINST'): r.record(*wrong, 'outputs', 0, 1)

def test_what_no_longer_departs_fails():
    r, told = recorder()
    r.departs(SYSTEM, 'transformers', 'something else', 0.2, least=0.1)
    with pytest.raises(AssertionError, match='no longer departs'): r.departs(SYSTEM, 'transformers', 'something else', 0.05, least=0.1)
    assert told[0]['difference'] == 0.2

def test_rounding_errors_of_zero_are_no_large_differences():
    r, told = recorder()
    r.close(SYSTEM, OFFICIAL, 'gradients', torch.full((3,), 2e-16), torch.full((3,), 1e-16), atol=1e-9)
    assert told[0]['difference'] == pytest.approx(1e-16)

# ---- the files

def told_by(*differences, what='outputs'):
    r, told = recorder()
    for d in differences: r.record(SYSTEM, OFFICIAL, what, d, 1e-4)
    return told

def test_gather_adds_up():
    found = gather([report(told_by(1e-5, 2e-5)), report(told_by(3.14159e-5), 'tests/test_x.py::test_x[b]'), report(told_by(1e-5), 'tests/test_y.py::test_x')])
    assert set(found) == {'x', 'y'}
    row, = found['x']['rows']
    assert (row['tensors'], row['difference'], row['share']) == (3, 3.1e-05, 0.31)
    assert found['x']['digests'] == {SYSTEM: parity_report.digest(SYSTEM)} and set(found['x']['versions']) == {'torch'}
    for data in found.values(): parity_report.check(data)

def test_order_does_not_matter(tmp_path):
    reports = [report(told_by(1e-5, what='outputs')), report(told_by(2e-5, what='losses')), report(told_by(4e-5, what='outputs'))]
    texts = [parity_report.dumps(gather(o)['x']) for o in (reports, reports[::-1])]
    assert texts[0] == texts[1]

def test_no_comparison_gets_lost(tmp_path):
    assert store(tmp_path, [report(told_by(1e-5)), report(told_by(1e-5, what='losses'))]) == []
    before = (tmp_path/'x.json').read_text()
    wrong, = store(tmp_path, [report(told_by(2e-5))])
    assert 'DETR / official files / losses / test_x' in wrong and (tmp_path/'x.json').read_text() == before
    assert store(tmp_path, [report(told_by(2e-5)), report(told_by(1e-5, what='losses')), report(told_by(1e-5, what='indices'))]) == []
    assert len(parity_report.read(tmp_path)['x']['rows']) == 3 and [o.name for o in tmp_path.iterdir()] == ['x.json']

def test_broken_files_are_refused():
    good = gather([report(told_by(1e-5))])['x']
    parity_report.check(good)
    for change in (dict(format=0), dict(versions={}), dict(digests={}), dict(rows=good['rows'] * 2), *(dict(rows=[good['rows'][0] | o]) for o in (dict(share=1.1), dict(tensors=0), dict(share=float('nan')), dict(against='x'), dict(difference='0')))):
        with pytest.raises(ValueError, match='make parity'): parity_report.check(copy.deepcopy(good) | change)

# ---- which code was compared

CODE = '"A module."\nfrom .a import *\n# a comment\ndef f(x): # beside\n    "Says `f`."\n    y = "# no comment" # but this\n\n    return x + 1\ndef g(): "Nothing else."\n'

def test_prose_changes_no_digest():
    bare = parity_report.bare
    assert bare(CODE) == 'from .a import *\ndef f(x):\n    y = "# no comment"\n    return x + 1\ndef g():'
    assert bare(CODE) == bare(CODE.replace('Says', 'Tells us of').replace('# a comment', '# ä comment\n# more').replace('"A module."', '"""Ä module,\nin two lines"""\n'))
    for change in ('x + 2', 'x  - 1'): assert bare(CODE) != bare(CODE.replace('x + 1', change))
    assert bare(CODE) != bare(CODE.replace('no comment', 'another'))

def test_imports_count(tmp_path, monkeypatch):
    for name, text in dict(a='X = 1', b='from .a import *\nY = X', c='Z = 1').items(): (tmp_path/f'{name}.py').write_text(text)
    monkeypatch.setitem(parity_report.SYSTEMS, 'trial', ['b'])
    assert parity_report.parts(['b'], tmp_path) == ['a', 'b']
    first = parity_report.digest('trial', tmp_path)
    (tmp_path/'c.py').write_text('Z = 2')
    assert parity_report.digest('trial', tmp_path) == first
    (tmp_path/'a.py').write_text('X = 2')
    assert parity_report.digest('trial', tmp_path) != first

def test_every_system_is_a_chapter():
    for system, modules in parity_report.SYSTEMS.items(): assert {'core', *modules} <= set(parity_report.parts(modules)), system

# ---- the page

def test_page_tells_the_numbers_of_the_files(tmp_path):
    r, told = recorder()
    r.record('DETR', OFFICIAL, 'outputs', 1.23e-6, 1e-5, largest=2.)
    r.record('DAB-DETR', 'formulas', 'gradients', 4.5e-9, 1e-8, tensors=1234)
    r.departs('DETR', 'transformers', 'says something else', 0.25)
    r.left_out('DAB-DETR', 'transformers', 'not at hand')
    store(tmp_path, [report(told)])
    now = {o: parity_report.digest(o) for o in parity_report.SYSTEMS}
    page = parity_report.Parity(tmp_path, now)
    assert page.table(OFFICIAL).rows == [('DETR', 'outputs', '1', '6.2e-07', '12 %', '`test_x`')] and page.table('formulas').rows == [('DAB-DETR', 'gradients', '1,234', '4.5e-09', '45 %', '`test_x`')]
    rows = {o[0]: o[1:] for o in page.overview().rows}
    assert list(rows) == list(parity_report.SYSTEMS) and rows['DETR'] == ('1; 12 %', '–', '–', '–') and rows['DAB-DETR'] == ('–', '–', '1,234; 45 %', '–')
    assert page.departs().rows == [('DETR', 'says something else', '2.5e-01', '`test_x`')]
    left = {o[:2]: o[2] for o in page.left_out().rows}
    assert left['DAB-DETR', 'transformers'] == 'not at hand' and left['DETR', 'formulas'] == 'no test compares them' and ('DETR', OFFICIAL) not in left
    assert page.about().rows == [('`runs/parity/x.json`', '`pytest tests/test_x.py`', '2', '1,235', f"torch {torch.__version__.split('+')[0]}, transformers {parity_report.read(tmp_path)['x']['versions']['transformers']}")]
    assert 'with the code of this checkout' in repr(page.stale()) and parity_report.STALE not in ''.join(map(repr, (page.overview(), page.table(OFFICIAL), page.departs())))
    stale = parity_report.Parity(tmp_path, now | {'DETR': 'another'})
    assert stale.table(OFFICIAL).rows[0][0] == 'DETR †' and stale.table('formulas').rows[0][0] == 'DAB-DETR' and stale.departs().rows[0][0] == 'DETR †'
    assert {o[0]: o[1] for o in stale.overview().rows}['DETR'] == '1; 12 % †' and 'DETR. `make parity`' in repr(stale.stale()) and 'DAB' not in repr(stale.stale())
    empty = parity_report.Parity(tmp_path/'none', now)
    for f in (empty.about, lambda: empty.table('formulas'), empty.departs): assert 'make parity' in repr(f())
    assert len(empty.overview().rows) == len(empty.left_out().rows) / len(parity_report.AGAINST)

def test_the_stored_page_has_every_comparison():
    "Row by row: system, kind, tensors, difference and share stand in the notebook as they stand in the files."
    cells = json.loads((nbs/'parity.ipynb').read_text(encoding='utf-8'))['cells']
    lines = {' '.join(line.replace(parity_report.STALE, '').replace('\\|', '|').split()) for c in cells for o in c.get('outputs', []) for text in [''.join(o.get('data', {}).get('text/markdown', ''))] for line in text.splitlines()}
    files = parity_report.read()
    assert files, 'no files in runs/parity'
    for data in files.values():
        for row in data['rows']:
            cells_ = row['system'], row['what'], f"{row['tensors']:,}", parity_report.small(row['difference']), parity_report.percent(row['share']), f"`{row['test']}`"
            assert '| ' + ' | '.join(cells_) + ' |' in lines, f'not on the page: {cells_}: run `make outputs ARGS=parity`'
        for row in data['departs']: assert any(row['what'] in line and row['system'] in line for line in lines), row

def test_the_files_are_of_tests_that_are_there():
    for name, data in parity_report.read().items():
        source = (root/'tests'/f'test_{name}.py').read_text(encoding='utf-8')
        for row in data['rows'] + data['departs']: assert re.search(rf"^def {row['test']}\(.*\bparity\b", source, re.M), f"test_{name}.py has no {row['test']} that takes `parity`"

def test_all_systems_are_compared():
    "With the formulas or the official code at least, outputs and gradients; every one of the four is somewhere."
    page = parity_report.Parity()
    for system in parity_report.SYSTEMS:
        whats = [row['what'] for row in page.all('rows', system=system) if row['against'] in (OFFICIAL, 'formulas')]
        assert any('gradients' in o for o in whats) and any(o.startswith(('output', 'losses')) for o in whats), system
    assert {row['against'] for row in page.all('rows')} == set(parity_report.AGAINST)

# ---- a whole run

@pytest.mark.parametrize('rest', [[], ['-n', '2']], ids=['one process', 'two'])
def test_a_run_writes_the_same_again(rest, tmp_path):
    "Twice the same file; only tests that compare run; without the option nothing is written."
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(root/'tests/test_first_weights.py'), '-k', 'copies or another', *rest]
    def run(*options):
        r = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr
        return r.stdout
    if rest: assert '1 passed' in run('--parity', 'out')
    else:
        assert '6 passed' in run() and not list(tmp_path.iterdir())
        assert '1 passed' in run('--parity', 'out')
        before = (tmp_path/'out/first_weights.json').read_bytes()
        run('--parity', 'out')
        assert (tmp_path/'out/first_weights.json').read_bytes() == before
    data, = parity_report.read(tmp_path/'out').values()
    assert {o['system'] for o in data['rows']} == {'Deformable DETR', 'two-stage Deformable DETR', 'DAB-DETR', 'DAB-Deformable-DETR'} and [o.name for o in (tmp_path/'out').iterdir()] == ['first_weights.json']

def test_a_failing_run_writes_nothing(tmp_path):
    for o in ('conftest.py', 'parity.py', 'notebooks.py'): (tmp_path/o).write_text((root/'tests'/o).read_text(encoding='utf-8').replace("Path(__file__).resolve().parents[1]", f"Path({str(root)!r})"), encoding='utf-8')
    (tmp_path/'test_trial.py').write_text("def test_a(parity): parity.record('DETR', 'formulas', 'outputs', 0, 1)\ndef test_b(parity): parity.record('DETR', 'formulas', 'outputs', DIFFERENCE, 1)\ndef test_c(): assert 0\n")
    text = (tmp_path/'test_trial.py').read_text()
    for difference, code in ((2, 1), (0.5, 0)):
        (tmp_path/'test_trial.py').write_text(text.replace('DIFFERENCE', str(difference)))
        r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'test_trial.py', '--parity', 'out'], cwd=tmp_path, capture_output=True, text=True)
        assert r.returncode == code and (tmp_path/'out').exists() == (code == 0), r.stdout + r.stderr
        assert code == 0 or 'a test failed: nothing is written' in r.stdout
    rows = parity_report.read(tmp_path/'out')['trial']['rows']
    assert [(o['test'], o['share']) for o in rows] == [('test_a', 0), ('test_b', 0.5)]
