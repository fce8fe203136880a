"""Check a built site: every link, picture, script and anchor exists, and no page asks another machine for anything."""
import re, sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADS = {('img', 'src'), ('script', 'src'), ('link', 'href'), ('iframe', 'src'), ('source', 'src'), ('video', 'src'), ('audio', 'src'), ('object', 'data'),
         ('embed', 'src'), ('image', 'href'), ('image', 'xlink:href'), ('use', 'href'), ('use', 'xlink:href'), ('form', 'action'), ('video', 'poster')}
RE_CSS_URL = re.compile(r'url\(\s*["\']?([^"\')]+)["\']?\s*\)|@import\s+["\']([^"\']+)["\']')
RE_JS_URL = re.compile(r'(?:fetch|import|importScripts|open|WebSocket|EventSource)\s*\(\s*[^)]*?["\'`](https?:|wss?:|//)|\.src\s*=\s*["\'`](https?:|//)')

class Reader(HTMLParser):
    "Links, loads and anchors of one page."
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.twice, self.css, self.js, self.inside = set(), [], [], set(), [], [], None
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        for key in ('id', 'name') if tag == 'a' else ('id',):
            if v := d.get(key):
                if key == 'id' and v in self.ids: self.twice.add(v)
                self.ids.add(v)
        if tag == 'a' and d.get('href') is not None: self.links.append(d['href'])
        for k, v in attrs:
            if (tag, k) in LOADS and v is not None and not (tag == 'link' and d.get('rel') in ('canonical', 'license')): self.loads.append(v)
            if k == 'srcset' and v: self.loads += [o.split()[0] for o in v.split(',')]
            if k == 'style' and v: self.css.append(v)
        if tag in ('style', 'script'): self.inside = tag
    handle_startendtag = handle_starttag
    def handle_endtag(self, tag): self.inside = None
    def handle_data(self, data):
        if self.inside == 'style': self.css.append(data)
        if self.inside == 'script': self.js.append(data)

@dataclass
class Report:
    pages: int = 0
    links: int = 0
    outside: int = 0
    problems: list[str] = field(default_factory=list)
    def __str__(self): return f'{self.pages} pages, {self.links} internal links checked, {self.outside} outgoing ones counted, {len(self.problems)} problems'

def is_remote(url): return urlsplit(url).scheme in ('http', 'https', 'ws', 'wss', 'ftp') or url.startswith('//')

def site(html:Path) -> Report:
    "Check all pages, style sheets and scripts below `html`."
    html, report = html.resolve(), Report()
    pages = {f.resolve(): Reader(f.read_text(encoding='utf-8')) for f in sorted(html.rglob('*.html'))}
    report.pages = len(pages)
    def say(f, what): report.problems.append(f'{f.relative_to(html)}: {what}')
    def target(f, url):
        "Check one reference from file `f`."
        if urlsplit(url).scheme in ('data', 'mailto', 'javascript', 'tel', 'blob') or not url: return
        report.links += 1
        path, anchor = urldefrag(url)
        path = unquote(path.partition('?')[0])
        to = (f.parent / path).resolve() if path else f
        if to.is_dir(): to = to / 'index.html'
        if html not in to.parents: say(f, f'{url} leads out of the site')
        elif not to.is_file(): say(f, f'{url} does not exist')
        elif anchor and to in pages and unquote(anchor) not in pages[to].ids: say(f, f'{url}: no such anchor')
    def styles(f, text):
        for m in RE_CSS_URL.finditer(text):
            url = m[1] or m[2]
            if is_remote(url): say(f, f'style asks for {url}')
            elif not url.startswith('#'): target(f, url)
    for f, page in pages.items():
        for url in page.links:
            if is_remote(url): report.outside += 1
            else: target(f, url)
        for url in page.loads: say(f, f'asks for {url}') if is_remote(url) else target(f, url)
        for i in sorted(page.twice): say(f, f'two elements have the id {i}')
        for text in page.css: styles(f, text)
        for text in page.js:
            if RE_JS_URL.search(text): say(f, 'a script asks another machine')
    for f in html.rglob('*.css'): styles(f, f.read_text(encoding='utf-8'))
    for f in html.rglob('*.js'):
        if f.name != 'searchindex.js' and RE_JS_URL.search(f.read_text(encoding='utf-8')): say(f, 'asks another machine')
    return report

if __name__ == '__main__':
    r = site(Path(sys.argv[1]))
    print(*r.problems, r, sep='\n')
    sys.exit(bool(r.problems))
