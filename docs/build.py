"""Build the site: `python docs/build.py`. Notebooks in `nbs/` -> `_proc/` (nbdev) -> `docs/_build/source` -> `docs/_build/html` (Sphinx)."""
import argparse, os, shutil, sys, time
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
sys.path[:0] = [str(here), str(root)]

def tidy(html:Path, source:Path, extra:Path):
    "Remove what an earlier build left of pages that are gone."
    pages = {f.relative_to(source).with_suffix('.html') for f in source.rglob('*')} | {Path('search.html')} | {Path(f'source/{f.stem}.html') for f in (root / 'deformlit').glob('*.py')}
    copies = {f.relative_to(extra) for f in extra.rglob('*')}
    for f in html.rglob('*'):
        name = f.relative_to(html)
        if f.suffix == '.html' and name not in pages or f.suffix in ('.md', '.ipynb') and name not in copies: f.unlink()

def build(out:Path, fresh=False) -> int:
    "Build the site into `out/html`; returns the number of problems."
    os.chdir(root)
    from sphinx.cmd.build import build_main
    import check, pages, mathfont
    start = time.time()
    if fresh: shutil.rmtree(out, ignore_errors=True)
    proc = pages.process(root, fresh)
    source, extra, html = out / 'source', out / 'extra', out / 'html'
    found = pages.stage(root, proc, source, extra)
    print(f'{len(found)} pages staged in {time.time() - start:.0f} s', flush=True)
    if failed := build_main(['-q', '-W', '--keep-going', '-b', 'html', '-c', str(here), '-d', str(out / 'doctrees'), str(source), str(html)]): return failed
    tidy(html, source, extra)
    shutil.copytree(extra, html, dirs_exist_ok=True)
    shutil.rmtree(html / '_sources', ignore_errors=True)
    for made_for_the_theme in html.glob('_static/*-macros.html'): made_for_the_theme.unlink()
    mathfont.write(html)
    report = check.site(html)
    for line in report.problems: print(line, file=sys.stderr)
    print(f'{report} in {time.time() - start:.0f} s: {html / "index.html"}')
    return len(report.problems)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=here / '_build', help='where everything made lies; the site is its folder html')
    p.add_argument('--fresh', action='store_true', help='use nothing from an earlier build')
    a = p.parse_args()
    sys.exit(1 if build(a.out.resolve(), a.fresh) else 0)
