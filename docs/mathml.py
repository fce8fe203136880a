"""LaTeX to MathML that browsers draw by themselves: no script, and a mistake in a formula is an error of the build."""
import re, unicodedata
from xml.etree import ElementTree as ET
from latex2mathml.converter import convert

STYLES = {'bold': 'BOLD', 'italic': 'ITALIC', 'bold-italic': 'BOLD ITALIC', 'double-struck': 'DOUBLE-STRUCK', 'script': 'SCRIPT', 'bold-script': 'BOLD SCRIPT',
          'fraktur': 'FRAKTUR', 'sans-serif': 'SANS-SERIF', 'monospace': 'MONOSPACE'}
DIGITS = 'ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE'.split()
ODD = {('DOUBLE-STRUCK', c): n for c, n in zip('CHNPQRZ', 'ℂℍℕℙℚℝℤ')} | {('SCRIPT', c): n for c, n in zip('BEFHILMRego', 'ℬℰℱℋℐℒℳℛℯℊℴ')} | \
      {('FRAKTUR', c): n for c, n in zip('CHIRZ', 'ℭℌℑℜℨ')} | {('ITALIC', 'h'): 'ℎ'}
ARITY = dict(mfrac=2, msub=2, msup=2, msubsup=3, munder=2, mover=2, munderover=3, mroot=2)
NS = 'http://www.w3.org/1998/Math/MathML'

class MathError(ValueError): "A formula that cannot be turned into MathML."

def styled(c:str, style:str) -> str:
    "One character in a mathematical alphabet: browsers know the letters, not the attribute `mathvariant`."
    if (style, c) in ODD: return ODD[style, c]
    name = unicodedata.name(c, '')
    if m := re.fullmatch(r'(?:LATIN|GREEK) (CAPITAL|SMALL) LETTER (\w+)', name): name = f'MATHEMATICAL {style} {m[1]} {m[2]}'
    elif m := re.fullmatch(r'GREEK (?:LUNATE )?(\w+) SYMBOL', name): name = f'MATHEMATICAL {style} {m[1]} SYMBOL'
    elif c.isdigit(): name = f'MATHEMATICAL {style} DIGIT {DIGITS[int(c)]}'
    try: return unicodedata.lookup(name)
    except KeyError: return c

def mend(tree):
    "Only what MathML Core draws: alphabets as characters, alignment as style; wrong arities are errors."
    for e in tree.iter():
        tag = e.tag.removeprefix('{' + NS + '}')
        if tag in ARITY and len(e) != ARITY[tag]: raise MathError(f'an argument is missing near <{tag}>')
        if e.text and e.text.startswith('\\') and len(e.text) > 1: raise MathError(f'unknown command {e.text}')
        if e.text == '&': raise MathError("'&' outside a table")
        if style := STYLES.get(e.get('mathvariant')):
            if tag in ('mi', 'mn', 'mo') and e.text:
                e.text = ''.join(styled(c, style) for c in e.text)
                del e.attrib['mathvariant']
            elif tag == 'mtext':
                e.set('style', {'bold': 'font-weight:bold', 'italic': 'font-style:italic', 'monospace': 'font-family:var(--pst-font-family-monospace)'}.get(e.attrib.pop('mathvariant'), ''))
        if tag == 'mi' and re.fullmatch('[Α-Ω]', e.text or ''): e.set('mathvariant', 'normal')   # TeX's capital Greek stands upright
        if (a := e.attrib.pop('columnalign', None)) and tag == 'mtd': e.set('style', f'text-align:{a}')
        if tag == 'mspace' and e.get('width') == 'negativethinmathspace': e.set('width', '-0.167em')
    return tree

BIG = set('∑∏∐⋃⋂⨁⨂⨀⋁⋀')
def space(tree):
    "No gaps around bars; a named operator (softmax) stands close to its bracket and apart from a letter."
    for row in tree.iter():
        for before, e, after in zip([None, *row], row, [*row[1:], None]):
            inner = e[0] if len(e) and e.tag.removeprefix('{' + NS + '}') in ARITY else e
            if inner.tag != '{' + NS + '}mo' or not inner.text: continue
            if inner.text in '|‖∥': inner.set('lspace', '0'); inner.set('rspace', '0')
            elif inner.text.replace('\u2009', '').isalpha() and len(inner.text) > 1:
                first = after[0] if after is not None and len(after) else after
                near = first is None or first.text in ('(', '[', '{')
                inner.set('lspace', '0' if before is None or before.tag.endswith(('}mo', '}mspace')) else '0.167em')
                inner.set('rspace', '0' if near else '0.167em')
    return tree

BIG = set('∑∏∐⋃⋂⨁⨂⨀⋁⋀') | {'min', 'max', 'lim', 'sup', 'inf', 'argmin', 'argmax'}
def limits(tree):
    "In a displayed formula the limits of a sum or a minimum stand below and above it, also inside brackets."
    for e in tree.iter():
        kind = {'msub': 'munder', 'msup': 'mover', 'msubsup': 'munderover'}.get(e.tag.removeprefix('{' + NS + '}'))
        if kind and (e[0].text or '').replace('\u2009', '') in BIG: e.tag = '{' + NS + '}' + kind
    return tree

def align(tree):
    "In an `aligned` table the columns come in pairs: right, left, with a gap between pairs."
    for table in tree.iter('{' + NS + '}mtable'):
        for row in table:
            for i, cell in enumerate(row):
                side = 'right' if i % 2 == 0 else 'left'
                cell.set('style', f'text-align:{side};padding-left:{"1.5em" if i and i % 2 == 0 else "0"};padding-right:0')
    return tree

def to_mathml(latex:str, display:bool=False) -> str:
    "A LaTeX formula as one `<math>` element, its source kept as an annotation."
    source, label = latex.strip(), ''
    body = re.sub(r'\\(begin|end)\{(?:aligned|align\*?|gathered|gather\*?|equation\*?)\}', lambda m: rf'\{m[1]}{{split}}', source)
    if 'begin{equation' in source: body = re.sub(r'\\(begin|end)\{split\}', '', body)
    for wrong, right in ((r'\\arg\s*\\(min|max)(?![a-z])', r'\\arg\1'), (r'\\arg(?![a-z])', r'\\operatorname{arg}'), (r'\\([bB]ig+)[lr](?![a-z])', r'\\\1')): body = re.sub(wrong, right, body)
    paired = '{split}' in body
    try: tree = ET.fromstring(convert(body, display='block' if display else 'inline'))
    except ET.ParseError as e: raise MathError("cannot be parsed ('&' outside a table?)") from e
    except Exception as e: raise MathError(f'{type(e).__name__} {e}'.strip()) from e
    space(mend(tree))
    if display: limits(tree)
    if paired: align(tree)
    row = ET.Element('{' + NS + '}semantics')
    row.extend(list(tree))
    note = ET.SubElement(row, '{' + NS + '}annotation', encoding='application/x-tex')
    note.text = source
    tree[:] = [row]
    ET.register_namespace('', NS)
    return ET.tostring(tree, encoding='unicode')
