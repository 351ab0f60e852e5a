"""DDP, FSDP2 and HSDP against one process, in groups of 2 and 4 real processes."""

import numpy as np
import pytest
import sharded_checkpoints as checkpoints
import sharded_runs as runs
import torch
from torch.distributed.checkpoint import FileSystemReader

world = pytest.mark.parametrize("world", [2, 4])


def assert_equal(found, expected, atol):
    """Compare the results of every process; `found` is a list of dicts."""
    for one in found:
        assert one.keys() == expected.keys()
        for name, x in one.items():
            np.testing.assert_allclose(x, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("maker", "layout", "world"),
    [
        *((maker, "default", 4) for maker in runs.MAKERS),
        *((maker, "columns", 4) for maker in ("adamw", "both", "groups")),
        *((maker, layout, 2) for maker in ("fused", "sgd") for layout in ("default", "columns")),
    ],
)
@pytest.mark.works("FSDP2", "ScaledAdamW, ScaledSGD, `precondition`; uneven shards")
def test_equals_one_process(groups, maker, layout, world):
    """20 steps in float64, so that only the order of sums differs: a few eps, grown by the steps."""
    found = groups(world).run(runs.trained, maker, layout)
    assert_equal(found, runs.trained(maker, None), atol=1e-12)


@pytest.mark.parametrize("maker", ["adamw", "both"])
@pytest.mark.works("FSDP2", "HSDP")
def test_hsdp_equals_one_process(groups, maker):
    """2 replicas of 2 pieces."""
    found = groups(4).run(runs.trained, maker, "hsdp")
    assert_equal(found, runs.trained(maker, None), atol=1e-12)


@pytest.mark.parametrize("maker", ["default", "adamw", "both", "gauss-seidel", "rite", "guarded"])
def test_any_layout_on_a_mesh_of_two_dimensions(groups, maker):
    expected = runs.trained_in_any_layout(maker, sharded=False)
    assert_equal(groups(4).run(runs.trained_in_any_layout, maker, True), expected, atol=1e-12)


def test_experts_on_meshes_of_their_own(groups):
    """The experts of one half of the processes have no gradient, and rest while the others move.

    Those processes plan their steps anew, and all take part in the same collectives.
    """
    expected = [runs.trained_with_experts(half) for half in (0, 1)]
    for i, found in enumerate(groups(4).run(runs.trained_with_experts, None)):
        assert_equal([found], expected[i // 2], atol=1e-12)


def test_a_norm_over_several_meshes_is_refused(groups):
    for said in groups(4).run(runs.norm_over_meshes):
        assert "on 2 device meshes" in said


def test_a_compiled_step_keeps_the_state_of_sharded_pairs(groups):
    """Method classes out of the graph, which DTensors would cut in the middle of their step."""
    expected = runs.trained_compiled(sharded=False)
    assert_equal(groups(2).run(runs.trained_compiled, True), expected, atol=1e-12)


@pytest.mark.parametrize("maker", ["default", "sgd", "rmsprop", "rite"])
def test_a_state_follows_the_layout_of_the_parameters(groups, maker):
    """HSDP's dimensions swapped, rows and columns: each process has the piece that it needs."""
    expected = checkpoints.moved_to_another_layout(maker)
    assert_equal(groups(4).run(checkpoints.moved_to_another_layout, maker), expected, atol=1e-12)


def test_a_pair_without_gradients_is_in_the_checkpoint(groups, tmp_path):
    for found in groups(2).run(checkpoints.resumed_without_gradient, "default", str(tmp_path)):
        assert max(found.values()) < 1e-12, found


def test_a_kernel_that_is_not_contiguous(groups):
    """It is flattened by a copy, which each step makes of the factor as it is."""
    expected = runs.trained_channels_last(sharded=False)
    assert_equal(groups(2).run(runs.trained_channels_last, True), expected, atol=1e-12)


def test_two_dtypes_in_one_group(groups):
    """Sums in other orders: in float32 they round to 1e-6 and more, in float64 to nothing here."""
    expected = runs.trained_two_dtypes(sharded=False)
    for one in groups(2).run(runs.trained_two_dtypes, True):
        assert_equal([one], expected, atol=1e-4)
        wide = [name for name in one if ": 1.lora" in name]
        assert_equal([{x: one[x] for x in wide}], {x: expected[x] for x in wide}, atol=1e-12)


def test_pairs_with_one_whole_factor(groups):
    """Its Gram is counted once, and the other one's is a sum over the processes."""
    expected = runs.trained_with_a_whole_factor(sharded=False)
    assert_equal(groups(2).run(runs.trained_with_a_whole_factor, True), expected, atol=1e-12)


@pytest.mark.parametrize("maker", ["both", "rite"])
@pytest.mark.parametrize("poison", ["0.lora_A.weight", "1.lora_B.weight", "3.lora_A.weight"])
def test_nan_in_one_pair_does_not_touch_another(groups, poison, maker):
    expected = runs.trained_in_any_layout(maker, sharded=False)
    for found in groups(4).run(runs.trained_in_any_layout, maker, True, poison):
        assert np.isnan(found[poison]).any()
        others = {name: x for name, x in found.items() if name[0] != poison[0]}
        assert len(others) == 8
        assert_equal([others], {name: expected[name] for name in others}, atol=1e-12)


@world
@pytest.mark.parametrize("layout", ["default", "columns"])
def test_single_precision_equals_one_process(groups, layout, world):
    found = groups(world).run(runs.trained, "adamw", layout, torch.float32)
    assert_equal(found, runs.trained("adamw", None, torch.float32), atol=1e-6)


@world
@pytest.mark.parametrize("layout", ["default", "columns"])
def test_bfloat16_equals_one_process(groups, layout, world):
    """A Gram's last float32 bit may turn a rounding: two bits of bfloat16 at 1."""
    found = groups(world).run(runs.trained_on_given_gradients, layout, torch.bfloat16)
    expected = runs.trained_on_given_gradients(None, torch.bfloat16)
    assert_equal(found, expected, atol=2**-7)


@pytest.mark.parametrize("layout", ["default", "columns", "hsdp"])
@pytest.mark.parametrize("maker", ["adamw", "rite"])
def test_frozen_factors_and_missing_gradients(groups, maker, layout):
    found = groups(4).run(runs.trained_frozen, maker, layout)
    assert_equal(found, runs.trained_frozen(maker, None), atol=1e-12)


@pytest.mark.parametrize("maker", ["default", "default-gs", "sgd", "nadam", "rite"])
def test_a_factor_frozen_after_its_gradient_steps_once_more(groups, maker):
    """As torch's optimizers step whatever has a gradient."""
    found = groups(2).run(runs.frozen_before_the_step, maker, "default")
    assert_equal(found, runs.frozen_before_the_step(maker, None), atol=1e-12)


def test_a_gradient_missing_on_one_process_counts_as_zeros(groups):
    """Method classes move what any process has a gradient of, in all its pieces."""
    for pieces in groups(4).run(runs.step_with_none_on_one, "rite"):
        for name, changed in pieces.items():
            assert changed == (name.startswith("5.") or "lora_" in name), name


def test_a_gradient_missing_on_one_process_does_not_hang_the_others(groups):
    moved = groups(4).run(runs.step_with_none_on_one, "both")
    for rank, pieces in enumerate(moved):
        for name, changed in pieces.items():
            assert changed == (name.startswith("5.") or ("lora_" in name and rank > 0)), name


@pytest.mark.parametrize("maker", ["rite", "pro", "muon", "alt", "graft"])
def test_axes_shorter_than_the_mesh(groups, maker):
    expected = runs.trained_at_the_edges(maker, sharded=False)
    assert_equal(groups(4).run(runs.trained_at_the_edges, maker, True), expected, atol=1e-12)


def test_without_a_backend_of_torch_factors_are_gathered(groups):
    """The generic class knows no pieces."""
    expected = runs.trained_by_the_generic_backend("rite", None)
    found = groups(2).run(runs.trained_by_the_generic_backend, "rite", "columns")
    assert_equal(found, expected, atol=1e-12)


def test_a_direction_that_is_cut_otherwise_is_refused(groups):
    groups(2).run(runs.refused_cut)


SHAPES = [(16, 20, 4), (32, 16, 4), (64, 10, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_sends(groups, dtype):
    """The upper halves of two Grams a pair; in the default layout A, its gradient and its direction."""
    grams = sum(4 * r * (r + 1) for _, _, r in SHAPES)
    for sent in groups(4).run(runs.traffic, "adamw", "columns", dtype, SHAPES):
        assert sent == [("allreduce", grams)]
    rows = sum(r // 4 * n for n, _, r in SHAPES)
    width = torch.finfo(dtype).bits // 8
    for sent in groups(4).run(runs.traffic, "adamw", "default", dtype, SHAPES):
        moved = [("alltoall_base", rows * size) for size in (width, width, 4)]
        assert sent == [moved[0], ("allreduce", grams), *moved[1:]]
    assert groups(4).run(runs.traffic, "adamw", "ddp", dtype, SHAPES) == [[]] * 4


def test_what_a_step_of_a_method_class_sends(groups):
    """LoRA-RITE: who has a gradient, or a new plan; largest entries and r x r matrices; A, twice."""
    ranks = [(2, 4), (1, 8)]  # (pairs, r)
    grams = [4 * 2 * pairs * r**2 for pairs, r in ranks]
    peaks = [4 * 2 * pairs for pairs, _ in ranks]
    update = [x for peak, gram in zip(peaks, grams, strict=True) for x in (peak, gram, peak, gram)]
    transport = [x for peak, gram in zip(peaks, grams, strict=True) for x in (2 * peak, gram)]
    sizes = [4 * (2 * len(SHAPES) + 1), *update, *transport]
    reduced = [("allreduce", size) for size in sizes]
    for sent in groups(4).run(runs.traffic, "rite", "columns", torch.float32, SHAPES):
        assert sent == reduced
    rows = 4 * sum(r // 4 * n for n, _, r in SHAPES)
    come, go = ("alltoall_base", 2 * rows), ("alltoall_base", rows)
    for sent in groups(4).run(runs.traffic, "rite", "default", torch.float32, SHAPES):
        assert sent == [reduced[0], come, *reduced[1:], go]


@pytest.mark.parametrize("layout", ["columns", "default"])
def test_what_a_step_of_whole_factors_sends(groups, layout):
    """Riemannion: who has a gradient, or a new plan; factors and gradients, padded to one length."""
    a_piece = {"columns": lambda n, r: r * (n // 4), "default": lambda n, r: r // 4 * n}[layout]
    largest = sum(a_piece(n, r) + -(-m // 4) * r for n, m, r in SHAPES)
    for sent in groups(4).run(runs.traffic, "riemannion", layout, torch.float32, SHAPES):
        assert sent == [
            ("allreduce", 4 * (2 * len(SHAPES) + 1)),
            ("allgather_base", 4 * 2 * largest),
        ]


@pytest.mark.parametrize("layout", ["default", "columns"])
@pytest.mark.parametrize("maker", ["rite", "pro", "riemannion"])
def test_a_whole_state_is_cut(groups, maker, layout):
    expected = runs.goes_on_from_one_process(maker, None)
    assert_equal(groups(4).run(runs.goes_on_from_one_process, maker, layout), expected, atol=1e-12)


def test_the_state_of_pieces_is_put_together(groups):
    expected = runs.goes_on_on_one_process("rite", None)
    found = groups(4).run(runs.goes_on_on_one_process, "rite", "default")
    assert_equal(found, expected, atol=1e-12)


@pytest.mark.parametrize("maker", ["adamw", "rite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_keep_the_same_bits(groups, dtype, maker):
    """All of DDP; of HSDP processes 0 and 2, and 1 and 3."""
    assert len({bits for _, bits in groups(4).run(runs.replicas, maker, "ddp", dtype)}) == 1
    pieces = dict(groups(4).run(runs.replicas, maker, "hsdp", dtype))
    assert pieces[0] == pieces[2]
    assert pieces[1] == pieces[3]


@world
@pytest.mark.works("DDP", "every class; replicas bit-equal")
def test_ddp_equals_one_process(groups, world):
    assert_equal(
        groups(world).run(runs.trained, "adamw", "ddp"), runs.trained("adamw", None), 1e-12
    )


def test_other_methods_under_ddp(groups):
    """Replicas equal bit for bit; some methods divide by small numbers, so 1e-12 may grow."""
    found = [values for values, _ in groups(2).run(runs.trained_by_methods, "ddp")]
    assert_equal(found[1:], found[0], atol=0)
    assert_equal(found, runs.trained_by_methods(None)[0], atol=1e-9)


def test_lr_as_a_tensor(groups):
    """It is a plain one, also where the factors that it multiplies are DTensors."""
    found = groups(2).run(runs.trained_at_a_tensor_rate, "default")
    assert_equal(found, runs.trained_at_a_tensor_rate(None), atol=1e-12)


GATHERED = {"AdaPreLoRA", "LoFT", "LoRASB", "OPLoRA", "Riemannion", "ScaledProdigy", "TrustRegion"}
"""Classes that see whole factors."""


@pytest.mark.parametrize("layout", ["default", "columns", "hsdp"])
@pytest.mark.works("FSDP2", "every other class, seven of them on gathered factors")
def test_other_methods_under_fsdp2(groups, layout):
    """In float64, so that only the order of sums differs; moments are shared out.

    All processes together hold each number once; of two replicas, twice.
    """
    found = groups(4).run(runs.trained_by_methods, layout)
    assert_equal([values for values, _ in found], runs.trained_by_methods(None)[0], atol=1e-12)
    shares = [share for _, share in found]
    for name, (_, whole) in shares[0].items():
        copies = 4 if name in GATHERED else 2 if layout == "hsdp" else 1
        assert sum(share[name][0] for share in shares) == copies * whole, name
    assert sum(whole > 0 for _, whole in shares[0].values()) > 10


@pytest.mark.parametrize(("layout", "flat"), [("default", False), ("columns", True)])
@pytest.mark.parametrize(
    ("maker", "dtype"),
    [
        ("adamw", torch.float64),
        ("groups", torch.float64),
        ("sgd", torch.float64),
        ("rite", torch.float64),
        ("pro", torch.float64),
        ("riemannion", torch.float64),
        ("alt", torch.float64),
        ("muon", torch.float64),
        ("ref", torch.float64),
        ("graft", torch.float64),
        ("fused", torch.bfloat16),
        ("nearest", torch.bfloat16),
    ],
)
@pytest.mark.works("FSDP2", "checkpoints resumed on another number of processes")
def test_resume_on_other_numbers_of_processes(groups, tmp_path, maker, layout, flat, dtype):
    there = (str(tmp_path), flat, dtype)
    expected = groups(2).run(checkpoints.save, maker, layout, *there)[0]
    same = groups(2).run(checkpoints.resume, maker, layout, *there)
    assert_equal(same, expected, atol=0)
    if maker == "fused":  # pieces of other sizes are rounded otherwise at random
        return
    atol = 1e-12 if dtype is torch.float64 else 0.02  # bfloat16 gradients: as above
    assert_equal(groups(4).run(checkpoints.resume, maker, layout, *there), expected, atol)
    assert_equal(groups(1).run(checkpoints.resume, maker, None, *there), expected, atol)


@pytest.mark.parametrize("maker", ["adamw", "rite", "riemannion"])
def test_a_checkpoint_has_every_number_once(groups, tmp_path, maker):
    """Also the state that is whole on every process: files hold no second copy."""
    groups(2).run(checkpoints.save, maker, "default", str(tmp_path), False, torch.float64)
    listed = FileSystemReader(tmp_path).read_metadata().storage_data
    assert sum(path.stat().st_size for path in tmp_path.glob("*.distcp")) == sum(
        entry.length for entry in listed.values()
    )
    held = [index.fqn for index in listed if index.fqn.startswith("optimizer.state.")]
    assert any("lora_A" in name for name in held)


@pytest.mark.parametrize("loads_on_one", [False, True])
@pytest.mark.parametrize(("maker", "world"), [("adamw", 2), ("both", 4), ("rite", 2)])
@pytest.mark.works("accelerate", "its FSDP2 plugin")
def test_accelerate_runs_the_same_job(groups, tmp_path, maker, world, loads_on_one):
    """It swaps the parameters of an optimizer that is there already, and resumes in the middle."""
    pytest.importorskip("accelerate")
    there = (torch.float64, str(tmp_path), loads_on_one)
    found = groups(world).run(checkpoints.trained_with_accelerate, maker, *there)
    assert_equal(found, runs.trained(maker, None), atol=1e-12)
