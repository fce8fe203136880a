"""README.md from nbs/index.ipynb: its markdown, its shown code and its text outputs, as plain GitHub markdown.

    python docs/scripts/readme.py            writes README.md
    python docs/scripts/readme.py --check    fails if README.md is not in step
"""
import json, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
notebook, target = root/'nbs'/'index.ipynb', root/'README.md'
head = '<!-- Made from nbs/index.ipynb by `make readme`; change the notebook, not this file. -->\n\n'

def relink(text, folder='nbs'):
    "Relative links of a page in `folder`, seen from the folder above. Code is left alone."
    def move(m):
        if re.match(r'[a-z][a-z0-9+.-]*:|#|/', m[2], re.I): return m[0]
        return m[1] + posixpath.normpath(posixpath.join(folder, m[2])) + m[3]
    parts = re.split(r'(^```.*?^```|`[^`\n]*`)', text, flags=re.S | re.M)
    parts[::2] = [re.sub(r'''((?:src|href)=["'])([^"'\s]+)(["'])''', move, re.sub(r'(\]\()([^)\s]+)([^)]*\))', move, o)) for o in parts[::2]]
    return ''.join(parts)

def directives(source):
    "The `#| name: value` lines at the head of a code cell, and the rest of it."
    lines = source.splitlines()
    n = next((i for i, o in enumerate(lines) if not o.startswith('#|')), len(lines))
    found = dict((o[2:].strip().replace(':', ' ', 1).split(None, 1) + [''])[:2] for o in lines[:n] if o[2:].strip())
    return found, '\n'.join(lines[n:]).strip()

def outputs(cell):
    "The text outputs of a code cell."
    for o in cell.get('outputs', []):
        if o['output_type'] == 'stream' and o['name'] == 'stdout': yield ''.join(o['text'])
        data = o.get('data', {})
        if 'text/plain' in data and not any(k.startswith(('image/', 'text/html')) for k in data): yield ''.join(data['text/plain'])

def render(cells):
    "The cells of a notebook as markdown."
    blocks = []
    for cell in cells:
        source = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown': blocks.append(relink(source))
        if cell['cell_type'] != 'code': continue
        found, code = directives(source)
        if found.keys() & {'hide', 'export', 'exporti', 'default_exp'}: continue
        if code and 'hide_input' not in found and found.get('echo') != 'false': blocks.append(f'```python\n{code}\n```')
        if found.get('output') == 'false' or 'hide_output' in found: continue
        blocks += [f'```text\n{text.rstrip()}\n```' for text in outputs(cell)]
    return head + '\n\n'.join(filter(None, blocks)) + '\n'

def made(): return render(json.loads(notebook.read_text(encoding='utf-8'))['cells'])

if __name__ == '__main__':
    if '--check' not in sys.argv: target.write_text(made(), encoding='utf-8')
    elif not target.exists() or target.read_text(encoding='utf-8') != made():
        sys.exit('README.md is not in step with nbs/index.ipynb: run `make readme`')
