"""What the package exports, read from its source: modules, symbols, parameters and their comments. Nothing is imported."""
import ast, io, re, tokenize
from dataclasses import dataclass, field
from pathlib import Path

DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

@dataclass
class Param:
    name: str         # With its stars
    type: str = ''    # As written in the source
    default: str = '' # As written in the source
    text: str = ''    # The comment beside it

@dataclass
class Symbol:
    name: str         # `MSDeformAttn` or `MSDeformAttn.forward`
    module: str       # `deformlit.multiscale`
    kind: str         # `class`, `function`, `method`, `property` or `data`
    line: int         # In the module's file
    page: str|None    # The notebook that exports it, `11_multiscale.ipynb`
    doc: str = ''
    params: list[Param] = field(default_factory=list)
    returns: Param|None = None
    methods: list['Symbol'] = field(default_factory=list)
    @property
    def full(self): return f'{self.module}.{self.name}'
    @property
    def short(self): return self.name.rpartition('.')[2]

@dataclass
class Module:
    name: str         # `deformlit.multiscale`
    path: Path
    doc: str
    page: str|None    # The notebook that is its source
    source: str
    symbols: dict[str, Symbol]
    @property
    def short(self): return self.name.rpartition('.')[2]

def comments(source:str) -> dict:
    "Line number to comment (without its `#`), and whether the comment stands alone on its line."
    found = {}
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT: found[t.start[0]] = t.string.lstrip('#').strip(), not t.line[:t.start[1]].strip()
    return found

def beside(line, last, notes):
    "The comment beside line `last`, or the lines of comment above `line`."
    if last in notes and not notes[last][1]: return notes[last][0]
    above = []
    while (line := line - 1) in notes and notes[line][1]: above.append(notes[line][0])
    return ' '.join(reversed(above))

def text(node): return ast.unparse(node) if node is not None else ''

def params(fn, notes, owned=False):
    "The parameters of a function (without `self` for a method) and what it returns."
    a, found = fn.args, []
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = list(zip(plain, defaults, [''] * len(plain)))
    if a.vararg: rows.append((a.vararg, None, '*'))
    elif a.kwonlyargs: rows.append((None, None, '*'))
    rows += zip(a.kwonlyargs, a.kw_defaults, [''] * len(a.kwonlyargs))
    if a.kwarg: rows.append((a.kwarg, None, '**'))
    static = any(text(d) == 'staticmethod' for d in fn.decorator_list)
    if owned and not static: rows = rows[1:]
    ends = {}   # a comment at the end of a line belongs to all parameters of the line
    for arg, default, _ in rows:
        if arg is not None: ends[arg.lineno] = (default or arg).end_lineno
    for arg, default, stars in rows:
        if arg is None: found.append(Param('*')); continue
        note = beside(arg.lineno, ends[arg.lineno], notes) if arg.lineno != fn.lineno else ''
        found.append(Param(stars + arg.arg, text(arg.annotation), text(default), note))
    returns = None
    first = fn.body[0].lineno
    if fn.returns is not None:
        line = fn.returns.end_lineno
        note = notes[line][0] if line in notes and not notes[line][1] and line < first else ''
        returns = Param('returns', text(fn.returns), '', note)
    return found, returns

def fields(cls, notes):
    "The fields of a dataclass or a named tuple, as parameters."
    return [Param(o.target.id, text(o.annotation), text(o.value), beside(o.lineno, o.end_lineno, notes)) for o in cls.body if isinstance(o, ast.AnnAssign)]

def is_record(cls):
    names = [text(d).partition('(')[0].rpartition('.')[2] for d in cls.decorator_list] + [text(b).rpartition('.')[2] for b in cls.bases]
    return 'dataclass' in names or 'NamedTuple' in names

def function(node, module, page, notes, owner=''):
    got, returns = params(node, notes, bool(owner))
    prop = any(text(d).rpartition('.')[2] in ('property', 'cached_property') for d in node.decorator_list)
    kind = 'property' if prop else 'method' if owner else 'function'
    name = f'{owner}.{node.name}' if owner else node.name
    return Symbol(name, module, kind, node.lineno, page, ast.get_docstring(node) or '', got, returns)

def klass(node, module, page, notes):
    s = Symbol(node.name, module, 'class', node.lineno, page, ast.get_docstring(node) or '')
    for o in node.body:
        if not isinstance(o, DEFS[:2]): continue
        m = function(o, module, page, notes, node.name)
        if o.name in ('__init__', '__new__'): s.params, s.doc = m.params, s.doc or m.doc
        elif not o.name.startswith('_'): s.methods.append(m)
    if not s.params and is_record(node): s.params = fields(node, notes)
    return s

def patched(node):
    "The class that a function decorated with fastcore's `patch` belongs to."
    for d in node.decorator_list:
        if text(d).startswith('patch_to'): return [text(d.args[0])]
        if text(d).partition('(')[0] == 'patch' and node.args.args: return [o.strip() for o in text(node.args.args[0].annotation).split('|')]
    return []

RE_CELL = re.compile(r'^# %% (\S*?)([^/\s]+\.ipynb) #(\S+)$')
def read_module(path:Path, name:str, nbs:str='nbs') -> Module:
    "Read one generated module."
    source = path.read_text(encoding='utf-8')
    tree, notes = ast.parse(source), comments(source)
    pages, page = {}, None   # line -> notebook, from the comments that nbdev leaves above each cell
    for i, line in enumerate(source.splitlines(), 1):
        if m := RE_CELL.match(line): page = (m[1].split(f'{nbs}/', 1)[-1] if f'{nbs}/' in m[1] else '') + m[2]
        pages[i] = page
    public, found = None, {}
    for o in tree.body:
        if isinstance(o, ast.Assign) and text(o.targets[0]) == '__all__': public = set(ast.literal_eval(o.value))
    for o in tree.body:
        where = pages[o.lineno]
        if isinstance(o, DEFS[:2]):
            owners = patched(o)
            for owner in owners:
                m = function(o, name, where, notes, owner)
                if not o.name.startswith('_'): found[m.name] = m
            if not owners: found[o.name] = function(o, name, where, notes)
        elif isinstance(o, ast.ClassDef): found[o.name] = klass(o, name, where, notes)
        elif isinstance(o, (ast.Assign, ast.AnnAssign)):
            for t in (o.targets if isinstance(o, ast.Assign) else [o.target]):
                for n in ast.walk(t):
                    if isinstance(n, ast.Name): found.setdefault(n.id, Symbol(n.id, name, 'data', o.lineno, where))
    keep = lambda n: not n.startswith('_') and (public is None or n.split('.')[0] in public or '.' in n)
    found = {n: s for n, s in found.items() if keep(n)}
    for s in list(found.values()):
        for m in s.methods: found.setdefault(m.name, m)
    named = [p for p in pages.values() if p]
    return Module(name, path, ast.get_docstring(tree) or '', max(named, key=named.count) if named else None, source, found)

class Package:
    "All modules of a package, and the symbol that a name in backticks means."
    def __init__(self, folder:Path, nbs:str='nbs'):
        self.name = folder.name
        self.modules = {}
        for path in sorted(folder.glob('*.py')):
            if not path.stem.startswith('_'): self.modules[f'{self.name}.{path.stem}'] = read_module(path, f'{self.name}.{path.stem}', nbs)
        self.symbols = {s.full: s for m in self.modules.values() for s in m.symbols.values()}
    def find(self, name:str, module:str|None=None):
        "The `Symbol` or `Module` called `name`, written in full, with its module, or alone; `module` is looked at first."
        name = name.removesuffix('()')
        for full in (name, f'{self.name}.{name}') if '.' in name else ():
            if full in self.symbols: return self.symbols[full]
            if full in self.modules and full == name: return self.modules[full]
        if module and (s := self.symbols.get(f'{module}.{name}')): return s
        hits = [m.symbols[name] for m in self.modules.values() if name in m.symbols]
        return hits[0] if hits and ('.' in name or len({h.full for h in hits}) == 1) else None
