"""Random module trees under hostile names: pairs stay in their layer and adapter."""

import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import rlora.torch

WORDS = [
    "q_proj", "lora_A", "lora_B", "lora", "mylora_A", "lora_A_proj", "down", "up", "base_layer",
    "lora_layer", "0", "weight", "experts_list", "lora_embedding",
]  # fmt: skip
ADAPTERS = ["default", "lora_A", "lora_B", "weight", "a", "1", "lora_A_b"]

STYLES = {
    "PEFT": ("lora_A", "lora_B", True),
    "loralib": ("lora_A", "lora_B", False),
    "kohya": ("lora_down", "lora_up", True),
    "torchtune": ("lora_a", "lora_b", True),
}


class Leaf(nn.Module):
    """A LoRA layer whose every pair has a rank, an input and an output side of its own."""

    def __init__(self, style, adapters, sizes):
        super().__init__()
        a, b, modules = STYLES[style]
        self.truth = []
        for adapter in adapters:
            r, n, m = sizes
            A, B = torch.ones(r, n), torch.ones(m, r)
            if style == "PEFT":
                for word, x in ((a, A), (b, B)):
                    if not hasattr(self, word):
                        self.add_module(word, nn.ModuleDict())
                    getattr(self, word).add_module(adapter, holder(x))
                self.truth.append((f"{a}.{adapter}.weight", f"{b}.{adapter}.weight"))
            elif modules:
                self.add_module(a, holder(A))
                self.add_module(b, holder(B))
                self.truth = [(f"{a}.weight", f"{b}.weight")]
            else:
                self.register_parameter(a, nn.Parameter(A))
                self.register_parameter(b, nn.Parameter(B))
                self.truth = [(a, b)]


def holder(x):
    module = nn.Module()
    module.weight = nn.Parameter(x)
    return module


@st.composite
def trees(draw):
    """A tree and the names of its pairs; equal shapes everywhere, so that only names can tell."""
    sizes = draw(st.sampled_from([(2, 7, 5), (3, 3, 3), (2, 4, 4)]))
    root, truth = nn.Module(), set()
    paths = draw(
        st.lists(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(tuple),
            min_size=1, max_size=5, unique=True,
        )
    )  # fmt: skip
    for path in paths:
        if any(
            path[: len(other)] == other or other[: len(path)] == path
            for other in paths
            if other != path
        ):
            continue  # a layer inside of a layer, or two on one path
        style = draw(st.sampled_from(sorted(STYLES)))
        adapters = draw(st.lists(st.sampled_from(ADAPTERS), min_size=1, max_size=3, unique=True))
        leaf, place = Leaf(style, adapters, sizes), root
        for word in path[:-1]:
            if word not in place._modules:
                place.add_module(word, nn.Module())
            place = place._modules[word]
        place.add_module(path[-1], leaf)
        prefix = ".".join(path)
        truth |= {(f"{prefix}.{a}", f"{prefix}.{b}") for a, b in leaf.truth}
    return root, truth


def found(report):
    return {(pair.a, pair.b) for pair in report}


@settings(max_examples=200, deadline=None)
@given(trees(), st.randoms(use_true_random=False))
def test_pairs_never_cross(tree, random):
    """Every pair found is true, in any order of the parameters; the others are in the report."""
    root, truth = tree
    named = list(root.named_parameters())
    report = rlora.torch.find_pairs(root)
    assert found(report) <= truth
    factors = {name for pair in report for name in (pair.a, pair.b)}
    assert factors | set(report.plain) | set(report.refused) == {name for name, _ in named}
    random.shuffle(named)
    assert found(rlora.torch.find_pairs(named)) == found(report)


@settings(max_examples=200, deadline=None)
@given(trees())
def test_all_are_found_under_names_that_read_one_way(tree):
    root, truth = tree
    clear = {(a, b) for a, b in truth if sum(word in FACTORS for word in a.split(".")) == 1}
    report = rlora.torch.find_pairs(root)
    assert clear <= found(report)


FACTORS = {"lora_A", "lora_B", "lora_down", "lora_up", "lora_a", "lora_b"}


@settings(max_examples=100, deadline=None)
@given(trees(), st.sampled_from(ADAPTERS))
def test_one_adapter(tree, adapter):
    root, truth = tree
    try:
        report = rlora.torch.find_pairs(root, adapter=adapter)
    except rlora.PairingError:  # only where there is none
        assert adapter not in {pair.adapter for pair in rlora.torch.find_pairs(root)}
        return
    assert all(adapter in pair.a.split(".") for pair in report)
    assert found(report) <= truth


@settings(max_examples=100, deadline=None)
@given(trees())
def test_shared_layers_count_once(tree):
    """A layer at two places of the tree has two names and one pair."""
    root, _ = tree
    twice = nn.Module()
    twice.first = root
    twice.second = root
    report = rlora.torch.find_pairs(twice)
    assert len(report) == len(rlora.torch.find_pairs(root))


def test_layers_called_like_factors():
    """An adapter has no dot in its name, so that what is around its factors is their layer."""
    root = nn.Module()
    for word in ("lora_A", "lora_B"):
        root.add_module(word, Leaf("PEFT", ["default"], (3, 3, 3)))
    truth = {(f"{x}.lora_A.default.weight", f"{x}.lora_B.default.weight") for x in root._modules}
    assert found(rlora.torch.find_pairs(root)) == truth
