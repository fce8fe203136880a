"""Every notebook runs, and prints what is stored in it. Pictures are not compared; that there is one, is."""
import json, re
import pytest
from notebooks import differences, name, notebooks, run, same_number, same_text

def compare(path, out, flags=()):
    ran = run(path, out, flags)
    found = differences(json.loads(path.read_text(encoding='utf-8')), json.loads(out.read_text(encoding='utf-8')), ran)
    assert not found, f'{path.name} prints other texts than those stored (`make outputs` stores them):\n' + '\n'.join(found)

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_notebook(path, tmp_path): compare(path, tmp_path/'out.ipynb')

def flagged(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return any(re.search(r'^#\|\s*(slow|cuda)\b', ''.join(c['source']), re.M) for c in cells)

@pytest.mark.slow
@pytest.mark.parametrize('path', [o for o in notebooks() if flagged(o)], ids=name)
def test_slow_cells(path, tmp_path):
    import torch
    compare(path, tmp_path/'out.ipynb', ['slow', 'cuda'] if torch.cuda.is_available() else ['slow'])

# ---- the comparison itself

@pytest.mark.parametrize('a, b, same', [
    ('7', '7', True), ('7', '8', False), ('1000', '1001', False), ('0.1234', '0.1235', True), ('0.1234', '0.1237', False),
    ('1.', '1.0000', True), ('1.', '1.9', False), ('2.4e-07', '0.', True), ('3e-3', '4e-2', False), ('1.2e3', '1201.0', True), ('-0.', '0.', True)])
def test_same_number(a, b, same): assert same_number(a, b) is same

def test_same_text():
    assert same_text('tensor([ 0.5000, -0.0000])', 'tensor([0.5001,\n        0.0000])')
    assert not same_text('tensor([0.5, 1.0])', 'tensor([0.5])')
    assert not same_text('3 heads', '3 levels')
    assert not same_text('shape (2, 3)', 'shape (3, 2)')

def notebook(folder, *sources):
    cell = lambda i, source: dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=source)
    path = folder/'trial.ipynb'
    path.write_text(json.dumps(dict(cells=[cell(i, o) for i, o in enumerate(sources)], metadata={}, nbformat=4, nbformat_minor=5)))
    (folder/'pyproject.toml').write_text('[tool.nbdev]\ntst_flags = ["slow", "cuda"]\n')
    return path

def test_what_runs(tmp_path):
    "Flags and `eval: false` are respected, and a changed output is found."
    path = notebook(tmp_path, 'x = 1; print("one", x)', '#| slow\nx = 2; x', '#| eval: false\nbroken', 'x')
    out = tmp_path/'out.ipynb'
    assert set(run(path, out)) == {'c0', 'c3'}
    stored, fresh = json.loads(path.read_text()), json.loads(out.read_text())
    assert [o[:7] for o in differences(stored, fresh, ['c0', 'c3'])] == ['cell c0', 'cell c3']
    path.write_text(out.read_text())
    compare(path, out)
    assert set(run(path, out, ['slow'])) == {'c0', 'c1', 'c3'}

def test_failure_is_told(tmp_path):
    with pytest.raises(AssertionError, match='ZeroDivisionError'): run(notebook(tmp_path, '1/0'), tmp_path/'out.ipynb')
