"""The reference's pages: every public name of a module, and links to them from inline code.

``.. public-names:: MODULE`` documents what the module's ``__all__`` says, or without one what it
defines. A thing that several modules offer is described where people take it from, and elsewhere
pointed to.
"""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

HOMES = ("rlora", "rlora.initializers", "rlora.torch", "rlora.optax", "rlora.pairing")
"""Modules in the order in which a thing of several is described: the first that has it."""

OUR_NAME = re.compile(r"rlora(\.[A-Za-z_]\w*)+")
STRANGERS = ("rlora.conventions", "rlora.torch.UnitLoRA")
"""In the shape of our names and none: an entry point, and the class that a how-to makes."""


def public_names(module: ModuleType) -> list[str]:
    """Names in ``__all__``; without one the classes and functions defined there."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]


def home(module: str, name: str, thing: Any) -> str:
    """The full name under which a thing is described."""
    if inspect.isclass(thing) or inspect.isfunction(thing):
        for place in map(import_module, HOMES):
            if name in public_names(place) and getattr(place, name) is thing:
                return f"{place.__name__}.{name}"
    return f"{module}.{name}"


def entry(module: str, name: str) -> Iterator[str]:
    """The lines of reStructuredText for one name."""
    thing, full = getattr(import_module(module), name), f"{module}.{name}"
    described = home(module, name, thing)
    if inspect.ismodule(thing):
        return
    if described != full:
        kind = "class" if inspect.isclass(thing) else "function"
        yield from (f".. py:{kind}:: {name}", f"   :module: {module}", "")
        yield f"   The same as :py:obj:`{described}`."
    elif inspect.isclass(thing):
        kind = "exception" if issubclass(thing, Exception) else "class"
        yield from (f".. auto{kind}:: {full}", "   :members:")
        fields = getattr(thing, "_fields", ())
        if fields and "Parameters\n" in thing.__doc__:  # which says what they are
            yield f"   :exclude-members: {', '.join(fields)}"
    elif inspect.isfunction(thing):
        yield f".. autofunction:: {full}"
    else:
        yield from (f".. autodata:: {full}", "   :no-value:")
    yield ""


class PublicNames(SphinxDirective):
    """A module's docstring, a table of its names, and what each of them is."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the page as one would by hand, and have it parsed."""
        (module,) = self.arguments
        names = public_names(import_module(module))
        table = [".. autosummary::", "   :nosignatures:", ""]
        lines = [f".. automodule:: {module}", "", *table]
        lines += [f"   {name}" for name in names]
        lines += ["", *(line for name in names for line in entry(module, name))]
        return self.parse_text_to_nodes("\n".join(lines))


class LinkCode(SphinxTransform):
    """Inline code that is one of our names leads to its description."""

    default_priority = 5  # before references are resolved

    def apply(self, **_: Any) -> None:
        """Wrap each such literal in a reference."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            linked = isinstance(literal.parent, (nodes.reference, pending_xref, nodes.title))
            if linked or name in STRANGERS or not OUR_NAME.fullmatch(name):
                continue
            reference = pending_xref("", refdomain="py", reftype="obj", reftarget=name)
            reference["refdoc"] = self.env.docname
            literal.replace_self(reference)
            reference += literal


def leave_strangers(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.TextElement | None:
    """Names that are not ours, and parameters, stay code without a link; ours must be found."""
    strange = node["refdomain"] == "py" and not node["reftarget"].startswith("rlora.")
    return content if strange else None


def leave_out_numbers(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Python's own words for the field of a tuple say nothing."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("public-names", PublicNames)
    app.add_transform(LinkCode)
    app.connect("autodoc-process-docstring", leave_out_numbers)
    app.connect("missing-reference", leave_strangers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
