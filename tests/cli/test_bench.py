import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import rlora.methods
from rlora.cli.bench import cost_model, schema, targets, timing
from rlora.cli.bench.export import FORMATS
from rlora.cli.records import write_record

COLUMNS = ("method", "rank", "step", "spread", "ratio", "to", "state", "peak temporary", "verdict")


COPIES = {"sgd": 0, "scaled_sgd": 1, "adamw": 2, "scaled_adamw:before": 2, "lora_rite": 2.5}
"""Arrays that a donated step of NumPy holds for a while, in sizes of all factors: directions, Adam's
quotients; of LoRA-RITE the rebased moments, the sums with the new gradients, and the products of
one side. New parameters are not among them."""


def most_temporary_bytes(row):
    """The copies, one pair in work, and for each factor 8 r x r arrays, which the suite allows, and
    2 kB of Python's objects: 3 kB a factor at rank 4, where half a copy more would be 6 kB."""
    numbers, factors = row["parameters"], 2 * row["pairs"]
    small = targets.GRAM_COPIES * factors * row["rank"] ** 2
    work = COPIES[row["method"]] * numbers + numbers / row["pairs"] + small
    return 4 * work + 2048 * factors


def load(path):
    found = json.loads(path.read_text())
    jsonschema.validate(found, schema.SCHEMA, cls=jsonschema.Draft202012Validator)
    return found


def test_quick_prints_every_column_and_keeps_a_valid_record(rlora_cli, tmp_path):
    out = tmp_path / "out.json"
    methods = ["lora_rite", "scaled_adamw:before", "scaled_sgd"]
    args = ("--quick", "--preset", "roberta-base", "--method", ",".join(methods))
    result = rlora_cli("bench", *args, "--output", out)
    assert result.exit_code == 0, result.output
    header = result.stdout.splitlines()[2]
    assert all(column in header for column in COLUMNS)
    assert "…" not in result.stdout
    found = load(out)
    names = ["sgd", "adamw", *methods]
    assert [(row["method"], row["rank"]) for row in found["rows"]] == [
        (name, rank) for rank in (4, 16) for name in names
    ]
    for row in found["rows"]:
        assert len(row["samples_s"]) == 3
        assert row["pairs"] == 24
        assert row["parameters"] == row["rank"] * 24 * 1536
        assert 0 < row["peak_temporary_bytes"] < most_temporary_bytes(row)
        assert row["method"] in result.stdout
    state = {row["method"]: row["state_bytes"] for row in found["rows"] if row["rank"] == 16}
    moments = 2 * 4 * 16 * 24 * 1536
    assert state["sgd"] == 0
    assert moments <= state["adamw"] <= moments + 4 * 48
    assert not found["partial"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    (tmp_path / "ordinary").touch()
    assert out.stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # not a temporary's 0600


def test_torch_against_third_parties(rlora_cli, adapter, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    out = tmp_path / "out.json"
    args = ("--backend", "torch", "--against", "torch.adamw,peft", "--repeat", 3, "--output", out)
    result = rlora_cli("bench", "--adapter", adapter, *args)
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in load(out)["rows"]}
    assert list(rows) == ["sgd", "adamw", *rlora.methods.__all__, "torch.adamw", "peft"]
    assert rows["peft"]["ratio_to"] == rows["torch.adamw"]["ratio_to"] == "adamw"
    assert rows["peft"]["peak_temporary_bytes"] > 0
    assert {row["backend"] for row in rows.values()} == {"torch"}
    assert {row["rank"] for row in rows.values()} == {3}


def test_third_parties_stand_beside_another_backend_too(rlora_cli, adapter, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    args = ("--method", "scaled_sgd", "--against", "torch.adamw", "--repeat", 1, "--output", out)
    assert rlora_cli("bench", "--adapter", adapter, *args).exit_code == 0
    rows = load(out)["rows"]
    assert [(row["method"], row["backend"]) for row in rows] == [
        ("sgd", "numpy"),
        ("adamw", "numpy"),
        ("scaled_sgd", "numpy"),
        ("torch.adamw", "torch"),
    ]


def test_jax(rlora_cli, adapter, tmp_path):
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    out = tmp_path / "out.json"
    methods = ("--method", "scaled_adamw,scaled_sgd", "--against", "optax.adamw")
    args = ("--backend", "jax", "--dtype", "bfloat16", "--repeat", 2, "--output", out, *methods)
    result = rlora_cli("bench", "--adapter", adapter, *args)
    assert result.exit_code == 0, result.output
    for row in load(out)["rows"]:
        assert (row["backend"], row["dtype"]) == ("jax", "bfloat16")
        assert row["compile_s"] > row["median_s"]
        assert row["peak_temporary_bytes"] > 0


def test_no_result_says_whose_machine_it_was(rlora_cli, adapter, tmp_path, monkeypatch):
    """The record, each export and the page; told a host, a home and variables to look for."""
    pytest.importorskip("matplotlib")
    told = {"SECRET_TOKEN": "hunter2hunter2", "HOME": "/home/quetzalcoatl", "USER": "xochipilli"}
    for name, value in (told | {"LOGNAME": "xochipilli", "HOSTNAME": "popocatepetl"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "popocatepetl")
    monkeypatch.setattr(platform, "node", lambda: "popocatepetl")
    private = [*told, *told.values(), "popocatepetl", str(tmp_path), sys.prefix]
    real = os.uname().nodename
    out = tmp_path / "out.json"
    args = ("--method", "scaled_sgd", "--repeat", 1, "--output", out)
    assert rlora_cli("bench", "--adapter", adapter, *args).exit_code == 0
    for name in FORMATS:
        export = ("--format", name, "--output", tmp_path / f"out.{name}")
        assert rlora_cli("bench", "export", out, *export).exit_code == 0
    assert rlora_cli("bench", "report", out, "--output", tmp_path / "out.html").exit_code == 0
    written = sorted(path for path in tmp_path.rglob("*") if path.suffix != ".safetensors")
    written = [path for path in written if path.is_file()]
    assert len(written) == 4 + len(FORMATS)  # asv has three
    for path in written:
        for word in (*private, real):
            found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", path.read_text())
            assert not found, (path.name, word)
    found = load(out)
    assert {row["adapter"] for row in found["rows"]} == {"tiny.safetensors"}
    assert {"python", "cpu", "cpus", "blas"} <= found["environment"].keys()
    assert found["environment"]["versions"]["numpy"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--preset", "gpt5"), "there are gpt2-medium"),
        (("--preset", ""), "there are gpt2-medium"),
        (("--suite", "speed", "--preset", ""), "there are gpt2-medium"),
        (("--backend", "no_such_library"), "not installed"),
        (("--backend", "json"), "json"),
        (("--method", "adam_at_home"), "scaled_adamw"),
        (("--method", ","), "without a value"),
        (("--rank", "0"), "x>=1"),
        (("--rank", "4,x"), "'x' is not a valid whole number"),
        (("--rank", "1e3"), "not a valid whole number"),
        (("--rank", "5000"), "at most 1024"),
        (("--repeat", "0"), "x>=1"),
        (("--repeat", "many"), "not a valid whole number"),
        (("--seed", "-1"), "0<=x<="),
        (("--seed", "9" * 20), "0<=x<="),
        (("--threads", "9" * 20), "1<=x<="),
        (("--against", "lion"), "torch.adamw"),
        (("--dtype", "float8"), "float32"),
        (("--dtype", "bfloat16"), "the numpy backend has none here; take another"),
        (("--device", "cuda:0"), "cuda:0"),
        (("--output", "."), "directory"),
        (("--output", "no/such/folder/out.json"), "No such file"),
        (("--frobnicate",), "No such option"),
    ],
)
def test_wrong_options_are_refused_in_one_line(refused, monkeypatch, tmp_path, args, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "timed", lambda case: pytest.fail("it measured first"))
    assert why in refused("bench", *args)
    assert list(tmp_path.iterdir()) == []


NAMES = {
    "a path": "../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "two lines": "adamw\nadamw",
    "control codes": "\x1b[31madamw\x07",
    "a variable": "$HOME",
    "a command": "$(touch made); touch made",
    "a format": "{0.__class__.__init__.__globals__}%s%n",
    "markup": "[red]adamw[/red]<script>",
    "long": "a" * 10_000,
    "a space": " ",
    "code": "__import__('os').system('touch made')",
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("option", ["--method", "--preset", "--backend", "--against", "--dtype"])
def test_hostile_names_are_names(refused, monkeypatch, tmp_path, option, kind):
    """They are looked up, and neither opened, run nor printed raw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "timed", lambda case: pytest.fail("it measured first"))
    message = refused("bench", option, NAMES[kind], "--output", "out.json")
    assert message[:-1].isprintable()
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_brings_its_own_rank(refused, adapter):
    assert "--rank" in refused("bench", "--adapter", adapter, "--rank", 4)
    assert "--preset" in refused("bench", "--adapter", adapter, "--preset", "llama-7b")


def test_control_codes_in_the_name_of_an_adapter_are_written_out(rlora_cli, adapter):
    strange = adapter.rename(adapter.with_name("\x1b[31m.safetensors"))
    args = ("--adapter", strange, "--method", "scaled_sgd", "--repeat", 1, "--threads", 1)
    done = rlora_cli("bench", *args)
    assert done.exit_code == 0, done.output
    assert "\\x1b[31m.safetensors" in done.stdout
    assert "\x1b" not in done.output


def test_cupy_without_cuda_gives_the_reason(refused):
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("there is a CUDA device")
    except Exception:  # not installed, or no driver
        pass
    assert "cupy" in refused("bench", "--backend", "cupy").lower()


def test_a_device_that_torch_has_not_is_refused_in_a_line(refused):
    """Torch's own message goes on for thousands of letters."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    message = refused("bench", "--backend", "torch", "--device", "cuda:0")
    assert "torch backend cannot make a float32 array on device 'cuda:0'" in message
    assert len(message) < 400


def test_a_peft_without_the_optimizer_is_refused_before_anything_is_timed(
    refused, adapter, monkeypatch
):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "peft.optimizers", None)
    monkeypatch.setattr(timing, "timed", lambda case: pytest.fail("it measured first"))
    assert "pip install -U peft" in refused("bench", "--adapter", adapter, "--against", "peft")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_timed(
    refused, monkeypatch, tmp_path
):
    monkeypatch.setattr(timing, "timed", lambda case: pytest.fail("it measured first"))
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refused("bench", "--output", tmp_path / "file" / "out.json")
    monkeypatch.setattr(
        Path,
        "touch",
        lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
    )
    assert "Permission denied" in refused("bench", "--output", tmp_path / "out.json")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def interrupted_after(monkeypatch):
    def after(count):
        original, calls = timing.timed, []

        def timed(case):
            calls.append(case)
            if len(calls) > count:
                raise KeyboardInterrupt
            return original(case)

        monkeypatch.setattr(timing, "timed", timed)

    return after


def test_an_interrupt_keeps_what_was_measured(rlora_cli, adapter, tmp_path, interrupted_after):
    interrupted_after(4 + 4 + 2)  # first steps, one round, half a round
    out = tmp_path / "out.json"
    args = ("--method", "scaled_adamw,scaled_sgd", "--repeat", 50, "--output", out)
    result = rlora_cli("bench", "--adapter", adapter, *args)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "rlora: error: interrupted"
    assert "interrupted" in result.stdout
    found = load(out)
    assert found["partial"]
    assert sorted(len(row["samples_s"]) for row in found["rows"]) == [1, 1, 2, 2]
    assert all("unstable" in row["verdict"] for row in found["rows"])


def test_an_interrupt_takes_no_step_of_the_size_that_was_timed(
    rlora_cli, tmp_path, interrupted_after, monkeypatch
):
    """Work is counted on small layers: at 8192 x 8192 a step of loft takes ten seconds."""
    interrupted_after(3 + 1)  # first steps, a third of a round
    cost_model._small_flops.cache_clear()
    counted = []
    original = cost_model.step_flops
    monkeypatch.setattr(
        cost_model, "step_flops", lambda *args: counted.append(args[1]) or original(*args)
    )
    out = tmp_path / "out.json"
    args = ("--method", "loft,scaled_adamw", "--preset", "301x302*1", "--rank", 3)
    assert rlora_cli("bench", *args, "--output", out).exit_code == 130
    assert max(max(x.shape) for pair in counted for x in pair) <= 4 * 3
    (row,) = load(out)["rows"]
    assert row["flops"] == cost_model.step_cost(row["method"], {(301, 302, 3): 1}, 4, 0).flops


def test_an_early_interrupt_leaves_nothing(rlora_cli, adapter, tmp_path, interrupted_after):
    interrupted_after(1)
    result = rlora_cli("bench", "--adapter", adapter, "--output", tmp_path / "out.json")
    assert result.exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == [adapter.name]


def test_a_rank_given_twice_is_measured_once(rlora_cli, tmp_path):
    out = tmp_path / "out.json"
    args = ("--preset", "16x16*2", "--method", "sgd", "--repeat", 1, "--rank", "4,04", "--rank", 4)
    assert rlora_cli("bench", *args, "--output", out).exit_code == 0
    assert [row["rank"] for row in load(out)["rows"]] == [4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_the_file_and_not_the_table(rlora_cli, adapter):
    args = ("--adapter", adapter, "--method", "sgd", "--repeat", 1, "--output", "/dev/full")
    result = rlora_cli("bench", *args)
    assert result.exit_code == 2
    assert "/dev/full cannot be written: No space left on device" in result.stderr
    assert "sgd" in result.output


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_record(path, {"rows": [float("nan")]})
    with pytest.raises(TypeError):
        write_record(path, {"rows": object()})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.json", "old")]
    write_record(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}


def test_a_new_method_costs_no_edit(rlora_cli, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(rlora.methods, "__all__", ["scaled_sgd", "brand_new"])
    monkeypatch.setattr(rlora.methods, "brand_new", rlora.methods.scaled_adamw, raising=False)
    out = tmp_path / "out.json"
    rlora_cli("bench", "--adapter", adapter, "--repeat", 1, "--output", out)
    rows = {row["method"]: row["ratio_to"] for row in load(out)["rows"]}
    assert rows == {"sgd": "sgd", "adamw": "adamw", "scaled_sgd": "sgd", "brand_new": "adamw"}


def test_as_a_user_calls_it_through_a_pipe(adapter):
    code = "import sys, rlora.cli; sys.argv[0] = 'rlora'; rlora.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "--adapter", adapter, "--repeat", "2"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    for name in rlora.methods.__all__:  # one line each: the table is not folded
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split()[-1] == "unstable"
    assert done.stdout.count("unstable: ") == 1
    assert "--repeat" in done.stdout or "close other programs" in done.stdout


def test_base_dependencies_are_enough(adapter):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'jax', 'peft', 'psutil',"
        " 'jinja2', 'matplotlib', 'scipy'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import rlora.cli; rlora.cli.main()\n"
    )
    args = ["bench", "--adapter", str(adapter), "--repeat", "1", "--threads", "1"]
    for command in (args, ["info"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert "threadpoolctl" in done.stdout


def test_a_plain_method_can_be_asked_for(rlora_cli, adapter, tmp_path):
    out = tmp_path / "out.json"
    for methods, count in {"adamw": 1, "sgd,scaled_adamw": 3}.items():
        args = ("--method", methods, "--repeat", 1, "--output", out)
        assert rlora_cli("bench", "--adapter", adapter, *args).exit_code == 0
        names = [row["method"] for row in load(out)["rows"]]
        assert len(names) == len(set(names)) == count
        assert set(methods.split(",")) <= set(names)


def test_torch_has_the_plain_methods_too(rlora_cli, adapter):
    pytest.importorskip("torch")
    args = ("--method", "adamw", "--backend", "torch", "--repeat", 1)
    assert rlora_cli("bench", "--adapter", adapter, *args).exit_code == 0


HUGE = ("--preset", "100000x100000*10000", "--method", "adamw", "--rank", 64)


def test_more_than_the_free_memory_is_refused_in_one_line(refused, monkeypatch):
    monkeypatch.setattr(
        "rlora.cli.bench.options.random_problem", lambda *a: pytest.fail("it was made")
    )
    message = refused("bench", *HUGE)
    assert "needs about 4.1 TB" in message  # 200000 x 64 x 10000 numbers of 32 bytes
    assert "--force" in message


def test_force_goes_on_without_asking_for_free_memory(refused, monkeypatch):
    def begun(*arguments):
        msg = "it was begun"
        raise MemoryError(msg)

    monkeypatch.setattr("rlora.cli.bench.options.random_problem", begun)
    assert "it was begun" in refused("bench", *HUGE, "--force")


def test_the_estimate_is_near_what_is_held(rlora_cli, monkeypatch):
    """A factor of two either way: it tells gigabytes from terabytes."""
    import tracemalloc

    from rlora.cli.bench.options import Options

    made, least = [], Options.least_bytes
    monkeypatch.setattr(Options, "least_bytes", lambda plan: made.append(least(plan)) or made[-1])
    tracemalloc.start()
    try:
        args = ("--preset", "1024x1024*8", "--method", "adamw", "--rank", 64, "--repeat", 1)
        assert rlora_cli("bench", *args).exit_code == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made[0] / 2 < peak < 2 * made[0]
