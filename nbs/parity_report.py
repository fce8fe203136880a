"""The files of `make parity`: what our tests compare with the official code, with transformers and with the formulas, and what the page `parity.ipynb` shows of them.

`runs/parity/<name>.json` holds what `tests/test_<name>.py` compared when it was last asked to write it down:
    format    the number of this format
    versions  of torch, and of transformers where it is compared with
    digests   by system, of the code that was compared, see `digest`
    rows      a comparison each, see `ROW`: how many tensors, and the largest difference among them
    departs   where a counterpart says something else than the official code does, see `DEPARTS`
    left_out  what is not compared, and why
There are no dates, and differences have two digits: a run that finds nothing new writes the same file."""
import ast, hashlib, io, json, os, re, tempfile, tokenize
from pathlib import Path
from deformlit.core import Table

root = Path(__file__).resolve().parents[1]
FORMAT = 1
# The systems in the order of the page, and the modules that make them; what these import counts as well
SYSTEMS = {'deformable attention': ['multiscale'], 'DETR': ['detr'], 'Deformable DETR': ['deformable_detr'], 'two-stage Deformable DETR': ['deformable_detr'], 'DAB-DETR': ['dab_detr'],
           'DAB-Deformable-DETR': ['dab_detr'], 'two-stage DAB-Deformable-DETR': ['dab_detr'], 'softmax set loss': ['set_loss'], 'focal set loss': ['set_loss'], "DAB-DETR's set loss": ['set_loss'],
           'deformed keys': ['deformed_keys'], 'windows': ['windows'], 'dilated windows': ['dilated'], 'DAT': ['dat'], 'DilateFormer': ['dilateformer']}
AGAINST = {'official files': 'numbers that the official code printed', 'transformers': 'models of transformers', 'formulas': 'the formulas, written out in the tests',
           'official statements': 'what the official code states: first weights, numbers of parameters'}
number, maybe, text = (int, float), (int, float, type(None)), str
ROW = dict(system=text, against=text, what=text, test=text, tensors=int, numbers=int, difference=number, share=number)
DEPARTS = dict(system=text, against=text, what=text, test=text, difference=maybe)
LEFT = dict(system=text, against=text, why=text)
LISTS = dict(rows=ROW, departs=DEPARTS, left_out=LEFT)

# ---- the files

def key(row): return tuple(row.get(o) for o in ('system', 'against', 'what', 'test', 'why'))

def order(row): return [list(SYSTEMS).index(row['system']) if row['system'] in SYSTEMS else len(SYSTEMS), list(AGAINST).index(row['against'])], [str(o) for o in key(row)]

def check(data:dict) -> dict:
    "`data` if it is whole; raises ValueError with the first thing that is not."
    def ok(it, what):
        if not it: raise ValueError(f'not a file of `make parity`: {what}')
    ok(isinstance(data, dict) and data.get('format') == FORMAT, f'format {FORMAT} was expected')
    ok(isinstance(data.get('versions'), dict) and 'torch' in data['versions'], 'no versions')
    for name, fields in LISTS.items():
        ok(isinstance(data.get(name), list), f'no list `{name}`')
        for row in data[name]:
            for field, kind in fields.items(): ok(isinstance(row.get(field), kind) and not isinstance(row[field], bool), f'{name}: `{field}` is {row.get(field)!r}')
            ok(row['against'] in AGAINST, f"{name}: `against` is {row['against']!r}")
            ok(name == 'left_out' or row['system'] in data.get('digests', {}), f"{name}: no digest of {row['system']}")
        ok(len({key(o) for o in data[name]}) == len(data[name]), f'{name}: twice the same')
    for row in data['rows']: ok(0 <= row['share'] <= 1 and row['tensors'] > 0, f'rows: {key(row)} is beyond its tolerance, or compares nothing')
    return data

def read(folder=root/'runs'/'parity') -> dict:
    "By name, all files of the folder."
    return {p.stem: check(json.loads(p.read_text(encoding='utf-8'))) for p in sorted(Path(folder).glob('*.json'))}

def dumps(data:dict) -> str:
    "JSON with one row on a line, so that git shows which rows changed."
    def value(v):
        if isinstance(v, list) and v: return '[\n' + ',\n'.join('  ' + json.dumps(o, ensure_ascii=False) for o in v) + '\n ]'
        return json.dumps(v, ensure_ascii=False)
    return '{\n' + ',\n'.join(f' {json.dumps(k)}: {value(v)}' for k, v in data.items()) + '\n}\n'

def write(path, data:dict):
    "Write a file whole or not at all."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    with os.fdopen(handle, 'w', encoding='utf-8') as f: f.write(dumps(check(data)))
    os.chmod(part, 0o644)
    os.replace(part, path)

# ---- which code was compared

def bare(source:str) -> str:
    "The code without comments, docstrings and blank lines: what they say changes no number."
    lines, cuts = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, 'body', None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, 'value', None), str):
            d, chars = body[0], lambda row, column: len(lines[row - 1].encode()[:column].decode())
            cuts.append(((d.lineno, chars(d.lineno, d.col_offset)), (d.end_lineno, chars(d.end_lineno, d.end_col_offset))))
    cuts += [(t.start, t.end) for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    for (row, start), (last, end) in sorted(cuts, reverse=True):
        lines[row - 1:last] = [lines[row - 1][:start] + lines[last - 1][end:], *[''] * (last - row)]
    return '\n'.join(o.rstrip() for o in lines if o.strip())

def parts(modules, folder=root/'deformlit') -> list:
    "The modules and all those of the package that they import."
    found, todo = set(), list(modules)
    while todo:
        name = todo.pop()
        if name in found: continue
        found.add(name)
        todo += re.findall(r'^from \.(\w+) import', (Path(folder)/f'{name}.py').read_text(encoding='utf-8'), re.M)
    return sorted(found)

def digest(system:str, folder=root/'deformlit') -> str:
    "A digest of the code that makes a system."
    h = hashlib.sha256()
    for name in parts(SYSTEMS[system], folder): h.update(name.encode() + b'\0' + bare((Path(folder)/f'{name}.py').read_text(encoding='utf-8')).encode() + b'\0')
    return h.hexdigest()[:12]

# ---- the page

STALE = '†'

def small(x): return '0' if x == 0 else f'{x:.1e}'
def percent(x): return '0' if x == 0 else '< 1 %' if x < .01 else f'{100 * x:.0f} %'
def plural(n, word): return f'{n:,} {word}' + 's' * (n != 1)

class Sentences(list):
    "Sentences, as a list in a notebook."
    def __repr__(self): return '\n'.join(self)
    def _repr_markdown_(self): return '\n'.join(f'- {o}' for o in self) if len(self) > 1 else ''.join(self)

class Parity:
    "All that was compared."
    def __init__(self,
        folder=root/'runs'/'parity',
        now=None,  # System: digest of the code that counts as fresh; that of this checkout, if left out
    ):
        self.files = read(folder)
        self.now = now or {o: digest(o) for o in SYSTEMS}
    def all(self, name, **want):
        "The rows of all files, in the order of the page; each with the file it is from."
        rows = [dict(row, file=file) for file, data in self.files.items() for row in data[name]]
        return sorted((row for row in rows if all(row[k] == v for k, v in want.items())), key=order)
    def is_stale(self, row): return self.files[row['file']]['digests'][row['system']] != self.now.get(row['system'])
    def mark(self, rows): return f' {STALE}' if any(map(self.is_stale, rows)) else ''

    def about(self):
        "The files, and the commands that write them."
        rows = [(f'`runs/parity/{name}.json`', f'`pytest tests/test_{name}.py`', len(data['rows']), f"{sum(o['tensors'] for o in data['rows']):,}", ', '.join(f'{k} {v}' for k, v in data['versions'].items()))
                for name, data in self.files.items()]
        return Table(('file', 'tests', 'comparisons', 'tensors', 'versions'), rows) if rows else Sentences(['There are no files in `runs/parity/`: `make parity` writes them.'])

    def stale(self):
        "Which systems have changed since."
        old = [o for o in SYSTEMS if any(self.is_stale(row) for row in self.all('rows', system=o) + self.all('departs', system=o))]
        if not old: return Sentences(['All was compared with the code of this checkout.'])
        return Sentences([f'Changed since they were compared, and marked {STALE}: {", ".join(old)}. `make parity` compares again.'])

    def overview(self):
        "Each system against each counterpart: how many tensors, and how much of the tolerance the worst of them takes."
        def cell(system, against):
            rows = self.all('rows', system=system, against=against)
            if not rows: return '–'
            return f"{sum(o['tensors'] for o in rows):,}; {percent(max(o['share'] for o in rows))}" + self.mark(rows)
        return Table(('system', *AGAINST), [(o, *(cell(o, a) for a in AGAINST)) for o in SYSTEMS])

    def table(self, against):
        "All comparisons with one counterpart."
        rows = [(row['system'] + self.mark([row]), row['what'], f"{row['tensors']:,}", small(row['difference']), percent(row['share']), f"`{row['test']}`") for row in self.all('rows', against=against)]
        return Table(('system', 'what', 'tensors', 'largest difference', 'of the tolerance', 'test'), rows) if rows else Sentences(['Nothing was compared: `make parity` does.'])

    def departs(self):
        "Where a counterpart does something else than the official code."
        rows = [(row['system'] + self.mark([row]), row['what'], '' if row['difference'] is None else small(row['difference']), f"`{row['test']}`") for row in self.all('departs')]
        return Table(('system', 'what transformers does', 'difference', 'test'), rows) if rows else Sentences(['Nothing was compared: `make parity` does.'])

    def left_out(self):
        "What is not compared: what the tests say, and each counterpart that no test of a system has."
        rows = [(row['system'], row['against'], row['why']) for row in self.all('left_out')]
        told = {o[:2] for o in rows}
        rows += [(s, a, 'no test compares them') for s in SYSTEMS for a in AGAINST if not self.all('rows', system=s, against=a) and (s, a) not in told]
        return Table(('system', 'counterpart', 'why it is not compared'), rows)
