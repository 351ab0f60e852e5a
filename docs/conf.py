"""The site: `make docs`. Needs the extra "docs", torch, jax and optax; no network."""

import sys
from pathlib import Path

import rlora

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project, author = "rlora", "The rlora maintainers"
version = release = rlora.__version__

extensions = [
    "formulas",
    "myst_parser",
    "numpydoc",
    "public_names",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_click",
]
nitpicky = True
default_role = "py:obj"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the sections of the docstrings say the types
autosummary_generate = False
numpydoc_show_class_members = False  # autodoc shows them

html_theme = "furo"
html_title = "rlora"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "html"
html_show_copyright = html_show_sphinx = False
html_copy_source = False
