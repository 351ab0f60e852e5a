"""Random input for what reads input: states, records, adapters. Trees of modules: tests/layouts."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from models import make_model, same, train, values

import rlora
from rlora import ShapeError
from rlora.cli.bench.adapters import read_adapter
from rlora.cli.bench.schema import SCHEMA, read_record
from rlora.cli.records import fault
from rlora.torch import LoRAProAdamW, LoRARite, ScaledAdamW

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)


def places(node, path=()):
    """Every path into nested dicts and lists."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in items:
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))
        else:
            yield (*path, key)


@st.composite
def damaged(draw, whole):
    """A copy of nested data with another value, or none, in one to three places."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(found))[1:]))
        node = found
        for key in path[:-1]:
            node = node[key]
        if draw(st.booleans()):
            del node[path[-1]]
        else:
            node[path[-1]] = draw(JSON)
        if not found:
            break
    return found


# --- states --------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
KINDS = [ScaledAdamW, LoRARite, LoRAProAdamW]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_state_of_any_other_shape_is_refused_and_changes_nothing(kind, data):
    model = make_model()
    optimizer = kind(model, lr=1e-2)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    moments = [
        (i, key) for i, held in saved["state"].items() for key, x in held.items() if key != "step"
    ]
    i, key = data.draw(st.sampled_from(moments))
    shape = data.draw(SHAPES.filter(lambda shape: shape != saved["state"][i][key].shape))
    saved["state"][i][key] = torch.zeros(shape)
    with pytest.raises(ShapeError, match="expected"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()["state"]
    assert all(same(before[i], after[i]) for i in before)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_state_that_is_refused_has_changed_nothing(kind, data):
    """Whatever is wrong with it: the next step is that of an optimizer which never saw it."""
    model, twin = make_model(), make_model()
    optimizer, alone = kind(model, lr=1e-2), kind(twin, lr=1e-2)
    train(model, optimizer, 1)
    train(twin, alone, 1)
    bad = data.draw(damaged(optimizer.state_dict()))
    try:
        optimizer.load_state_dict(bad)
    except Exception:
        train(model, optimizer, 1, start=1)
        train(twin, alone, 1, start=1)
    assert same(values(model), values(twin))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_flat_states_are_whole_or_refused(data):
    pair = rlora.Factors(A=np.ones((2, 5)), B=np.ones((3, 2)))
    method = rlora.lora_rite()
    like = method.init(pair)
    flat = rlora.flatten_state(like)
    name = data.draw(st.sampled_from(sorted(flat)))
    shape = data.draw(SHAPES)
    bad = {**flat, data.draw(st.text(max_size=5) | st.just(name)): np.zeros(shape)}
    try:
        found = rlora.flatten_state(rlora.unflatten_state(bad, like))
    except ShapeError:
        assert bad.keys() != flat.keys() or shape != flat[name].shape
    else:
        assert {key: x.shape for key, x in found.items()} == {k: x.shape for k, x in flat.items()}


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


RECORD = json.loads(
    (Path(__file__).parents[1] / "docs/reference/benchmarks/numpy-gpt2-medium.json").read_text()
)
RECORD["rows"] = [{**row, "samples_s": row["samples_s"][:2]} for row in RECORD["rows"][:2]]


@settings(max_examples=150, deadline=None)
@given(bad=damaged(RECORD))
def test_a_record_is_valid_or_refused(folder, bad):
    path = folder / "record.json"
    path.write_text(json.dumps(bad))
    try:
        read = read_record(path)
    except ValueError:
        return
    assert fault(read, SCHEMA) is None
    assert all(math.isfinite(row["median_s"]) for row in read["rows"])


@settings(max_examples=150, deadline=None)
@given(text=st.binary(max_size=60) | JSON.map(lambda x: json.dumps(x).encode()))
def test_what_is_not_a_record_at_all_is_refused(folder, text):
    path = folder / "text.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="is no record of rlora bench"):
        read_record(path)


HEADER = {
    "q.lora_A.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "q.lora_B.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]},
}


@settings(max_examples=150, deadline=None)
@given(header=damaged(HEADER), size=st.integers(0, 80), prefix=st.none() | st.binary(max_size=12))
def test_an_adapter_is_read_as_finite_pairs_or_refused(folder, header, size, prefix):
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text if prefix is None else prefix + text
    path = folder / "x.safetensors"
    path.write_bytes(raw + b"\1" * size)
    try:
        pairs = read_adapter(path)
    except (ValueError, rlora.PairingError):
        return
    assert pairs
    for A, B in pairs:
        assert A.shape[0] == B.shape[1]
        assert np.isfinite(A).all()
        assert np.isfinite(B).all()
