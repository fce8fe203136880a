"""The Sphinx half: MathML, links from names in prose and code to their documentation, source pages, call-outs."""
import html, re
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from mathml import MathError, to_mathml
from pages import page_name
from symbols import Package

log = logging.getLogger(__name__)

# ---- math --------------------------------------------------------------------------------------------------------

def draw(self, node, display):
    try: return to_mathml(node.astext(), display)
    except MathError as e:
        log.warning(f'formula {node.astext()!r}: {e}', location=node, type='math')
        return f'<code>{html.escape(node.astext())}</code>'

def visit_math(self, node):
    self.body.append(f'<span class="math">{draw(self, node, False)}</span>')
    raise nodes.SkipNode

def visit_math_block(self, node):
    ids = ''.join(f'<span id="{i}"></span>' for i in node['ids'])
    number = f'<span class="eqno">({node["number"]})</span>' if node.get('number') else ''
    self.body.append(f'<div class="math" tabindex="0">{ids}{draw(self, node, True)}{number}</div>\n')
    raise nodes.SkipNode

# ---- names -------------------------------------------------------------------------------------------------------

RE_NAME = re.compile(r'[A-Za-z_][\w.]*(\(\))?')

class SymbolLinks(SphinxTransform):
    "A name in backticks links to its documentation, but in titles, links and its own signature."
    default_priority = 500
    def apply(self, **kwargs):
        package, doc = self.app.deformlit, self.env.docname
        module = self.app.home.get(doc)
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext()
            if not RE_NAME.fullmatch(name): continue
            above, at = [], node
            while at := at.parent: above.append(at)
            if any(isinstance(a, (nodes.title, nodes.reference, addnodes.desc_signature, addnodes.pending_xref)) for a in above): continue
            s = package.find(name, module)
            if s is None: continue
            full = s.full if hasattr(s, 'full') else s.name
            if any(isinstance(a, addnodes.desc) and full in (sig.get('module', '') + '.' + sig.get('fullname', '') for sig in a.findall(addnodes.desc_signature)) for a in above): continue
            link = addnodes.pending_xref('', refdomain='py', reftype='obj', reftarget=full, refexplicit=True, refdoc=doc, refwarn=True)
            node.replace_self(link)
            link += node

class CallOuts(SphinxTransform):
    "A block quote that begins with a bold word is a call-out."
    default_priority = 500
    def apply(self, **kwargs):
        for quote in self.document.findall(nodes.block_quote):
            words = [o for o in (quote[0] if len(quote) and isinstance(quote[0], nodes.paragraph) else []) if o.astext()]
            if words and isinstance(words[0], nodes.strong): quote['classes'].append('callout')

def missing(app, env, node, contnode):
    "A symbol that no page describes links to its source; a type in a signature that is not ours stays plain."
    if node.get('refdomain') != 'py': return None
    s = app.deformlit.symbols.get(node['reftarget'])
    if s is not None:
        uri = app.builder.get_relative_uri(node['refdoc'], f"source/{s.module.rpartition('.')[2]}") + f'#L-{s.line}'
        ref = nodes.reference('', '', internal=True, refuri=uri)
        ref += contnode
        return ref
    if node.get('reftype') in ('class', 'obj', 'exc') and not node['reftarget'].startswith(app.deformlit.name + '.'): return contnode

def source_links(app, doctree, docname):
    "A link from each signature to its line in the source page."
    for sig in doctree.findall(addnodes.desc_signature):
        s = app.deformlit.symbols.get(f"{sig.get('module')}.{sig.get('fullname')}")
        if s is None: continue
        uri = app.builder.get_relative_uri(docname, f"source/{s.module.rpartition('.')[2]}") + f'#L-{s.line}'
        ref = nodes.reference('', '', internal=True, refuri=uri, classes=['source-link'])
        ref += nodes.inline('', 'source')
        sig.insert(0, ref)

# ---- names in code -------------------------------------------------------------------------------------------------

RE_TOKEN = re.compile(r'(?<!<span class="o">\.</span>)<span class="(n|nc|nf|ne)">(\w+)</span>(?=(<span class="p">\()?)')
RE_BLOCK = re.compile(r'(<div class="highlight[^>]*>\s*<pre>)(.*?)(</pre>)', re.S)

def uri_of(app, docname, s):
    for o in app.env.domains['py'].objects.items():
        if o[0] == s.full: return app.builder.get_relative_uri(docname, o[1].docname) + '#' + o[1].node_id
    return None

def link_code(app, docname, body, module=None):
    "In Python code, calls of exported functions and names of exported classes link to their documentation."
    uris = {}
    def token(m):
        kind, name, call = m[1], m[2], m[3]
        if not (call or name[0].isupper() or kind in ('nc', 'nf')): return m[0]
        if name not in uris:
            s = app.deformlit.find(name, module)
            uris[name] = s and '.' not in s.name and uri_of(app, docname, s)
        return f'<a class="sym" href="{uris[name]}">{m[0]}</a>' if uris[name] else m[0]
    return RE_BLOCK.sub(lambda m: m[1] + RE_TOKEN.sub(token, m[2]) + m[3], body)

def page_context(app, pagename, templatename, context, doctree):
    if doctree is not None and context.get('body'): context['body'] = link_code(app, pagename, context['body'], app.home.get(pagename))
    context['is_home'] = pagename == app.config.root_doc
    if pagename == 'search' or pagename == 'genindex': context['meta'] = dict(context.get('meta') or {})

# ---- source pages ----------------------------------------------------------------------------------------------------

def source_pages(app):
    "A page per module with its source, each definition linked to the chapter that derives it."
    for m in app.deformlit.modules.values():
        name = f'source/{m.short}'
        up = lambda doc: app.builder.get_relative_uri(name, doc)
        body = highlight(m.source, PythonLexer(), HtmlFormatter(linenos=False, lineanchors='L', cssclass='highlight', wrapcode=False))
        body = re.sub(r'<a id="L-(\d+)" name="L-\d+"(?: href="#L-\d+")?></a>', r'<a id="L-\1" href="#L-\1" class="line-no" aria-label="line \1">\1</a>', body)
        body = link_code(app, name, body, m.name)
        links = [f'<a href="{up("api/" + m.short)}">API</a>']
        if m.page and page_name(m.page) in app.env.found_docs: links.insert(0, f'<a href="{up(page_name(m.page))}">chapter</a>')
        top = f'<h1>{html.escape(m.name)}</h1>\n<p class="chapter-line">Generated from the notebook · {" · ".join(links)}</p>\n'
        yield name, dict(title=m.name, body=f'<div class="module-source highlight-python notranslate">{top}{body}</div>', parents=[], meta={'html_theme.sidebar_secondary.remove': True}), 'page.html'

def begin(app):
    app.deformlit = Package(Path(app.confdir).parent / 'deformlit')
    app.home = {page_name(m.page): m.name for m in app.deformlit.modules.values() if m.page} | {f'api/{m.short}': m.name for m in app.deformlit.modules.values()}

def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
    app.add_config_value('made_from', '', 'env', str)   # a digest: all pages are read again when it changes
    app.connect('builder-inited', begin)
    app.add_transform(SymbolLinks)
    app.add_transform(CallOuts)
    app.connect('missing-reference', missing)
    app.connect('doctree-resolved', source_links)
    app.connect('html-page-context', page_context)
    app.connect('html-collect-pages', source_pages)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=False)
