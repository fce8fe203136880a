"""What tests compare with other code, written down. A test takes the fixture `parity` and tells it each comparison; it fails as an `assert` does.

With `--parity=FOLDER`, which `make parity` gives, only such tests run, and what they tell goes to `FOLDER/<test file>.json`, as `nbs/parity_report.py` describes. Else nothing is written."""
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest, torch
from notebooks import nbs

sys.path.insert(0, str(nbs))
import parity_report

class Recorder:
    "What one test compares. Rows of the same system, counterpart and kind are one."
    def __init__(self, test:str, told:list): self.test, self.told = test, told       # name of the test; gets what is to be written down
    def row(self, kind, system, against, what, **new):
        assert system in parity_report.SYSTEMS and against in parity_report.AGAINST, f'{system}, {against}: not in SYSTEMS or AGAINST of nbs/parity_report.py'
        key = dict(kind=kind, system=system, against=against, what=what, test=self.test)
        row = next((o for o in self.told if all(o.get(k) == v for k, v in key.items())), None)
        if row is None: self.told.append(key | new); return
        merge(row, new)
    def record(self, system, against, what, difference, tolerance, largest=1., tensors=1, numbers=1):
        "A difference and what is allowed; `largest` is the largest value of what is compared, which the page divides by, unless it is within the tolerance of zero."
        difference, tolerance, largest = float(difference), float(tolerance), float(largest)
        assert difference <= tolerance, f'{system}, {what}: differs from the {against} by {difference:.3g}, allowed {tolerance:.3g}'      # NaN fails too
        self.row('rows', system, against, what, tensors=tensors, numbers=numbers, difference=difference / (largest if largest > tolerance else 1.), share=difference / (tolerance or 1.))
    def close(self, system, against, what, got, want, atol, rtol=0., mask=None):
        "Two tensors, equal to `atol`, or `rtol` of the largest value; `mask` is True where a value counts."
        assert got.shape == want.shape and got.dtype == want.dtype, f'{what}: {got.dtype} of shape {tuple(got.shape)}, expected {want.dtype} of {tuple(want.shape)}'
        got, want = got.detach(), want.detach()
        if mask is not None: got, want = (o[mask.expand_as(o)] for o in (got, want))
        if not want.is_floating_point(): return self.same(system, against, what, got.tolist(), want.tolist(), numbers=want.numel())
        assert want.numel() and got.isfinite().all() and want.isfinite().all(), f'{what}: nothing to compare, or not finite'
        largest = want.abs().max().item()
        self.record(system, against, what, (got - want).abs().max().item(), max(atol, rtol * largest), largest, numbers=want.numel())
    def same(self, system, against, what, got, want, numbers=1):
        "Two things that must be equal."
        assert got == want, f'{system}, {what}: {got}, expected {want}'
        self.record(system, against, what, 0, 0, numbers=numbers)
    def departs(self, system, against, what, difference=None, least=0.):
        "A counterpart that does something else than the official code, by more than `least`. Our side is another assertion of the test."
        assert difference is None or float(difference) > least, f'{system}: {against} no longer departs: {what}'
        self.row('departs', system, against, what, difference=None if difference is None else float(difference))
    def left_out(self, system, against, why): self.told.append(dict(kind='left_out', system=system, against=against, why=why))

def merge(row, new):
    "Two rows of one comparison: tensors add up, the larger difference stays."
    for k, v in new.items(): row[k] = row[k] + v if k in ('tensors', 'numbers') else v if row.get(k) is None else max(row[k], v)

@pytest.fixture
def parity(request, record_property):
    told = []
    record_property('parity', told)          # the same list: what is appended during the test is in its report
    return Recorder(request.node.originalname, told)

# ---- writing it down

def two_digits(x): return None if x is None else float(f'{x:.1e}')

def gather(reports) -> dict:
    "Files, from the reports of the tests that passed: {name: data}."
    found = {}
    for r in reports:
        for name, told in r.user_properties:
            if name != 'parity': continue
            data = found.setdefault(Path(r.nodeid.split('::')[0]).stem.removeprefix('test_'), {o: {} for o in parity_report.LISTS})
            for row in told:
                row = {k: v for k, v in row.items() if k != 'kind'} if (kind := row['kind']) else row
                rows, at = data[kind], parity_report.key(row)
                if at in rows: merge(rows[at], {k: v for k, v in row.items() if k not in ('system', 'against', 'what', 'test', 'why')})
                else: rows[at] = dict(row)
    return {name: whole(data) for name, data in found.items() if any(data.values())}

def whole(data):
    rows = {o: sorted(data[o].values(), key=parity_report.order) for o in parity_report.LISTS}
    for row in rows['rows'] + rows['departs']: row |= {k: two_digits(row[k]) for k in ('difference', 'share') if k in row}
    peers = ['torch'] + ['transformers'] * any(row['against'] == 'transformers' for o in rows.values() for row in o)
    systems = sorted({row['system'] for o in ('rows', 'departs') for row in rows[o]}, key=list(parity_report.SYSTEMS).index)
    return dict(format=parity_report.FORMAT, versions={o: installed(o) for o in peers}, digests={o: parity_report.digest(o) for o in systems}, **rows)

def installed(package):
    try: return version(package).split('+')[0]
    except PackageNotFoundError: return None

def lost(old, new) -> list:
    "Comparisons that the old file has and the new one has not."
    return [' / '.join(filter(None, o)) for name in ('rows', 'departs') for o in sorted({parity_report.key(row) for row in old[name]} - {parity_report.key(row) for row in new[name]}, key=str)]

def store(folder, reports) -> list:
    "Write the files, but none that would lose a comparison; returns what is wrong."
    wrong = []
    for name, data in gather(reports).items():
        path = Path(folder)/f'{name}.json'
        gone = lost(parity_report.read(folder)[name], data) if path.exists() else []
        if gone: wrong.append(f'{path} is left as it is, since these would be lost (delete it if they should be): ' + '; '.join(gone))
        else: parity_report.write(path, data)
    return wrong
