"""The rules of the house that a machine can check."""
import ast, json, os, re, shutil, subprocess, sys
import pytest
from chapters import chapters, code, imported, number, order, package, read
from notebooks import name, nbs, notebooks, root

every_notebook = pytest.mark.parametrize('path', notebooks(), ids=name)
every_chapter = pytest.mark.parametrize('module', list(chapters))

def tracked():
    "The files of the repository: git's, or where there is no git all but hidden and built ones."
    r = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True)
    if r.returncode == 0: return [p for o in r.stdout.split('\0') if o and (p := root/o).is_file()]
    skip = {'runs', 'build', 'dist', '_build', '_proc', '__pycache__'}
    return [p for p in root.rglob('*') if p.is_file() and not any(o in skip or o.startswith('.') for o in p.relative_to(root).parts)]

@every_notebook
def test_imports_stand_alone(path):
    "nbdev runs cells with an import when it makes a page, and none of those before: other code in them must need no other cell, or `make docs` ends there."
    is_import = lambda o: isinstance(o, (ast.Import, ast.ImportFrom))
    for source in code(path):
        tree = ast.parse(source)
        if re.search(r'^#\| *(eval: *false|exports?|exporti)\b', source, re.M) or not any(map(is_import, ast.walk(tree))): continue
        other = [o for o in tree.body if not is_import(o) and not (isinstance(o, ast.Expr) and isinstance(o.value, ast.Call))]     # a call to set something up may stay
        assert not other, f'an import among other code; put it into a cell of imports:\n{source}'

@every_notebook
def test_no_page_imports_a_module_that_registers_ops(path):
    "The site's builder runs all pages in one process, and an op can be registered once: by its own page."
    found = {o for source in code(path) for o in imported(source) if o.endswith('_kernel')}
    assert not found, f'{path.name} imports {found}; what pages share belongs into `native`'

# ---- the source and what is made from it

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and '__pycache__' not in p.parts}

def test_export_and_clean_change_nothing(tmp_path):
    "Tried on a copy, so that work in progress is neither touched nor in the way."
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked', '*.tmp')
    for o in ('nbs', 'deformlit'): shutil.copytree(root/o, tmp_path/o, ignore=skip)
    for o in ('pyproject.toml', 'README.md'): shutil.copy(root/o, tmp_path/o)
    before = contents(tmp_path)
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}
    run = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_export(); nbdev_clean()'
    r = subprocess.run([sys.executable, '-c', run], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    after = contents(tmp_path)
    changed = [o for o in sorted(before.keys() | after.keys()) if before.get(o) != after.get(o)]
    assert not changed, f'nbdev-export or nbdev-clean changes {", ".join(changed)}: run both and commit'

def test_modules_come_from_notebooks():
    exported = {p.stem for p in package.glob('*.py') if not p.stem.startswith('_')}
    assert exported <= set(chapters), f'no notebook exports {exported - set(chapters)}'

def test_readme_in_step():
    r = subprocess.run([sys.executable, root/'docs'/'scripts'/'readme.py', '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

def test_readme_links():
    text = re.sub(r'^```.*?^```', '', (root/'README.md').read_text(encoding='utf-8'), flags=re.S | re.M)
    links = [o for o in re.findall(r'\]\(([^)#\s]+)', text) if not re.match('[a-z]+:', o)]
    assert not [o for o in links if not (root/o).exists()]

def test_readme_rewrites(monkeypatch):
    monkeypatch.syspath_prepend(root/'docs'/'scripts')
    import readme
    cell = lambda source, kind='code', **kw: dict(cell_type=kind, source=source, **kw)
    out = [dict(output_type='stream', name='stdout', text=['two\n']), dict(output_type='execute_result', data={'text/plain': ['3']}),
           dict(output_type='display_data', data={'text/plain': ['<Figure>'], 'image/png': 'xx'})]
    made = readme.render([cell('[a](11_a.ipynb#b) [c](https://d.e/f) [g](#g) [h](../LICENSE) `[i](j)`', 'markdown'), cell('#| hide\nx'),
                          cell('#| exporti\ny'), cell('#| eval: false\nz', outputs=out), cell('#| echo: false\nw')])
    assert made == readme.head + '[a](nbs/11_a.ipynb#b) [c](https://d.e/f) [g](#g) [h](LICENSE) `[i](j)`\n\n```python\nz\n```\n\n```text\ntwo\n```\n\n```text\n3\n```\n'

# ---- notebooks

@every_notebook
def test_notebook_size(path): assert path.stat().st_size <= 300_000, f'{path.name} is larger than 300 KB with its outputs'

@every_notebook
def test_notebook_metadata(path):
    meta = read(path)['metadata']
    assert meta.get('kernelspec') == {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    assert 'jupytext' not in meta

@every_notebook
def test_notebook_shows_no_warnings(path):
    for cell in read(path)['cells']:
        for o in cell.get('outputs', []):
            assert o['output_type'] != 'error' and o.get('name') != 'stderr', f'cell {cell["id"]} of {path.name} keeps a warning or an error: {str(o)[:300]}'

@every_chapter
def test_chapter_head(module):
    "A chapter exports the module of its name and opens with a title and a line of summary."
    cells = read(chapters[module])['cells']
    assert any(re.search(rf'^#\|\s*default_exp:?\s+{module}\s*$', ''.join(o['source']), re.M) for o in cells)
    title = next(''.join(o['source']) for o in cells if o['cell_type'] == 'markdown')
    assert re.match(r'# \S.*\n\s*\n> \S', title), f'{chapters[module].name} should open with `# Title` and `> summary`'

@every_chapter
def test_chapter_imports_only_those_before(module):
    for source in code(chapters[module]):
        for other in imported(source):
            assert other in order, f'{chapters[module].name} imports `{other}` of the package; name a chapter before it'
            assert order[other] <= order[module], f'{chapters[module].name} imports the later {chapters[other].name}'

def test_chapters_are_numbered_once(): assert len(set(number.values())) == len(number)

# ---- code

@every_chapter
def test_docstrings(module):
    "Every public function and class says in a line what it is."
    tree = ast.parse((package/f'{module}.py').read_text(encoding='utf-8'))
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    bare = [o.name for o in tree.body if isinstance(o, kinds) and not o.name.startswith('_') and not ast.get_docstring(o)]
    assert not bare, f'without docstring in {module}: {", ".join(bare)}'

def test_no_machine_paths():
    "Nothing speaks of the machine it was made on."
    homes = [f'/{o}/' for o in ('home', 'root', 'Users', 'work', 'tmp')]
    pattern = re.compile(r'(?<![\w.~:/$})-])(?:' + '|'.join(homes) + r')\w|\b[A-Z]:\\\\?Users')
    found = []
    for p in tracked():
        try: text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{p.relative_to(root)}: {text[max(0, m.start() - 30):m.end() + 30]!r}' for m in pattern.finditer(text)]
    assert not found, '\n'.join(found)

# ---- kernels

def sources(): return [p for p in sorted((root/'kernels').glob('*')) if p.suffix in ('.h', '.cpp', '.cu')]

def regions(text):
    "The names of the regions of a source in their order; fails if one is not closed, or lies in another."
    names, inside = [], None
    for word, name in re.findall(r'^[ \t]*// (region|endregion) (\S+)[ \t]*$', text, re.M):
        assert (inside is None) == (word == 'region') and inside in (None, name), f'{word} {name} within {inside}'
        inside = name if word == 'region' else None
        if inside: names.append(name)
    assert inside is None, f'region {inside} is not closed'
    return names

def test_regions_are_found():
    "The check itself: what is not closed, nested or closed by another name is seen."
    assert regions('// region a\nx\n// endregion a\n// region b\n// endregion b\n') == ['a', 'b']
    for wrong in ('// region a\n', '// region a\n// region b\n', '// region a\n// endregion b\n', '// endregion a\n'):
        with pytest.raises(AssertionError): regions(wrong)

def test_every_region_of_kernels_is_shown():
    "A notebook shows each named region of kernels/ by `region(file, name)`, and each name is used once."
    there = [(p.name, o) for p in sources() for o in regions(p.read_text(encoding='utf-8'))]
    names = [o for _, o in there]
    assert there and len(set(names)) == len(names), f'used twice: {sorted({o for o in names if names.count(o) > 1})}'
    shown = {o for p in notebooks() for source in code(p) for o in re.findall(r"^region\('([^']+)', '([^']+)'\)$", source, re.M)}
    assert not set(there) - shown, f'shown in no notebook: {sorted(set(there) - shown)}'
    assert not shown - set(there), f'shown, but not there: {sorted(shown - set(there))}'

def test_kernels_are_shown_whole():
    "Outside the regions stand only includes, comments, namespaces and a line or two that need no page."
    for p in sources():
        rest = re.sub(r'^// region (\S+)\n.*?^// endregion \1\n', '', p.read_text(encoding='utf-8'), flags=re.M | re.S)
        lines = [o for o in rest.splitlines() if o.strip() and not re.match(r'//|#|namespace|using|typedef|\}', o.strip())]
        assert len(lines) <= 8, f'{p.name}: give these lines a region and show it:\n' + '\n'.join(lines)

def test_kernel_lines_fit_a_page():
    for p in sources() + sorted((root/'kernels'/'ladder').glob('*.h')):
        long = [i + 1 for i, o in enumerate(p.read_text(encoding='utf-8').splitlines()) if len(o) > 150]
        assert not long, f'{p.name}: lines {long} are longer than 150 characters'

def ladder(): return sorted((root/'kernels'/'ladder').glob('*.h'))

@pytest.mark.parametrize('path', ladder(), ids=lambda p: p.stem)
def test_step_that_lost_fits(path):
    "Each file of kernels/ladder changes text that stands once in today's sources, and the list names it."
    text = path.read_text(encoding='utf-8')
    changes = re.findall(r'^// in (\S+)\n(.*?)\n// write\n(.*?)\n?(?=^// in |\Z)', text, re.M | re.S)
    assert text.startswith('// ') and len(changes) == text.count('\n// write\n') > 0
    for file, old, new in changes: assert (root/'kernels'/file).read_text(encoding='utf-8').count(old) == 1 and new != old, f'{file} has no longer, or more than once:\n{old}'
    assert f'[{path.stem}]({path.name})' in (path.parent/'README.md').read_text(encoding='utf-8')
