"""The site: its tools on small cases; and, slow, the whole of it: built, its links followed, each page opened in Chromium by itself without a network."""
import fcntl, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'docs'))
for needed in ('sphinx', 'myst_nb', 'pydata_sphinx_theme', 'latex2mathml', 'nbdev'): pytest.importorskip(needed, reason='the packages of the extra `docs` are not installed')

# ---- the tools ------------------------------------------------------------------------------------------------------

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

def test_check_finds_what_is_broken(tmp_path):
    import check
    write(tmp_path / 'b.html', '<h1 id="top">b</h1>')
    write(tmp_path / 'a.html', '<a href="b.html#top">ok</a> <a href="https://example.org">out</a> <img src="data:image/png;base64,AA==">')
    good = check.site(tmp_path)
    assert good.problems == [] and (good.pages, good.outside) == (2, 1)
    broken = ['<a href="c.html">x</a>', '<a href="b.html#no">x</a>', '<a href="#no">x</a>', '<a href="../../etc">x</a>', '<img src="no.png">', '<script src="https://cdn.example.org/x.js"></script>',
              '<link rel="stylesheet" href="//cdn.example.org/x.css">', '<style>@import "https://example.org/x.css";</style>', '<p style="background: url(no.png)">x</p>',
              '<script>fetch("https://example.org/x")</script>', '<p id="a"></p><p id="a"></p>', '<svg><use href="#no"/></svg>']
    for text in broken:
        write(tmp_path / 'a.html', text)
        assert len(check.site(tmp_path).problems) == 1, text
    write(tmp_path / 'a.html', 'a')
    write(tmp_path / 'x.css', 'p { background: url("no.png") } @font-face { src: url(https://example.org/f.woff) }')
    assert len(check.site(tmp_path).problems) == 2

def test_mathml():
    from mathml import MathError, to_mathml
    assert '<mi>𝐱</mi>' in to_mathml(r'\mathbf{x}') and '<mi>ℝ</mi>' in to_mathml(r'\mathbb R') and '<mi>𝜽</mi>' in to_mathml(r'\boldsymbol{\theta}')
    two = to_mathml(r'\begin{aligned} a &= b \\ c &= d \end{aligned}', display=True)
    assert two.count('<mtr>') == 2 and 'text-align:right' in two and 'aligned' in two   # the source is kept as an annotation
    assert '<munderover><mo>∑</mo>' in to_mathml(r'\left[ \sum_{k=1}^K x_k \right]', display=True)
    for wrong in (r'\undefined{x}', r'\frac{1}', r'\left( x', 'a & b'):
        with pytest.raises(MathError): to_mathml(wrong)

SOURCE = '''"""A module."""
__all__ = ['LIMIT', 'f', 'C', 'R']
# %% ../nbs/11_x.ipynb #aa
LIMIT = 3
def f(
    x,             # the first
    y:int=LIMIT,   # the second
    # above the third
    *rest,
    flag='a|b', other=None, # both
) -> 'Tensor':     # what comes back
    "Says `f`."
def _private(): pass
# %% ../nbs/11_x.ipynb #bb
class C(dict):
    "A class."
    def __init__(self, n:int=2): pass
    @property
    def size(self): "How big."
    def run(self, a): "Runs."
from dataclasses import dataclass
@dataclass
class R:
    a: int = 1  # how many
@patch
def later(self:C, b:int): "Added later."
'''

def test_symbols(tmp_path):
    from symbols import Package
    write(tmp_path / 'pkg/x.py', SOURCE)
    p = Package(tmp_path / 'pkg')
    f = p.find('f()')
    assert [(o.name, o.type, o.default, o.text) for o in f.params] == [('x', '', '', 'the first'), ('y', 'int', 'LIMIT', 'the second'), ('*rest', '', '', 'above the third'), ('flag', '', "'a|b'", 'both'), ('other', '', 'None', 'both')]
    assert (f.returns.type, f.returns.text, f.page, f.full) == ("'Tensor'", 'what comes back', '11_x.ipynb', 'pkg.x.f')
    assert p.find('LIMIT').kind == 'data' and p.find('C.size').kind == 'property' and p.find('C.later').kind == 'method' and p.find('x.C') is p.find('pkg.x.C') is p.find('C')
    assert [o.name for o in p.find('C').params] == ['n'] and [o.text for o in p.find('R').params] == ['how many']
    assert p.find('_private') is None and p.find('nothing') is None and p.find('pkg.x').doc == 'A module.'

def test_folders_of_notebooks():
    "Notebooks in folders have their own place in the contents, and links out of the folder."
    import pages
    from types import SimpleNamespace as page
    toc = pages.contents([page(part=4, number=41, title='K', name='k', notebook='41_k.ipynb'), page(part=None, title='Start', name='index', notebook='index.ipynb'),
                          page(part=None, title='Fast', name='bench/speed', notebook='bench/speed.ipynb'), page(part=None, title='T', name='tutorials/t', notebook='tutorials/01_t.ipynb'), page(part=None, title='P', name='parity', notebook='parity.ipynb'), page(part=None, title='O', name='other', notebook='other.ipynb')])
    assert [(o[0], o[2]) for o in toc] == [('4 · Kernels', ['41 K <k>']), ('Tutorials', ['tutorials/t']), ('Measurements', ['bench/speed', 'parity']), ('More', ['other'])]
    assert pages.relink('[a](../11_multiscale.ipynb#The-loop) [b](bench/speed.ipynb)') == '[a](../multiscale.ipynb#the-loop) [b](bench/speed.ipynb)'

def test_markdown():
    import pages
    assert pages.relink('[a](11_multiscale.ipynb#The-loop) `[b](11_multiscale.ipynb)` [c](../02_points.ipynb)') == '[a](multiscale.ipynb#the-loop) `[b](11_multiscale.ipynb)` [c](../points.ipynb)'
    assert pages.relink('[x](https://example.org/A#Big)') == '[x](https://example.org/A#Big)'
    assert '{.doors}\n- **Read.**' in pages.doors('## Three doors\n\n- **Read.** x\n- **Run.** y')
    assert pages.quiet('h*w of `a*b`, $5') == r'h\*w of `a*b`, \$5'

# ---- the site ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site built once from nothing, also with several workers."
    base = tmp_path_factory.getbasetemp()
    if os.environ.get('PYTEST_XDIST_WORKER'): base = base.parent
    out, done = base / 'site', base / 'site.json'
    with open(base / 'site.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            r = subprocess.run([sys.executable, 'docs/build.py', '--fresh', '--out', str(out)], cwd=ROOT, capture_output=True, text=True)
            done.write_text(json.dumps([r.returncode, r.stdout[-6000:] + r.stderr[-12000:]]))
    code, log = json.loads(done.read_text())
    assert code == 0, log
    return out / 'html'

@pytest.mark.slow
def test_site_is_whole(site):
    import check
    report = check.site(site)
    assert report.problems == [] and report.pages > 5
    notebooks = [p for p in (ROOT / 'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(ROOT / 'nbs').parts)]
    from pages import page_name
    for p in notebooks: assert (site / (page_name(p.relative_to(ROOT / 'nbs').as_posix()) + '.html')).is_file(), p
    for m in (ROOT / 'deformlit').glob('[a-z]*.py'): assert (site / f'api/{m.stem}.html').is_file() and (site / f'source/{m.stem}.html').is_file()
    listed = re.findall(r'\]\(([^)]+)\)', (site / 'llms.txt').read_text())
    assert listed and all((site / o).is_file() for o in listed)

@pytest.fixture(scope='session')
def chromium(tmp_path_factory):
    "Chromium with the network cut off, driven by Selenium."
    webdriver = pytest.importorskip('selenium.webdriver')
    binary, driver = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None), shutil.which('chromedriver')
    if not binary or not driver: pytest.skip('needs chromium and chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for o in ('headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync disable-dev-shm-usage '
              'proxy-server=127.0.0.1:9 host-resolver-rules=MAP\t*\t~NOTFOUND').split(' '): options.add_argument('--' + o.replace('\t', ' '))
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    d = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield d
    d.quit()

def look(d, url, width, dark):
    "Open a page as a screen of this width sees it; what is wrong with it."
    d.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 600))
    d.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')]))
    d.get(url)
    wrong = []
    total, inner, theme, ready = d.execute_script('return [document.scrollingElement.scrollWidth, innerWidth, document.documentElement.dataset.theme, document.readyState]')
    if max(total, inner) > width: wrong.append(f'{max(total, inner)} px wide')
    if theme != ('dark' if dark else 'light'): wrong.append(f'theme {theme}')
    clipped = d.execute_script('''return [...document.querySelectorAll('article pre, article table, article img, article svg, article math')].filter(e => {
        const r = e.getBoundingClientRect(); if (!r.width || r.right <= innerWidth + 1) return false;
        for (let p = e; p && p.tagName != 'ARTICLE'; p = p.parentElement) if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
        return true; }).map(e => e.tagName + ' ' + e.outerHTML.slice(0, 120))''')
    wrong += [f'cut off: {o}' for o in clipped]
    wrong += [o['message'] for o in d.get_log('browser') if o['level'] in ('SEVERE', 'WARNING') and '[PST]' not in o['message']]
    for o in d.get_log('performance'):
        m = json.loads(o['message'])['message']
        if m['method'] == 'Network.requestWillBeSent' and not re.match('file:|data:|blob:|about:|chrome', u := m['params']['request']['url']): wrong.append(f'asks for {u}')
    return wrong

@pytest.mark.slow
def test_looking_sees_mistakes(chromium, tmp_path):
    head = '<meta name="viewport" content="width=device-width, initial-scale=1"><script>document.documentElement.dataset.theme = "light"</script>'
    for body, said in {'<p>fine</p>': '', '<p style="width: 900px">x</p>': 'px wide', '<img src="http://example.org/x.png">': 'asks for http://example.org/x.png', '<script>nothing()</script>': 'nothing is not defined',
                       '<article style="overflow: hidden"><pre style="width: 900px">x</pre></article>': 'cut off: PRE'}.items():
        write(tmp_path / 'x.html', head + body)
        wrong = look(chromium, (tmp_path / 'x.html').as_uri(), 375, False)
        assert any(said in o for o in wrong) if said else not wrong, (body, wrong)

@pytest.mark.slow
@pytest.mark.parametrize('width, dark', [(375, False), (375, True), (1280, False), (1280, True)])
def test_pages_in_chromium(site, chromium, width, dark):
    "No page scrolls sideways, cuts anything off, reports an error or asks another machine."
    wrong = {}
    for f in sorted(site.rglob('*.html')):
        if problems := look(chromium, f.as_uri(), width, dark): wrong[f.relative_to(site).as_posix()] = problems
    assert not wrong, json.dumps(wrong, indent=1)

@pytest.mark.slow
def test_search_reads_from_disk(site, chromium):
    from selenium.webdriver.support.ui import WebDriverWait
    chromium.get((site / 'search.html').as_uri() + '?q=attention')
    found = WebDriverWait(chromium, 20).until(lambda d: d.find_elements('css selector', '#search-results li a'))
    assert found
    assert not [o for o in chromium.get_log('browser') if o['level'] == 'SEVERE']
