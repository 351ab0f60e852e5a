"""Formulas as HTML: no script, no network, and no font that a telephone may lack."""

from pathlib import Path

from docutils import nodes
from docutils.utils.math import math2html
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

STYLE = Path(math2html.__file__).parents[2] / "writers" / "html5_polyglot" / "math.css"

logger = logging.getLogger(__name__)


def html(node: nodes.math | nodes.math_block, *, display: bool) -> str:
    """Docutils' rendering; what it does not know is a warning."""
    math2html.DocumentParameters.displaymode = display
    found = math2html.math2html(node.astext())
    if 'class="unknown"' in found:
        logger.warning("unknown command in the formula %r", node.astext(), location=node)
    return found


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    writer.body.append(f'<span class="formula">{html(node, display=False)}</span>')
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """A formula of its own."""
    writer.body.append(f'<div class="formula">{html(node, display=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("html", (inline, None), (block, None))
    app.connect("config-inited", lambda _, config: config.html_static_path.append(str(STYLE)))
    app.add_css_file(STYLE.name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
