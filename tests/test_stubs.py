"""The stubs that type checkers and editors read in place of what is made at import."""

import ast

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")

from rlora.write_stubs import STUBS, target

EVERY = pytest.mark.parametrize(("module", "stub"), STUBS, ids=lambda x: x.__name__)


@EVERY
def test_a_stub_is_what_its_writer_gives(module, stub):
    assert target(module).read_text(encoding="utf-8") == stub(), "run python -m rlora.write_stubs"


@EVERY
def test_a_stub_has_every_public_name(module, stub):
    made = {
        node.name
        for node in ast.parse(stub()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    assert made == set(module.__all__)
