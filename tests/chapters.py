"""The chapters: the numbered notebooks, in order, and the module that each exports."""
import ast, json, re
from functools import cache
from notebooks import nbs, root

package = root/'deformlit'
chapters = {p.stem.split('_', 1)[1]: p for p in sorted(nbs.glob('[0-9]*_*.ipynb'))}
order = {module: i for i, module in enumerate(chapters)}
number = {module: int(re.match(r'\d+', p.stem)[0]) for module, p in chapters.items()}

@cache
def read(path): return json.loads(path.read_text(encoding='utf-8'))

def code(path):
    "The sources of a notebook's code cells, without magics."
    for cell in read(path)['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and not source.startswith('%%'): yield re.sub(r'^\s*[%!].*$', '', source, flags=re.M)

def imported(source):
    "The modules of the package that a source imports, wherever it does; `*` for the package itself."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for o in node.names:
                if o.name.split('.')[0] == 'deformlit': yield (o.name.split('.') + ['*'])[1]
        elif isinstance(node, ast.ImportFrom):
            inside = node.level > 0 or (node.module or '').split('.')[0] == 'deformlit'
            parts = (node.module or '').split('.')[0 if node.level else 1:] if inside else []
            if parts and parts[0]: yield parts[0]
            elif inside: yield from (o.name if o.name in chapters else '*' for o in node.names)
