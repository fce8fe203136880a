"""The lines on the first page run as they stand, only smaller."""
import json
from pathlib import Path
import matplotlib
import pytest

def test_ten_lines(monkeypatch, tmp_path):
    matplotlib.use('Agg')
    cells = json.loads((Path(__file__).parents[1]/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    code = next(''.join(c['source']) for c in cells if 'fit_one_cycle' in ''.join(c['source']) and c['cell_type'] == 'code')
    small = {'digit_dls(bs=8)': 'digit_dls(16, 8, bs=8)', 'dim=128': 'dim=32', 'fit_one_cycle(10,': 'fit_one_cycle(1,'}
    for a, b in small.items():
        assert a in code
        code = code.replace(a, b)
    monkeypatch.chdir(tmp_path)
    names = {}
    with pytest.MonkeyPatch.context() as m: exec(code, names)
    assert names['learn'].recorder.values and set(names['learn'].recorder.metric_names) >= {'AP', 'AP50', 'train_loss'}

def test_what_the_package_says_of_itself():
    "One sentence: an exported cell of the index must not leak into it."
    import deformlit
    assert deformlit.__doc__ == 'Deformable and sparse visual attention, derived step by step in notebooks and exported as modules that train.'
