"""The font of the formulas: STIX Two Math (SIL Open Font License, from the package ziamath), cut down to the characters that the site uses."""
import base64, io, logging, re
from importlib.util import find_spec
from pathlib import Path

from mathml import styled

ALWAYS = set(map(chr, range(0x20, 0x7f))) | set('∑∏∫√()[]{}|‖⌊⌋⌈⌉⟨⟩⏟⏞¯^~˙′″∂∇−×·…')

def characters(html:Path) -> set:
    "All characters inside `<math>` on all pages."
    found = set(ALWAYS)
    for page in html.rglob('*.html'):
        for formula in re.findall(r'<math.*?</math>', page.read_text(encoding='utf-8'), re.S):
            found |= set(formula)
            found |= {styled(c, 'ITALIC') for c in re.findall(r'<mi>(\w)</mi>', formula)}   # browsers write a letter alone in italics
    return found

def write(html:Path):
    "Write `_static/math.css`, the font within it: pages read from a disk may not load font files in every browser."
    from fontTools import subset
    from fontTools.ttLib import TTFont
    logging.getLogger('fontTools').setLevel(logging.ERROR)
    font = TTFont(Path(find_spec('ziamath').origin).parent / 'fonts/STIXTwoMath-Regular.ttf')
    options = subset.Options(layout_features=['ssty', 'rtlm', 'dtls', 'flac'], flavor='woff', notdef_outline=True)
    cut = subset.Subsetter(options)
    cut.populate(unicodes=map(ord, characters(html)))
    cut.subset(font)
    font.flavor = 'woff'
    data = io.BytesIO()
    font.save(data)
    url = 'data:font/woff;base64,' + base64.b64encode(data.getvalue()).decode()
    (html / '_static/math.css').write_text(f'/* STIX Two Math, SIL Open Font License 1.1 */\n@font-face {{ font-family: "Site Math"; src: url({url}) format("woff"); }}\n')
