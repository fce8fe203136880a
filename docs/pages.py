"""From notebooks to pages: nbdev runs what the documentation needs, then each notebook becomes one that MyST-NB renders.

`process` is nbdev's `proc_nbs` with our list of processors; `stage` writes the Sphinx source folder: a page per notebook,
a page per module under `api/`, and a plain Markdown copy of each page for `llms.txt`."""
import ast, json, re, shutil
from pathlib import Path

import nbdev.config, nbdev.serve, nbdev.showdoc, nbdev.processors as procs
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import Processor
from fastcore.nbio import mk_cell

from symbols import Package

PARTS = {0: 'Ground', 1: 'Mechanisms', 2: 'Models', 3: 'Training', 4: 'Kernels'}
FOLDERS = {'tutorials': 'Tutorials', 'bench': 'Measurements'}
BESIDE = {'parity.ipynb': 'bench'}     # pages beside the index, and the folder under whose name they are listed

# ---- nbdev's half ------------------------------------------------------------------------------------------------

class MarkerRenderer:
    "What `show_doc` shows here: a marker that `stage` replaces once all pages are known."
    def __init__(self, sym, name=None, title_level=3):
        self.name = name or getattr(sym, '__qualname__', None) or getattr(sym, '__name__', str(sym))
        self.other = nbdev_renderer(sym, name=name, title_level=title_level)
        self.module = getattr(sym, '__module__', '') or ''
    def _repr_markdown_(self):
        return f'<!-- doc {self.module} {self.name} -->\n' + self.other._repr_markdown_()
    def __repr__(self): return self.name

nbdev_renderer = nbdev.showdoc.BasicMarkdownRenderer

def is_exported(cell): return cell.cell_type == 'code' and {'export', 'exports'} & cell.directives_.keys() and 'hide' not in cell.directives_

class ShowDocs(procs.add_show_docs):
    "`show_doc` of each exported symbol right after its cell, in the cell's order; a marker for each exported value."
    def begin(self):
        super().begin()
        cells, run, out = self.nb.cells, [], []
        for c in cells:   # nbdev inserts the symbols of a cell last to first
            if getattr(c, 'has_sd', 0): run.insert(0, c); continue
            out += run + [c]; run = []
            if is_exported(c): out += [mk_cell(f'<!-- data {n} -->', 'markdown') for n in values(c.source)]
        self.nb.cells[:] = out + run
        self.nb.has_docs_ = any(is_exported(c) or 'show_doc' in c.source for c in self.nb.cells if c.cell_type == 'code')     # else nothing has to run

def values(source):
    "The public names that a cell assigns."
    try: body = ast.parse(source).body
    except SyntaxError: return []
    targets = [t for o in body if isinstance(o, ast.Assign) for t in o.targets]
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and not n.id.startswith('_')]

class Execute(procs.exec_show_docs):
    "Runs imports, exported cells and `show_doc`, but no cell that tests skip as well (slow, cuda)."
    def __init__(self, nb):
        super().__init__(nb)
        self.skip = set(nbdev.config.get_config().tst_flags)
    def __call__(self, cell):
        if not self.skip & cell.directives_.keys(): return super().__call__(cell)

def mark_exports(cell):
    "Remember which cells are exported and shown: their directive is gone by the time we stage them."
    if cell.cell_type == 'code' and 'exports' in cell.directives_: cell.metadata['exported'] = True

class Pages(procs.FilterDefaults):
    def base_procs(self):
        return [FrontmatterProc, procs.populate_language, ShowDocs, procs.strip_ansi, procs.hide_line, procs.filter_stream_, procs.rm_header_dash,
                procs.clean_show_doc, Execute, mark_exports, procs.rm_export, procs.ai_magics, procs.clean_magics, procs.hide_, procs.strip_hidden_metadata]

def process(root:Path, force=False):
    "Run nbdev's `proc_nbs`; results lie in `_proc/` and are reused while notebook, package and this folder are older."
    cache = root / '_proc'
    inputs = [*Path(__file__).parent.glob('*.py'), root / 'pyproject.toml', *(root / 'deformlit').glob('*.py')]
    stamp = cache.stat().st_mtime if cache.exists() else 0
    nbdev.serve.FilterDefaults = Pages
    nbdev.showdoc.BasicMarkdownRenderer = MarkerRenderer
    return Path(nbdev.serve.proc_nbs(n_workers=0, force=force or any(f.stat().st_mtime > stamp for f in inputs)))

# ---- our half ----------------------------------------------------------------------------------------------------

RE_NUMBER = re.compile(r'^(\d+)([a-z]*)_')
RE_DIRECTIVE = re.compile(r'^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$')
RE_NOTEBOOK_LINK = re.compile(r'(\]\()((?:[\w./-]*/)?)([\w.-]+)\.ipynb')

def page_name(notebook:str) -> str:
    "`tutorials/11_x.ipynb` -> `tutorials/x`: nbdev's own rule for the name of a page."
    return str(nbdev.config.nbpath2html(Path(notebook)).with_suffix(''))

def folder_of(notebook:str):
    "The folder under whose name a page is listed, or None."
    return notebook.split('/')[0] if '/' in notebook else BESIDE.get(notebook)

def outside_code(source, f):
    "Apply `f` to the parts of a Markdown text that are no code."
    out = re.split(r'(^(?P<f>`{3,}|~{3,}).*?^(?P=f)`*\s*$|(?P<t>`+)(?:(?!`).|\n)+?(?P=t)(?!`))', source, flags=re.M | re.S)
    plain, i = [], 0
    while i < len(out):   # re.split returns text, whole match, two groups, text, ...
        plain.append(f(out[i]))
        if i + 1 < len(out): plain.append(out[i + 1])
        i += 4
    return ''.join(plain)

def prose_only(source):
    parts = []
    outside_code(source, lambda s: parts.append(s) or s)
    return '\n'.join(parts)

def relink(source):
    "Links to notebooks become links to their pages; anchors in Jupyter's form (`#The-loop`) become `#the-loop`."
    def fix(text):
        text = RE_NOTEBOOK_LINK.sub(lambda m: m[1] + m[2] + Path(page_name(m[3] + '.ipynb')).name + '.ipynb', text)
        return re.sub(r'(\]\([^()\s]*#)([^()\s]+)\)', lambda m: m[0] if '://' in m[1] else m[1] + m[2].lower() + ')', text)
    return outside_code(source, fix)

def doors(source):
    "The section called Three doors: its list becomes a row of cards."
    return re.sub(r'^(#+ .*\bdoors\s*\n+)(?=[-*] )', r'\1{.doors}\n', source, flags=re.M | re.I)

def text_of(x): return ''.join(x) if isinstance(x, list) else x

def quiet(text):
    "Comments and docstrings are prose with code in backticks; stars, dollars and brackets stand for themselves."
    return outside_code(text, lambda s: re.sub(r'[*$<{\[]', r'\\\g<0>', s))

def one_line(doc): return ' '.join(doc.split('\n\n')[0].split())

def code(s): return f'`` {s} ``' if '`' in s else f'`{s}`'

class Docs:
    "Writes the description of symbols in MyST's Python directives."
    def __init__(self, package): self.package = package
    def signature(self, s, typed):
        if s.kind in ('data', 'property'): return s.short
        def one(p):
            anno = f': {p.type}' if typed and p.type else ''
            return p.name + anno + ((' = ' if anno else '=') + p.default if p.default else '')
        back = f' -> {s.returns.type}' if typed and s.returns and s.returns.type else ''
        return f"{s.short}({', '.join(one(p) for p in s.params)}){back}"
    def table(self, s):
        rows = [p for p in s.params if p.name != '*'] + ([s.returns] if s.returns and (s.returns.text or s.params) else [])
        lines = []
        for p in rows:
            kind = code(p.type) if p.type else ''
            if p.default: kind += (' = ' if kind else '= ') + code(p.default)
            name = '*returns*' if p is s.returns else '**' + p.name.replace('*', r'\*') + '**'
            lines += [f'* - {name}', f'  - {kind}', f'  - {quiet(p.text)}']
        return lines
    def methods(self, s, skip): return [m for m in s.methods if m.name not in skip and (m.doc or any(p.text for p in m.params))]
    def markdown(self, s, index=True, skip=(), depth=6):
        "The directive for `s`; its methods inside, but those in `skip`."
        table = any(p.text for p in s.params) or bool(s.returns and s.returns.text)
        kind = {'property': 'property', 'method': 'method', 'class': 'class', 'function': 'function', 'data': 'data'}[s.kind]
        name = self.signature(s, not table)
        if s.kind in ('method', 'property') and depth == 6: name = s.name.rpartition('.')[0] + '.' + name
        fence = '`' * depth
        lines = [f'{fence}{{py:{kind}}} {name}', f':module: {s.module}'] + ([] if index else [':no-index:'])
        lines += ['', quiet(s.doc), '']
        if table: lines += ['````{list-table}', ':class: params', ':widths: auto', '', *self.table(s), '````', '']
        if s.kind == 'class':
            for m in self.methods(s, skip): lines += [self.markdown(m, index, depth=5), '']
        return '\n'.join(lines + [fence])
    def target(self, s): return f'```{{py:data}} {s.name}\n:module: {s.module}\n:no-typesetting:\n```'

class Page:
    "One notebook on its way to a page."
    def __init__(self, nb:dict, notebook:str, docs:Docs):
        self.nb, self.notebook, self.docs = nb, notebook, docs
        self.name = page_name(notebook)
        m = RE_NUMBER.match(Path(notebook).name)
        self.number = int(m[1]) if m and '/' not in notebook else None
        self.module = next((x for x in docs.package.modules.values() if x.page == notebook), None)
        self.shown, self.markdown = set(), []
        self.front()
    def front(self):
        "Title and summary, from nbdev's front matter."
        import yaml
        self.title, self.summary, self.meta = '', '', {}
        cells = self.nb['cells']
        if cells and cells[0]['cell_type'] == 'raw' and text_of(cells[0]['source']).startswith('---'):
            self.meta = yaml.safe_load(text_of(cells.pop(0)['source']).strip().strip('-')) or {}
            self.title, self.summary = self.meta.get('title', ''), self.meta.get('description', '')
        if not self.title: raise ValueError(f'{self.notebook}: the first Markdown cell must be `# Title`, then `> summary`')
    @property
    def part(self): return None if self.number is None else self.number // 10
    def header(self):
        up = '../' * self.name.count('/')
        line = []
        if self.part is not None: line.append(f'Part {self.part}, {PARTS.get(self.part, "")} · chapter {self.number:02d}')
        elif folder := folder_of(self.notebook): line.append(FOLDERS.get(folder, ''))
        if self.module:
            line.append(f'`{self.module.name}`')
            line.append(f'<a href="{up}source/{self.module.short}.html">source</a>')
        if self.name != 'index': line.append(f'<a href="{up}notebooks/{self.notebook}" download>notebook</a>')
        md = f'# {relink(self.title)}\n'
        if self.summary: md += f'\n{{.lead}}\n{relink(self.summary)}\n'
        if line: md += '\n{.chapter-line}\n' + ' · '.join(line) + '\n'
        return md
    def render_doc(self, md):
        "The marker of `show_doc` becomes our directive; a symbol of another package keeps nbdev's text."
        m = re.match(r'<!-- doc (\S*) (\S+) -->\n(.*)', md, re.S)
        if not m: return md
        package = self.docs.package
        s = package.find(f'{m[1]}.{m[2]}') if m[1] in package.modules else package.find(m[2], self.module and self.module.name)
        if s is None or not hasattr(s, 'kind'): return re.sub(r'^---\n+|\{target=[^}]*\}', '', m[3])
        index = s.page == self.notebook and s.full not in self.shown
        self.shown.add(s.full)
        return self.docs.markdown(s, index, self.documented)
    def stage(self):
        "All cells, in MyST-NB's terms."
        cells = self.nb['cells']
        markers = [re.match(r'<!-- doc (\S*) (\S+) -->', text_of(o['data']['text/markdown'])) for c in cells if c['cell_type'] == 'code'
                   for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
        self.documented = {m[2] for m in markers if m}
        out = [self.md(self.header())]
        for i, c in enumerate(cells):
            source = text_of(c['source'])
            if c['cell_type'] == 'markdown': out.append(self.md(self.prose(source, c)))
            elif c['cell_type'] == 'code': out += self.code(source, c, i)
        out = [c for c in out if c]
        ids = set()
        for i, c in enumerate(out): c['id'] = c['id'] if c.get('id') and c['id'] not in ids else f'cell-{i}'; ids.add(c['id'])
        kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'), language_info=dict(name='python'))
        return dict(cells=out, metadata=kernel, nbformat=4, nbformat_minor=5)
    def md(self, source, cell=None):
        return dict(cell_type='markdown', metadata={}, source=source, id=(cell or {}).get('id')) if source.strip() else None
    def prose(self, source, cell):
        if m := re.fullmatch(r'<!-- data (\w+) -->', source.strip()):
            s = self.module and self.module.symbols.get(m[1])
            if not s or s.kind != 'data' or s.full in self.shown: return ''
            self.shown.add(s.full)
            return self.docs.target(s)
        if re.search(r'^# ', prose_only(source), re.M):
            raise ValueError(f'{self.notebook}: a second title (`# ...`) in the middle of the page; use `##`\n{source}')
        return doors(relink(source))
    def code(self, source, c, i):
        options, lines = {}, source.split('\n')
        while lines and (m := RE_DIRECTIVE.match(lines[0])): options[m[1]] = m[2].strip('"\'') or 'true'; lines.pop(0)
        source = '\n'.join(lines).strip('\n')
        outputs = c.get('outputs', [])
        flag = lambda k, v='true': options.get(k, '').lower() == v
        if source.lstrip().startswith('show_doc'):
            found = [text_of(o['data']['text/markdown']) for o in outputs if 'text/markdown' in o.get('data', {})]
            return [self.md(self.render_doc(md)) for md in found]
        if flag('include', 'false') or not source.strip() and not outputs: return []
        tags, meta = [], {}
        if flag('echo', 'false') or flag('hide_input') or not source.strip(): tags.append('remove-input')
        elif flag('code-fold') or flag('code-fold', 'show') or flag('collapse_input'):
            tags.append('hide-input')
            prompt = options.get('code-summary') or 'Code'
            meta = dict(mystnb=dict(code_prompt_show=prompt, code_prompt_hide=prompt))
        if flag('output', 'false') or flag('hide_output') or flag('eval', 'false') and not outputs: tags.append('remove-output')
        elif flag('collapse_output'): tags.append('hide-output')
        if {'remove-input', 'remove-output'} <= set(tags): return []
        if c['metadata'].get('exported'): tags.append('exported')
        if c['metadata'].get('language', 'python') not in ('python', None): source = source.split('\n', 1)[-1]
        for o in outputs:
            o.setdefault('metadata', {})
            if o['output_type'] == 'execute_result': o.setdefault('execution_count', None)
            data = o.get('data', {})
            for key in [k for k in data if 'widget' in k]: del data[key]
            for key in data: data[key] = text_of(data[key]) if not key.endswith('json') else data[key]
            if 'text' in o: o['text'] = text_of(o['text'])
        return [dict(cell_type='code', id=c.get('id'), metadata=dict(tags=tags, **meta), source=source, outputs=outputs, execution_count=None)]

# ---- plain Markdown, for llms.txt ---------------------------------------------------------------------------------

def plain(page, staged) -> str:
    "The page as plain Markdown: prose, code, text outputs; pictures are named only."
    out = []
    for c in staged['cells']:
        s = c['source']
        if c['cell_type'] == 'markdown':
            if '{toctree}' in s: continue
            s = re.sub(r'^\{\.chapter-line\}\n.*\n?', f'Module `{page.module.name}`.\n' if page.module else '', s, flags=re.M)
            s = re.sub(r'^\{\.[\w-]+\}\n', '', s, flags=re.M)
            if s.startswith('`') and '{py:' in s: s = plain_doc(s)
            out.append(outside_code(s, lambda t: re.sub(r'(\]\([\w./-]+)\.ipynb', r'\1.md', t)))
            continue
        if 'remove-input' not in c['metadata']['tags']: out.append(f'```python\n{s}\n```')
        for o in c['outputs']:
            if 'remove-output' in c['metadata']['tags']: continue
            data = o.get('data', {})
            if o['output_type'] == 'stream': out.append(f"```\n{o['text'].rstrip()}\n```")
            elif 'text/markdown' in data: out.append(data['text/markdown'])
            elif any(k.startswith('image/') for k in data): out.append('*(picture)*')
            elif 'text/html' in data and '<svg' in data['text/html']: out.append('*(figure that the reader moves)*')
            elif 'text/plain' in data: out.append(f"```\n{data['text/plain'].rstrip()}\n```")
    return '\n\n'.join(s.strip() for s in out if s.strip()) + '\n'

def plain_doc(s):
    "A Python directive as a line of signature, its sentence, and a list of parameters."
    if ':no-typesetting:' in s: return ''
    s = re.sub(r'^`{3,}\{py:\w+\} (.*)\n:module: (\S+)\n(?::no-index:\n)?', r'**`\1`** (`\2`)\n', s, flags=re.M)
    s = re.sub(r'^`{3,}.*\n?|^:\w+: .*\n', '', s, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'^\* - (.*)\n  - (.*)\n  - (.*)$', r'- \1 \2 \3', s, flags=re.M))

def plain_api(docs) -> str:
    "All signatures with a sentence each, by module."
    out = [f'# The API of {docs.package.name}', '']
    for m in docs.package.modules.values():
        out += [f'## {m.name}', '', one_line(m.doc), '']
        for s in m.symbols.values():
            sign = docs.signature(s, True)
            out.append(f"- `{s.name.rpartition('.')[0] + '.' if '.' in s.name else ''}{sign}`" + (f': {one_line(s.doc)}' if s.doc else ''))
        out.append('')
    return '\n'.join(out)

# ---- the whole site -------------------------------------------------------------------------------------------------

def toctree(caption, entries):
    return '\n'.join(['```{toctree}', ':hidden:', ':titlesonly:', f':caption: {caption}', '', *entries, '```', ''])

def contents(pages):
    "The site's table of contents: parts by tens, then tutorials, measurements and the API."
    out = []
    label = lambda p: f'{p.number:02d} {p.title} <{p.name}>'
    for part in sorted({p.part for p in pages if p.part is not None}):
        mine = sorted((p for p in pages if p.part == part), key=lambda p: p.notebook)
        out.append((f'{part} · {PARTS.get(part, "")}', mine, [label(p) for p in mine]))
    for folder, caption in FOLDERS.items():
        mine = sorted((p for p in pages if folder_of(p.notebook) == folder), key=lambda p: p.notebook)
        if mine: out.append((caption, mine, [p.name for p in mine]))
    listed = {p.name for _, mine, _ in out for p in mine} | {'index'}
    rest = [p for p in pages if p.name not in listed]
    if rest: out.append(('More', rest, [p.name for p in rest]))
    return out

def api_pages(package, pages):
    "A page per module: what it exports, a line each, linked to the chapter."
    by_notebook = {p.notebook: p for p in pages}
    out = {}
    order = sorted(package.modules.values(), key=lambda m: (m.page is None, m.page or m.name))
    for m in order:
        page = by_notebook.get(m.page)
        lines = [f'# {m.short}', '', f'```{{py:module}} {m.name}', '```', '', '{.lead}', quiet(m.doc or (page.summary if page else '')) or f'Module `{m.name}`.', '']
        where = [f'[{page.title}](../{page.name}.ipynb)'] if page else []
        lines += ['{.chapter-line}', ' · '.join(where + [f'<a href="../source/{m.short}.html">source</a>']), '']
        rows = [s for s in m.symbols.values() if '.' not in s.name]
        if rows:
            lines += ['````{list-table}', ':class: api', ':widths: auto', '']
            for s in rows:
                about = quiet(one_line(s.doc)) if s.doc else {'data': 'Value.'}.get(s.kind, '')
                lines += [f'* - `{s.name}`', f'  - {about}']
            lines += ['````', '']
        out[f'api/{m.short}'] = '\n'.join(lines)
    rows = [f'| [{m.short}]({m.short}.md) | {quiet(one_line(m.doc or (by_notebook[m.page].summary if m.page in by_notebook else "")))} |' for m in order]
    out['api/index'] = '\n'.join(['# API', '', '{.lead}', f'Everything that `{package.name}` exports, by module. Each name links to the chapter that derives it.', '',
        '| module | what |', '|---|---|', *rows, '', '```{toctree}', ':hidden:', ':titlesonly:', '', *[m.short for m in order], '```', ''])
    return out

def write(path, text):
    "Write only what changed, so that Sphinx rebuilds only that."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding='utf-8') != text: path.write_text(text, encoding='utf-8')
    return path

def stage(root:Path, proc:Path, out:Path, extra:Path):
    "Write the Sphinx source folder `out`, and what is copied as it is into `extra`. Returns the pages."
    package = Package(root / 'deformlit')
    docs, pages, kept = Docs(package), [], set()
    for f in sorted(proc.rglob('*.ipynb')):
        name = f.relative_to(proc).as_posix()
        pages.append(Page(json.loads(f.read_text(encoding='utf-8')), name, docs))
    names = [p.name for p in pages]
    twice = {n for n in names if names.count(n) > 1}
    if twice: raise ValueError(f'two notebooks make the same page: {", ".join(sorted(twice))}')
    if 'index' not in names: raise ValueError('nbs/index.ipynb is missing')
    for p in pages: p.staged = p.stage()
    toc = contents(pages)
    api = api_pages(package, pages)
    tree = [toctree(caption, entries) for caption, _, entries in toc] + [toctree('Reference', ['API <api/index>'])]
    index = next(p for p in pages if p.name == 'index')
    index.staged['cells'].append(dict(cell_type='markdown', metadata={}, id='contents', source='\n'.join(tree)))
    for p in pages:
        kept.add(write(out / f'{p.name}.ipynb', json.dumps(p.staged, ensure_ascii=False, indent=1)))
        kept.add(write(extra / f'{p.name}.md', plain(p, p.staged)))
        kept.add(write(extra / 'notebooks' / p.notebook, (root / 'nbs' / p.notebook).read_text(encoding='utf-8')))
    for name, md in api.items(): kept.add(write(out / f'{name}.md', md))
    for f in proc.rglob('*'):   # pictures and other files beside the notebooks
        if f.is_file() and f.suffix in ('.png', '.jpg', '.jpeg', '.svg', '.gif', '.webp'):
            to = out / f.relative_to(proc)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, to); kept.add(to)
    kept |= {write(extra / 'api.md', plain_api(docs)), write(extra / 'llms.txt', llms(package, index, toc))}
    for base in (out, extra):
        for f in list(base.rglob('*')):
            if f.is_file() and f not in kept: f.unlink()
    return pages

def llms(package, index, toc):
    "https://llmstxt.org: a title, a sentence, and a list of pages with a line each."
    lines = [f'# {index.title}', '', f'> {index.summary}', '', 'Each link is a page of this site as plain Markdown; the same name with `.html` is the page itself.', '',
             '## Start', '', f'- [{index.title}](index.md): {index.summary}', '']
    for caption, mine, _ in toc:
        lines += [f'## {caption}', '', *[f'- [{p.title}]({p.name}.md): {p.summary}'.rstrip(': ') for p in mine], '']
    lines += ['## Reference', '', '- [API](api.md): every signature with a sentence, by module.', '']
    return '\n'.join(lines)
