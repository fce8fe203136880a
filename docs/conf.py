"""Sphinx settings. The source folder is written by `pages.stage`; run `python docs/build.py`."""
import hashlib, sys
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))

project = 'deformlit'
author = 'the deformlit authors'
copyright = author
extensions = ['myst_nb', 'ext']
templates_path = [str(here / '_templates')]
exclude_patterns = []
nitpicky = True
made_from = hashlib.sha256(b''.join(f.read_bytes() for f in sorted([*here.glob('*.py'), *here.parent.glob('deformlit/*.py')]))).hexdigest()
smartquotes_action = 'qe'

# notebooks
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block', 'deflist', 'html_image']
myst_heading_anchors = 4
myst_update_mathjax = False

# Python signatures
add_module_names = False
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
toc_object_entries_show_parents = 'hide'

# html
html_theme = 'pydata_sphinx_theme'
html_title = 'deformlit'
html_static_path = [str(here / '_static')]
html_css_files = ['math.css', 'custom.css']
html_js_files = [('local.js', {'priority': 300})]
html_logo = str(here / '_static/logo.svg')
html_favicon = str(here / '_static/favicon.svg')
html_math_renderer = 'mathml'
html_copy_source = False
html_show_sourcelink = False
html_use_index = False
html_domain_indices = False
html_permalinks_icon = '#'
html_sidebars = {'**': ['contents.html']}
html_context = dict(default_mode='auto')
html_theme_options = dict(
    logo=dict(text='deformlit', image_light=str(here / '_static/logo.svg'), image_dark=str(here / '_static/logo.svg')),
    navbar_start=['navbar-logo'], navbar_center=[], navbar_end=['theme-switcher'], navbar_persistent=['search-button-field'],
    article_header_start=[], secondary_sidebar_items=['page-toc'], primary_sidebar_end=[], footer_start=['foot.html'], footer_end=[],
    search_bar_text='Search', show_toc_level=2, back_to_top_button=False, pygments_light_style='tango', pygments_dark_style='nord',
)
