"""The workload of strings: tasks, base, stacks of runs, the command, and the tables of regret."""

import math

import pandas as pd
import pytest
import torch

from rlora import Factors
from rlora.cli.study import (
    comparisons,
    regret,
    runner,
    slopes,
    stacked_methods,
    stacks,
    strings,
    transformer,
)
from rlora.cli.study.plan import Records
from rlora.cli.study.sweeps import best_of, runs_of, scores, sweeps_of
from rlora.cli.study.train import Job
from rlora.cli.study.workloads import Place

JOB = Job("strings", "cipher", 4, "adamw", 8e-3, 0, 12, tested=False)

ORACLES = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "rise": sorted,
    "increment": lambda x: [0 if d == 9 else d + 1 for d in x],
    "rotate": lambda x: x[1:] + x[:1],
    "halves": lambda x: x[3:] + x[:3],
    "highest": lambda x: [max(x[: i + 1]) for i in range(len(x))],
    "fall": lambda x: sorted(x)[::-1],
    "cipher": lambda x: [int("3819062574"[d]) for d in x],
    "reverse_plus_three": lambda x: [int("3456789012"[d]) for d in x[::-1]],
    "lowest": lambda x: [min(x[: i + 1]) for i in range(len(x))],
    "exchange": lambda x: [{0: 2, 2: 0}.get(d, d) for d in x],
}
"""Each rule once more, for one list of digits."""


# --- tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*strings.KNOWN, *strings.NEW])
def test_every_label_is_what_the_rule_says(task):
    numbers = torch.randint(10**6, (200,), generator=torch.Generator().manual_seed(0))
    prompts = strings.digits_of(numbers)
    answers = {**strings.KNOWN, **strings.NEW}[task](prompts)
    assert answers.tolist() == [ORACLES[task](x) for x in prompts.tolist()]


def test_new_tasks_are_no_known_ones():
    prompts = strings.digits_of(torch.arange(0, 10**6, 997))
    answers = [rule(prompts) for rule in (*strings.KNOWN.values(), *strings.NEW.values())]
    for i, mine in enumerate(answers):
        assert all((mine != other).any() for other in answers[:i])


@pytest.mark.parametrize("dataset", strings.DATASETS)
def test_parts_share_no_prompt_and_only_training_is_noisy(dataset):
    setting = strings.DATASETS[dataset]
    parts = strings.parts_of(setting)
    prompts = {p: x.tokens[:, 1 : 1 + strings.LENGTH].tolist() for p, x in parts.items()}
    flat = [tuple(x) for mine in prompts.values() for x in mine]
    assert len(set(flat)) == len(flat) == setting.examples + 2 * strings.HELD_OUT
    wrong = {
        part: (parts[part].answers != torch.tensor([*map(ORACLES[setting.task], mine)]))
        for part, mine in prompts.items()
    }
    assert not wrong["validation"].any()
    assert not wrong["test"].any()
    # A digit drawn at random is right once in ten; five standard deviations of 24576 draws.
    assert float(wrong["train"].double().mean()) == pytest.approx(0.9 * setting.noise, abs=0.01)


def test_strings_are_task_prompt_equals_and_all_but_the_last_digit():
    prompt, answer = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[6, 5, 4, 3, 2, 1]])
    tokens, answers = strings.examples_of("reverse", prompt, answer)
    assert tokens.tolist() == [[strings.TOKENS["reverse"], 1, 2, 3, 4, 5, 6, 10, 6, 5, 4, 3, 2]]
    assert answers.tolist() == answer.tolist()


# --- the transformer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    return transformer.new_weights(transformer.SMALL, torch.Generator().manual_seed(0))


@pytest.fixture
def adapters(weights):
    """Two runs, with a B that is not zero."""
    generator = torch.Generator().manual_seed(1)
    runs = [transformer.new_adapters(weights, 3, 1.0, generator) for _ in range(2)]
    return {
        name: Factors(
            torch.cat([run[name].A for run in runs]),
            0.1 * torch.randn(2, len(weights[name]), 3, generator=generator),
        )
        for name in runs[0]
    }


def test_a_training_step_on_the_mixture_teaches_the_base():
    made = [
        transformer.trained(transformer.SMALL._replace(steps=steps), torch.device("cpu"))
        for steps in (1, 40, 40)
    ]
    tokens, answers = strings.mixture(64, torch.Generator().manual_seed(9))
    first, later, again = (
        float(
            transformer.losses(transformer.logits(transformer.SMALL, x, tokens, {}, 0.0), answers)
        )
        for x in made
    )
    assert later == again < 0.9 * first


def test_scores_do_not_see_the_digits_they_are_of(weights):
    """So the likeliest digit after the right ones is what greedy decoding says."""
    tokens, _ = strings.mixture(1, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -2:] = (changed[:, -2:] + 1) % 10
    here, there = (
        transformer.logits(transformer.SMALL, weights, x, {}, 0.0) for x in (tokens, changed)
    )
    assert torch.equal(here[:, :-2], there[:, :-2])
    assert not torch.allclose(here[:, -2:], there[:, -2:])


def test_adapters_of_a_run_do_what_they_do_when_merged(weights, adapters):
    tokens = strings.mixture(2, torch.Generator().manual_seed(0)).tokens
    both = transformer.logits(
        transformer.SMALL, weights, torch.stack([tokens, tokens]), adapters, 2.0
    )
    for k in range(2):
        merged = {n: weights[n] + 2.0 * pair.B[k] @ pair.A[k] for n, pair in adapters.items()}
        alone = transformer.logits(transformer.SMALL, {**weights, **merged}, tokens, {}, 0.0)
        # Another order of sums in float32, of scores around 1.
        torch.testing.assert_close(both[k], alone, rtol=1e-4, atol=1e-4)


def test_the_loss_and_its_gradients_are_those_of_whole_blocks(weights, adapters):
    """Every block over every position, of whose scores those of the answers are kept at the end."""
    functional = torch.nn.functional
    wide = {name: weight.double() for name, weight in weights.items()}
    pairs = {n: Factors(*(x.double().requires_grad_() for x in p)) for n, p in adapters.items()}
    leaves = [factor for pair in pairs.values() for factor in pair]
    tokens, answers = (x.view(2, -1, x.shape[-1]) for x in strings.mixture(4, torch.Generator()))

    def normal(x):
        return functional.layer_norm(x, (transformer.SMALL.width,))

    def plain(k):
        def linear(name, x):
            return x @ (wide[name] + 2.0 * pairs[name].B[k] @ pairs[name].A[k]).T

        x = wide["tokens"][tokens[k]] + wide["positions"]
        for block in range(transformer.SMALL.blocks):
            qkv = (
                linear(f"{block}.{name}", normal(x)).unflatten(-1, (transformer.SMALL.heads, -1))
                for name in ("query", "key", "value")
            )
            mixed = functional.scaled_dot_product_attention(
                *(y.transpose(1, 2) for y in qkv), is_causal=True
            )
            x = x + linear(f"{block}.output", mixed.transpose(1, 2).flatten(-2))
            x = x + linear(f"{block}.down", functional.relu(linear(f"{block}.up", normal(x))))
        scores = (normal(x) @ wide["digits"].T)[:, -strings.LENGTH :]
        return functional.cross_entropy(scores.flatten(0, 1), answers[k].flatten())

    whole = torch.stack([plain(0), plain(1)])
    found = transformer.losses(
        transformer.logits(transformer.SMALL, wide, tokens, pairs, 2.0), answers
    )
    torch.testing.assert_close(found, whole)
    expected = torch.autograd.grad(whole.sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad(found.sum(), leaves), expected, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs)


def test_a_widened_block_is_the_same_function(weights):
    wide = transformer.widened(weights, 1, 4)
    assert wide["1.up"].shape[0] == wide["1.down"].shape[1] == 4 * transformer.SMALL.hidden
    tokens = strings.mixture(2, torch.Generator().manual_seed(0)).tokens
    here, there = (
        transformer.logits(transformer.SMALL, x, tokens, {}, 0.0) for x in (weights, wide)
    )
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)  # other sums in float32


# --- stacks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The file of a base of few steps."""
    file = tmp_path_factory.mktemp("strings") / "x.pt"
    stacks.load("cipher", kept=file, quick=True)
    return file


def test_a_run_is_the_same_alone_and_in_a_stack(kept):
    workload = stacks.load("cipher", kept=kept, quick=True)
    jobs = [
        JOB._replace(lr=lr, seed=seed, method="scaled", dataset=dataset, tested=True)
        for lr, seed, dataset in (
            *((8e-3, 0, "cipher"), (2e-3, 1, "cipher")),
            *((8e-3, 0, "fall-few"), (8e-3, 2, "fall-large-start")),
        )
    ]
    for job, row in zip(jobs, workload.run(jobs), strict=True):
        (alone,) = workload.run([job])
        assert {k: row[k] for k in Job._fields} == job._asdict()
        # Products of a stack sum in another order; twelve steps do not magnify that.
        assert row["validation"][0][1] == pytest.approx(alone["validation"][0][1], rel=1e-3)
        assert row["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-3)
    assert len({row["validation"][0][1] for row in workload.run(jobs)}) == len(jobs)


def test_a_run_that_diverges_leaves_the_others_as_they_were(kept):
    workload = stacks.load("cipher", kept=kept, quick=True)
    calm, wild = JOB, JOB._replace(lr=1e6)
    rows = workload.run([calm, wild])
    assert rows[1]["diverged"]
    assert rows[1]["validation"] == []
    assert rows[1]["exact"] == 0
    assert not rows[0]["diverged"]
    alone = workload.run([calm])[0]["validation"][0][1]
    assert rows[0]["validation"][0][1] == pytest.approx(alone, rel=1e-3)  # as above


def test_starts_and_dtypes_are_those_of_the_setting(kept):
    usual, large, narrow = (
        stacks.load(x, kept=kept, quick=True).adapters(
            [JOB._replace(dataset=x, seed=seed) for seed in (0, 1)]
        )["0.query"]
        for x in ("fall", "fall-large-start", "fall-bfloat16")
    )
    assert torch.equal(large.A, 8 * usual.A)
    assert narrow.A.dtype == narrow.B.dtype == torch.bfloat16
    assert not torch.equal(usual.A[0], usual.A[1])
    assert not usual.B.any()


@pytest.mark.parametrize("name", stacked_methods.METHODS)
def test_every_method_learns(kept, name):
    workload = stacks.load("cipher", kept=kept, quick=True)
    start = workload.evaluate(workload.adapters([JOB]), [JOB], "validation")[0]["loss"]
    rate = stacked_methods.METHODS[name].rates[:3][-1]
    (row,) = workload.run([JOB._replace(method=name, lr=rate, steps=30)])
    assert row["validation"][0][1] < start


def test_runs_of_a_stack_have_one_method_and_one_kind_of_task():
    jobs = [
        JOB._replace(dataset=d, method=c, lr=1e-3 * k, seed=s)
        for d in ("cipher", "fall-few", "fall-large-start", "fall-bfloat16", "fall-batch-32")
        for c in ("adamw", "scaled")
        for k in range(1, 4)
        for s in (0, 1)
    ]
    made = stacks.together(jobs, 16)
    assert sorted(job for stack in made for job in stack) == sorted(jobs)
    assert all(len(stack) <= 16 for stack in made)
    assert all(len({job.method for job in stack}) == 1 for stack in made)
    kinds = [{strings.DATASETS[job.dataset].kind for job in stack} for stack in made]
    assert all(len(kind) == 1 for kind in kinds)
    assert any(len({job.dataset for job in stack}) == 3 for stack in made)


def test_the_size_of_a_base_is_that_of_its_weights(tmp_path):
    """Rounded to three digits; rounding differs between processors, in 1000 steps too."""
    workload = stacks.load("cipher", kept=tmp_path / "x.pt")
    sizes = workload.sizes().values()
    mean = workload.kind.scaling * sum(sizes) / len(sizes)
    assert mean == pytest.approx(transformer.SMALL.size, rel=0.02)


def test_stacks_are_larger_on_a_device_and_long_runs_come_first(tmp_path):
    jobs = [JOB._replace(seed=k) for k in range(300)] + [JOB._replace(steps=50)]
    for device, largest in (("cpu", 16), ("cuda:1", 256)):
        made = runner.stacks_of(Place("strings", tmp_path, device=device), jobs)
        assert max(map(len, made)) == largest
        assert made[0] == [jobs[-1]]
        assert sorted(job for stack in made for job in stack) == sorted(jobs)


def test_a_device_that_is_not_there_is_refused_before_the_first_run(tmp_path, refused):
    for device in ("gpu", "cuda:99"):
        message = refused(
            *("study", "--model", "strings", "--device", device, "--output", tmp_path)
        )
        assert f"no device '{device}' here" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--weights", "--data"])
def test_what_a_small_model_has_itself_is_refused(option, tmp_path, refused):
    message = refused("study", "--model", "digits", option, "some", "--output", tmp_path)
    assert f"digits has weights and data of its own; leave {option} out" in message


def test_digits_on_a_device_are_refused(tmp_path, refused):
    message = refused("study", "--model", "digits", "--device", "meta", "--output", tmp_path)
    assert "digits runs on a CPU alone, got device 'meta'" in message


# --- the command -------------------------------------------------------------------------------------


def test_the_time_of_a_stack_is_not_that_of_the_first_steps_in_a_process(kept, monkeypatch):
    workload = stacks.load("cipher", kept=kept, quick=True)
    clock, costs = [0.0], [100.0, 2.0]

    def train(jobs):
        clock[0] += costs.pop(0)

    monkeypatch.setattr(workload, "train", train)
    monkeypatch.setattr(stacks.time, "perf_counter", lambda: clock[0])
    assert workload.seconds([JOB._replace(steps=2 * stacks.TRIAL)]) == 4.0


def test_a_quick_study_says_its_time_first_and_goes_on_where_it_was(tmp_path, rlora_cli):
    arguments = ("study", "--model", "strings", "--quick", "--processes", 1, "--output", tmp_path)
    arguments = (*arguments, "--dataset", "cipher", "--dataset", "exchange", "--rank", 2)
    done = rlora_cli(*arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [lines[0].split()[1:], lines[1].split()[0]] == [["runs", "to", "do"], "about"]
    rows = Records(tmp_path / "strings-exchange.jsonl").rows
    assert {job.method for job in rows} == {"adamw", "scaled"}
    table = (tmp_path / "best_losses.csv").read_text()
    assert "\nexchange,2,8,scaled," in table
    again = rlora_cli(*arguments)
    assert "to do" not in again.stdout
    assert (tmp_path / "best_losses.csv").read_text() == table


# --- tables ------------------------------------------------------------------------------------------


def rows_of(method, losses, dataset="cipher", rank=4, exact=0.5):
    """Records of a sweep: learning rate -> loss."""
    return [
        {
            **JOB._replace(method=method, dataset=dataset, rank=rank, lr=lr)._asdict(),
            "diverged": math.isinf(loss),
            "validation": [[12, loss]],
            "exact": exact,
        }
        for lr, loss in losses.items()
    ]


def sweeps_in(rows):
    return sweeps_of(runs_of(rows))


def cells(table, **wanted):
    """The other cells of the one row that has these."""
    (row,) = (row for row in table.to_dict("records") if row.items() >= wanted.items())
    return [cell for head, cell in row.items() if head not in wanted]


def test_regret_is_against_the_baseline_tuned_for_each_setting():
    """By hand: rate 2 has the lowest mean, 0.4; regrets 0.3 - 0.2 and 0.5 - 0.6."""
    sweeps = sweeps_in(
        rows_of("adamw", {1.0: 0.2, 2.0: 0.9})
        + rows_of("adamw", {1.0: math.inf, 2.0: 0.6}, "fall")
        + rows_of("scaled", {1.0: 0.1, 2.0: 0.3, 8.0: 0.45})
        + rows_of("scaled", {1.0: 9.0, 2.0: 0.5, 4.0: 0.0, 8.0: 0.45}, "fall")
    )
    found = cells(regret.one_rate(sweeps), method="scaled")
    assert found == ["2", 2, 1, 1, 1, "+0.000", "+0.000", "+0.100", "50", "50"]
    # AdamW too has one rate: 2, with 0.9 - 0.2 and 0; what diverges counts as guessing.
    adamw = cells(regret.one_rate(sweeps), method="adamw")
    assert adamw[:8] == ["2", 2, 1, 1, 1, "+0.350", "+0.350", "+0.700"]
    best = cells(regret.losses_by_rate(best_of(sweeps)), dataset="fall", method="scaled")
    assert best == [4, 12, "4", "0.0000", "50"]
    every = regret.losses_by_rate(sweeps)
    mine = every[(every["dataset"] == "fall") & (every["method"] == "scaled")]
    assert list(mine["learning rate"]) == ["1", "2", "4", "8"]
    assert len(every) == 11


def test_the_suggested_rate_is_the_nearest_that_was_run():
    """s = 2, r = 4: the suggestion is 0.124 / 16 = 0.00775, and 0.124 / 8 at s = 1."""
    losses = {0.004: 0.3, 0.008: 0.1, 0.016: 0.2}
    rows = rows_of("adamw", {0.004: 0.05}) + rows_of("scaled", losses)
    rows += rows_of("adamw", {0.004: 0.05}, "fall-scaling-1")
    rows += rows_of("scaled", losses, "fall-scaling-1")
    found = cells(regret.by_rule(sweeps_in(rows)), method="scaled")
    assert found[:7] == [2, 0, 0, 0, "+0.100", "+0.100", "+0.150"]


def test_regret_by_rate_is_over_settings_with_all_rates():
    rates = stacked_methods.METHODS["scaled"].rates
    rows = rows_of("adamw", {1.0: 0.5}) + rows_of("scaled", dict.fromkeys(rates, 0.75))
    rows += rows_of("adamw", {1.0: 0.5}, "fall") + rows_of("scaled", {rates[0]: 0.1}, "fall")
    table = regret.by_rate(sweeps_in(rows))
    for lr in rates:
        assert cells(table, method="scaled", **{"learning rate": f"{lr:g}"}) == [1, "+0.25"]
    assert len(table) == len(rates)


def parabola(vertex):
    """Losses that are a parabola in log(lr)."""
    rates = [1e-3 * 4**k for k in range(5)]
    return {lr: math.exp(0.1 * math.log(lr / vertex) ** 2 - 1) for lr in rates}


def test_slopes_are_powers_of_what_settings_differ_in():
    """Vertices at 0.01, at half of it at rank 16, and at twice of it for a quarter of s."""
    frames = (
        pd.DataFrame({"lr": list(x), "loss": list(x.values())})
        for x in (parabola(0.01), {1.0: 0.1, 2.0: 0.2})
    )
    inside, at_an_end = map(slopes.optimum, frames)
    assert inside == pytest.approx(0.01)
    assert math.isnan(at_an_end)
    rows = rows_of("scaled", parabola(0.01), "fall")
    rows += rows_of("scaled", parabola(0.005), "fall", rank=16)
    rows += rows_of("scaled", parabola(0.02), "fall-scaling-0.5")
    rows += rows_of("scaled", parabola(0.04), "fall-width-256")  # not of the rank, nor of s
    rows += rows_of("scaled", {1.0: 0.3, 2.0: 0.2}, "fall-batch-32")  # best at an end
    rows += rows_of("scaled", parabola(0.01), "cipher")
    rows += rows_of("scaled", parabola(0.01), "cipher", rank=16)
    found = slopes.slopes(sweeps_in(rows)).drop(columns="method").values.tolist()
    assert found == [
        ["rank", "-0.25", "0.25", 2],
        ["s", "-0.50", "", 1],
        ["width", "+1.00", "", 1],
    ]


def test_unusual_factors_are_shown_at_the_rate_of_the_usual_ones():
    sweeps = sweeps_in(
        rows_of("scaled", {1.0: 0.1, 2.0: 0.3}, "fall")
        + rows_of("scaled", {1.0: 0.7, 2.0: 0.4}, "fall-large-start")
        + rows_of("scaled", {1.0: 0.7, 2.0: 0.4}, "fall-few")  # other data: not in the table
    )
    table = regret.transferred(sweeps)
    found = cells(table, dataset="fall-large-start", method="scaled")
    assert found == [4, 12, "1", "0.100", "0.700", "0.400", "2"]
    assert len(table) == 1


def confirmed(method, losses, lr=1.0):
    """Records that read the test part: seed -> loss."""
    rows = []
    for seed, loss in losses.items():
        job = JOB._replace(method=method, seed=seed, tested=True, lr=lr)._asdict()
        rows.append({**job, "diverged": False, "test": {"loss": loss, "exact": 0.25}})
    return rows


def losses_on_test(rows):
    return comparisons.test_losses(sweeps_in(rows), runs_of(rows))


def test_test_losses_are_compared_seed_by_seed():
    """By hand: differences -0.1 and -0.3, mean -0.2, half width 12.71 * 0.1414 / 1.4142."""
    rows = confirmed("adamw", {1: 0.5, 2: 0.8, 3: 0.6}) + confirmed("scaled", {1: 0.4, 2: 0.5})
    rows += confirmed("adamw-fast", {1: 0.0, 2: 0.0})  # its sweep was worse: not the baseline
    sweeps = {"adamw": 0.2, "adamw-fast": 0.3, "scaled": 0.1}
    rows += [row for name, loss in sweeps.items() for row in rows_of(name, {1.0: loss})]
    table = losses_on_test(rows)
    setting = {"dataset": "cipher", "rank": 4, "steps": 12}
    adamw = cells(table, **setting, method="adamw")
    assert adamw == ["1", "0.6333", "", "", "", "25.0", 3]
    scaled = cells(table, **setting, method="scaled")
    assert scaled == ["1", "0.4500", "-0.2000", "-1.4710", "+1.0710", "25.0", 2]


def test_wins_are_intervals_that_leave_out_zero():
    """By hand: -0.2 and -0.22 (half width 0.127), +0.2 and -0.1, and 0 twice, in three settings.

    AdamW is compared with another run of its own, and is left out; so is a setting of one seed.
    """
    rows = [row for x in ("adamw", "scaled") for row in rows_of(x, {1.0: 0.2})]
    rows += [row for x in ("adamw", "scaled") for row in rows_of(x, {1.0: 0.2}, "fall")]
    rows += confirmed("adamw", {1: 0.5, 2: 0.5}) + confirmed("scaled", {1: 0.3, 2: 0.28})
    rows += [row for x in ("adamw", "scaled") for row in rows_of(x, {1.0: 0.2}, "exchange")]
    other = confirmed("adamw", {1: 0.5, 2: 0.5}) + confirmed("scaled", {1: 0.7, 2: 0.4})
    rows += [{**row, "dataset": "fall"} for row in other]
    same = confirmed("adamw", {1: 0.5, 2: 0.5}) + confirmed("scaled", {1: 0.5, 2: 0.5})
    rows += [{**row, "dataset": "exchange"} for row in same]
    rows += [row for x in ("adamw", "scaled") for row in rows_of(x, {1.0: 0.2}, "lowest")]
    single = confirmed("adamw", {1: 0.5}) + confirmed("scaled", {1: 0.1})
    rows += [{**row, "dataset": "lowest"} for row in single]
    table = comparisons.test_wins(sweeps_in(rows), runs_of(rows))
    assert cells(table, method="scaled") == [3, 1, 0, "-0.053", "+0.000", "+0.0"]
    assert table["method"].tolist() == ["scaled"]


def test_only_the_best_rate_of_known_methods_on_equal_seeds_is_compared():
    rows = rows_of("adamw", {1.0: 0.2}) + confirmed("adamw", {1: 0.5, 2: 0.5})
    rows += rows_of("scaled", {1.0: 0.1, 2.0: 0.3}) + confirmed("scaled", {1: 0.4})
    usual = losses_on_test(rows)
    rows += confirmed("scaled", {1: 0.0, 2: 0.0}, lr=2.0)  # of a sweep that was shorter once
    rows += rows_of("lora-pro", {1.0: 0.1}) + confirmed("lora-pro", {3: 0.1})
    rows += rows_of("of old", {1.0: 0.1}) + confirmed("of old", {1: 0.1})
    assert losses_on_test(rows).equals(usual)
    assert len(usual) > 1


def test_intervals_of_more_seeds_than_there_are_quantiles_are_refused():
    most = len(comparisons.QUANTILES) + 1
    groups = [pd.Series([0.1] * n).groupby([0] * n) for n in (most, most + 1)]
    assert comparisons.intervals(groups[0]).notna().all(axis=None)
    with pytest.raises(ValueError, match=f"at most {most} seeds, got {most + 1}"):
        comparisons.intervals(groups[1])


@pytest.mark.parametrize(
    "row",
    [
        {"diverged": True, "tested": True},
        {"diverged": False, "tested": True, "test": {"loss": 9.0, "exact": 0.0}},
        {"diverged": True, "tested": False, "exact": 0.0},
    ],
)
def test_a_run_that_diverged_or_is_worse_than_guessing_counts_as_guessing(row):
    assert scores(row) == {"loss": pytest.approx(math.log(10)), "exact": 0}


def test_exact_answers_away_from_the_best_rate():
    rows = rows_of("adamw", {1.0: 0.1, 4.0: 0.2}, exact=0.8)
    rows += rows_of("adamw", {0.25: 0.3}, exact=0.6)
    rows += rows_of("adamw", {2.0: 0.3, 8.0: 0.4}, "fall", exact=0.2)
    rows += rows_of("scaled", {1.0: 0.1}) + rows_of("scaled", {1.0: 0.1}, "fall", exact=0.1)
    rows += rows_of("adamw", {1.0: 0.0}, "lowest", exact=1.0)  # alone in its setting
    found = cells(comparisons.good_rates(sweeps_in(rows)), method="adamw")
    # Good are 1 and 4 of the first; 2 and 8 of the second: both ranges are 4.
    assert found == [2, "4", "60", 1, "", 0, "50", 2, "", 0, "50", 2]


def test_a_range_of_good_rates_is_around_the_best_and_against_the_best_method():
    rows = rows_of("adamw", {1.0: 0.2}, exact=0.9) + rows_of("adamw", {2.0: 0.3}, exact=0.2)
    rows += rows_of("adamw", {4.0: 0.1, 8.0: 0.1, 16.0: 0.1}, exact=0.91)
    rows += rows_of("scaled", {1.0: 0.1}, exact=0.95) + rows_of("scaled", {2.0: 0.1}, exact=0.5)
    rows += rows_of("scaled", {0.5: 0.2}, exact=0.89)
    rows += rows_of("lora-rite", {1.0: 0.1}, exact=0.8)
    table = comparisons.good_rates(sweeps_in(rows))
    names = ("adamw", "scaled", "lora-rite")
    assert [cells(table, method=x)[1] for x in names] == ["4", "1", "0"]


def test_betas_are_compared_at_best_rates_and_at_one_rate():
    """By hand: fast ones lose 0.1 in one setting when tuned, 0.3 in the other at one rate."""
    fast, mid, slow, usual, growing = stacked_methods.BY_BETAS[0]
    rows = rows_of(fast, {1.0: 0.2, 2.0: 0.5}) + rows_of(fast, {1.0: 0.4, 2.0: 0.1}, "fall")
    for name in (mid, slow, usual, growing):
        rows += rows_of(name, {1.0: 0.1, 2.0: 0.3}) + rows_of(name, {1.0: 0.9, 2.0: 0.6}, "fall")
    rows += rows_of(fast, {1.0: 0.3}, "lowest") + rows_of(usual, {1.0: 2.0}, "lowest")
    rows += rows_of(growing, {1.0: 0.4}, "lowest") + rows_of(fast, {1.0: 0.3}, "exchange")
    rows += rows_of(usual, {1.0: 0.3}, "exchange")
    table = comparisons.beta_regrets(sweeps_in(rows))
    assert cells(table, method=fast) == [2, "0.1000", "0.3000"]  # 2: those that have all betas
    for name in (mid, slow, usual, growing):
        assert cells(table, method=name) == [2, "0.5000", "0.5000"]
    assert len(table) == 5


def test_betas_without_a_common_rate_have_no_regret_at_one_rate():
    names = stacked_methods.BY_BETAS[0]
    rows = [row for name in names for row in rows_of(name, {1.0: 0.2})]
    rows += [row for name in names for row in rows_of(name, {2.0: 0.2}, "fall")]
    table = comparisons.beta_regrets(sweeps_in(rows))
    assert list(table["worst regret, one rate [nats/digit]"]) == [""] * 5


def test_batches_have_the_size_of_the_setting_and_hold_strings_of_the_task(kept):
    for names, size in (
        (("cipher", "fall-few", "cipher"), 8),
        (("cipher-noisy-batch-2", "lowest-batch-2"), 2),
    ):
        workload = stacks.load(names[0], kept=kept, quick=True)
        jobs = [JOB._replace(dataset=name, seed=seed) for seed, name in enumerate(names)]
        (tokens, _), drawn = workload.training(jobs)
        assert drawn.shape == (JOB.steps, len(names), size)
        for run, name in enumerate(names):
            mine = {tuple(x) for x in tokens[drawn[:, run]].flatten(0, 1).tolist()}
            known = strings.parts_of(strings.DATASETS[name])["train"].tokens
            assert mine <= {tuple(x) for x in known.tolist()}
        if names[0] == names[-1]:
            assert not torch.equal(drawn[:, 0], drawn[:, -1])  # by another seed
        again = workload.training([jobs[0]])[1]
        assert torch.equal(again[:, 0], drawn[:, 0])
