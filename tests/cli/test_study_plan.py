"""`rlora study` without training: its plan, its records, and its tables."""

import json
import math
import re

import pandas as pd
import pytest
import torch

from rlora.cli.study import runner
from rlora.cli.study.plan import Entry, Records, chosen_rate, confirmations, rounds, sweep
from rlora.cli.study.tables import good_rates, spread, write_tables
from rlora.cli.study.train import Job
from rlora.cli.study.workload import remembered
from rlora.cli.study.workloads import Place

LIKE = Job("digits", "even", 8, "adamw", 0.0, 0, 8, tested=False)


def row(job, loss):
    return {
        **job._asdict(),
        "diverged": math.isinf(loss),
        "validation": [] if math.isinf(loss) else [[job.steps, loss]],
    }


# --- plan --------------------------------------------------------------------------------------------


def conclude(records, entries, loss_of):
    """Do all rounds of a plan with a made-up loss; how many runs there were."""
    count = 0
    for jobs in rounds({LIKE.dataset: records}, entries):
        for job in jobs:
            records.add(row(job, loss_of(job)))
            count += 1
    return count


@pytest.mark.parametrize("best", [1e-3, 2e-3, 3.2e-2])
def test_a_sweep_grows_until_the_best_rate_is_inside(tmp_path, best):
    records = Records(tmp_path / "x.jsonl")
    entry = Entry(LIKE, (4e-3, 8e-3), (0,), (1, 2))
    conclude(records, [entry], lambda job: abs(math.log(job.lr / best)))
    rates = sorted({job.lr for job in records.rows})
    assert chosen_rate(records, entry) == pytest.approx(best)
    assert rates[0] < best < rates[-1]
    confirmed = [job for job in records.rows if job.tested]
    assert [(job.lr, job.seed) for job in confirmed] == [(pytest.approx(best), s) for s in (1, 2)]


def test_a_sweep_does_not_grow_for_ever(tmp_path):
    records = Records(tmp_path / "x.jsonl")
    assert conclude(records, [Entry(LIKE, (1.0, 2.0), (0,), ())], lambda job: -job.lr) == 6


def test_nothing_is_chosen_where_all_diverged(tmp_path):
    records = Records(tmp_path / "x.jsonl")
    entry = Entry(LIKE, (1.0, 2.0, 4.0), (0,), (1,))
    conclude(records, [entry], lambda job: math.inf)
    assert chosen_rate(records, entry) is None
    assert confirmations(records, entry) == []


def test_the_mean_over_seeds_chooses(tmp_path):
    records = Records(tmp_path / "x.jsonl")
    entry = Entry(LIKE, (1.0, 2.0, 4.0), (0, 1), ())
    losses = {(1.0, 0): 3.0, (1.0, 1): 3.0, (2.0, 0): 2.0, (2.0, 1): 2.0, (4.0, 0): 0.0}
    conclude(records, [entry], lambda job: losses.get((job.lr, job.seed), 9.0))
    assert chosen_rate(records, entry) == 2.0


def test_a_study_goes_on_where_it_was(tmp_path):
    path = tmp_path / "x.jsonl"
    entry = Entry(LIKE, (1.0, 2.0, 4.0), (0,), (1,))
    first = Records(path)
    for job in sweep(first, entry)[:2]:
        first.add(row(job, job.lr))
    again = Records(path)
    assert list(again.rows) == list(first.rows)
    assert next(rounds({LIKE.dataset: again}, [entry])) == sweep(again, entry)[2:]


def test_a_rate_waits_for_all_seeds_of_the_sweep(tmp_path):
    """By the one seed that is done 2.0 would be the best, inside, and then by both 1.0."""
    records = Records(tmp_path / "x.jsonl")
    entry = Entry(LIKE, (1.0, 2.0, 4.0), (0, 1), (2,))
    for lr, loss in ((1.0, 3.0), (2.0, 0.0), (4.0, 9.0)):
        records.add(row(LIKE._replace(lr=lr), loss))
    assert sweep(records, entry) == [
        LIKE._replace(lr=lr, seed=seed) for lr in entry.rates for seed in (0, 1)
    ]
    assert chosen_rate(records, entry) is None
    for lr, loss in ((1.0, 3.0), (2.0, 9.0), (4.0, 9.0)):
        records.add(row(LIKE._replace(lr=lr, seed=1), loss))
    assert chosen_rate(records, entry) == 1.0
    records.add(row(LIKE._replace(lr=4.0, seed=2), -99.0))  # no seed of the sweep
    records.add(row(LIKE._replace(lr=4.0, seed=0, tested=True), -99.0))  # no run of it
    assert chosen_rate(records, entry) == 1.0
    assert {job.lr for job in sweep(records, entry)} == {0.5, 1.0, 2.0, 4.0}


def test_a_line_that_is_no_run_is_named(tmp_path):
    path = tmp_path / "digits-even.jsonl"
    whole = row(LIKE, 1.0)
    without = [{k: x for k, x in whole.items() if k != key} for key in ("diverged", "validation")]
    for wrong in ({}, *without, {**whole, "validation": []}):
        path.write_text(f"{json.dumps(whole)}\n{json.dumps(wrong)}\n")
        with pytest.raises(ValueError, match=r"digits-even.jsonl, line 2: not a run"):
            Records(path)


# --- tables ------------------------------------------------------------------------------------------


def test_good_rates_are_where_the_line_crosses_the_bound():
    """A loss that is linear in log2(lr) on both sides: the crossings are known."""
    sweep = {2.0**k: abs(k) for k in range(-3, 5)}
    assert good_rates(sweep, 1.5) == "8.0"
    assert good_rates(sweep, 0.25) == "1.4"  # the root of 2
    assert good_rates(sweep, -0.1) == ""


def test_good_rates_end_beside_a_divergence_and_say_where_the_sweep_ends_first():
    assert good_rates({1.0: 9.0, 2.0: 1.0, 4.0: 0.0, 8.0: math.inf}, 5.0) == "2.8"
    assert good_rates({1.0: 1.0, 2.0: 0.0, 4.0: math.inf}, 5.0) == ">2.0"
    assert good_rates({1.0: 9.0, 2.0: 1.0}, 5.0) == ">1.4"


def test_spread_is_mean_and_ends():
    losses = pd.Series([1.0, 2.0, 6.0, math.nan]).groupby([0, 0, 0, 1])
    found = [column.tolist() for column in spread("loss", losses).values()]
    assert found == [["3.000", ""], ["1.000", ""], ["6.000", ""]]


def timed(job, loss):
    """A record of a run by itself."""
    return {**row(job, loss), "step_ms": 1.0, "state_bytes": 8}


def tables_of(folder, rows):
    (folder / "all.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    write_tables(folder)
    return {path.name for path in folder.iterdir()} - {"all.jsonl"}


STRINGS = {**row(LIKE._replace(model="strings", dataset="fall", lr=0.1), 1.0), "exact": 0.5}


def test_tables_of_runs_that_all_diverged_and_of_strings_beside_them(tmp_path):
    lost = [timed(LIKE._replace(lr=lr), math.inf) for lr in (1, 2)]
    names = tables_of(tmp_path, [*lost, STRINGS])
    assert {"results.csv", "best_losses.csv", "rates.svg"} <= names
    (line,) = (tmp_path / "results.csv").read_text().splitlines()[1:]
    assert line.split(",")[5:8] == ["1", ">2.0", "inf"]
    assert not [name for name in names if name.startswith("digits")]
    assert "\nfall,8,8,adamw,0.1," in (tmp_path / "best_losses.csv").read_text()


def test_strings_alone_have_their_tables_alone(tmp_path):
    names = tables_of(tmp_path, [STRINGS])
    assert "best_losses.csv" in names
    assert "results.csv" not in names


def test_nothing_is_called_adamw_where_it_was_not_run(tmp_path):
    rows = [timed(LIKE._replace(method="scaled", lr=lr), 1.0) for lr in (1.0, 2.0)]
    assert tables_of(tmp_path, rows) == {"results.csv", "digits-even-r8-8.svg"}
    head = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert "validation loss [nats]" in head
    assert "AdamW" not in head
    assert "good rate" not in head
    assert "AdamW" not in (tmp_path / "digits-even-r8-8.svg").read_text()
    assert tables_of(tmp_path, [*rows, timed(LIKE._replace(lr=1.0), 1.0)])
    assert "below AdamW's" in (tmp_path / "results.csv").read_text().splitlines()[0]


# --- places of weights and data, processes --------------------------------------------------------


def test_a_record_names_folders_without_the_way_to_them(tmp_path):
    origins = []
    for place in (tmp_path / "a" / "e2e", tmp_path / "b" / "e2e"):
        place.mkdir(parents=True)
        origins.append(Place("gpt2", tmp_path, weights=str(place), data=place).origin())
    assert origins[0] != origins[1]
    for origin in origins:
        assert origin["data"] == origin["weights"]
        assert re.fullmatch(r"e2e \([0-9a-f]{8}\)", origin["data"])
    assert Place("gpt2", tmp_path, weights="some/model").origin()["weights"] == "some/model"


def test_a_broken_file_of_tensors_is_named(tmp_path):
    file, cpu = tmp_path / "kept" / "x.pt", torch.device("cpu")
    assert remembered(file, lambda: torch.ones(2), cpu).tolist() == [1, 1]
    assert remembered(file, lambda: torch.zeros(2), cpu).tolist() == [1, 1]
    assert [path.name for path in file.parent.iterdir()] == ["x.pt"]
    whole = file.read_bytes()
    for broken in (b"", b"no tensors", whole[:100], whole[:-40]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.pt is broken .*: delete it, and it will be made"):
            remembered(file, lambda: torch.ones(2), cpu)


def test_no_more_processes_than_stacks(monkeypatch, tmp_path):
    """One stack is run here, and its time is not divided."""
    place, jobs = Place("strings", tmp_path), [LIKE._replace(model="strings", dataset="fall")]

    class Stub:
        def seconds(self, stack):
            return 12.0

        def run(self, stack):
            return [row(job, 1.0) for job in stack]

    monkeypatch.setattr(runner, "loaded", lambda place, dataset: Stub())
    monkeypatch.setattr(runner, "ProcessPoolExecutor", None)
    assert runner.estimate(place, jobs, processes=4) == 12.0
    assert list(runner.run_jobs(place, jobs, processes=4)) == [row(jobs[0], 1.0)]
    both = [*jobs, jobs[0]._replace(method="scaled")]
    assert runner.estimate(place, both, processes=4) == 12.0


def test_runs_of_other_weights_are_not_taken_for_those_asked(tmp_path):
    records = Records(tmp_path / "gpt2-e2e.jsonl")
    records.add(row(LIKE, 1.0) | {"weights": "a", "data": None, "quick": None})
    records.check_origin(LIKE, {"weights": "a", "data": None, "quick": None})
    records.check_origin(LIKE._replace(steps=9), {"weights": "b", "data": None, "quick": None})
    first = Records(tmp_path / "first.jsonl")
    first.add(row(LIKE, 1.0))  # of an older version, which did not say
    first.check_origin(LIKE, {"weights": "b", "data": None, "quick": None})
    for key, value in (("weights", "b"), ("weights", None), ("data", "d"), ("quick", True)):
        origin = {"weights": "a", "data": None, "quick": None, key: value}
        with pytest.raises(ValueError, match=f"--{key}.*give it another --output"):
            records.check_origin(LIKE._replace(method="scaled"), origin)


def test_a_file_that_cannot_be_opened_is_not_called_broken(tmp_path):
    """Nobody is told to delete what may be whole."""
    with pytest.raises(OSError, match=str(tmp_path)):
        remembered(tmp_path, lambda: torch.ones(2), torch.device("cpu"))
