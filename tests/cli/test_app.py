import os
import subprocess
import sys

import pytest

import rlora
from rlora.backends import BUILTIN, BackendInfo
from rlora.cli.console import console, one_line, progress


def test_version_and_help_are_quick_and_complete(rlora_cli):
    assert rlora.__version__ in rlora_cli("--version").stdout
    for args in (("--help",), ()):
        result = rlora_cli(*args)
        assert result.exit_code == 0
        assert "bench" in result.stdout
        assert "info" in result.stdout
    assert "--output keeps the record" in " ".join(
        rlora_cli("bench", "run", "--help").stdout.split()
    )


@pytest.mark.parametrize("group", [(), ("bench",)])
@pytest.mark.parametrize("width", [40, 80])
def test_help_cuts_no_summary(rlora_cli, monkeypatch, group, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = rlora_cli(*group, "--help")
    assert "..." not in result.stdout.partition("Commands:")[2]


def test_the_command_line_starts_quickly():
    """Its help needs NumPy, and not three times as many modules as that."""
    help_page = (
        "import sys, numpy; numpys = len(sys.modules)\n"
        "import rlora.cli; sys.argv[1:] = ['--help']\n"
        "try:\n"
        "    rlora.cli.main()\n"
        "finally:\n"
        "    print(numpys, *sys.modules, file=sys.stderr)"
    )
    done = run_python(help_page)
    numpys, *modules = done.stderr.decode().split()
    heavy = {"torch", "jax", "cupy", "optax", "matplotlib", "jinja2", "jsonschema"}
    assert not heavy & set(modules)
    assert len(modules) < 3 * int(numpys)


def run_python(code, *args, **env):
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | env,
        capture_output=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("args", [["bench", "list"], ["reproduce", "--list"], ["bench", "--help"]])
def test_a_narrow_encoding_escapes_what_it_lacks(args):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    hidden = "sys.modules.update(torch=None, jax=None)"  # `bench list` would look at them
    done = run_python(
        f"import sys; {hidden}; import rlora.cli; rlora.cli.main()",
        *args,
        **ascii_only,
        PYTHONIOENCODING="ascii:strict",
    )
    assert done.stderr == b""
    assert done.stdout.isascii()


def test_no_such_command(refused):
    """Those that there are come with it, also in a group below."""
    assert "'frobnicate'; there are bench, info, reproduce, study." in refused("frobnicate")
    assert "'shw'; there are compare, export, list, report, run, show." in refused("bench", "shw")


def test_a_study_takes_several_with_commas_as_a_benchmark_does(refused):
    assert "'x' is not a valid integer range" in refused("study", "--rank", "4,x")
    assert "x>=2" in refused("study", "--steps", "9,1")
    assert "--dataset was given without a value" in refused("study", "--dataset", ",")


def test_a_method_that_was_misspelt_is_named(refused):
    assert "'scaled_adam', did you mean scaled_adamw?" in refused(
        "bench", "--method", "scaled_adam"
    )
    assert "did you mean" not in refused("bench", "--method", "zzz")


def test_info_lists_every_backend(rlora_cli):
    result = rlora_cli("info")
    assert result.exit_code == 0, result.output
    for name in (*BUILTIN, "python", "array-api-compat", "BLAS", "threads"):
        assert name in result.stdout
    assert rlora.__version__ in result.stdout
    assert "\x1b" not in result.stdout


def test_info_reports_a_broken_backend(rlora_cli, monkeypatch):
    import rlora.backends

    broken = BackendInfo("numpy", None, (), "the [b]driver[/b] is\n\x1b[31mmissing")
    monkeypatch.setattr(rlora.backends, "available", lambda: {"numpy": broken})
    result = rlora_cli("info")
    assert result.exit_code == 0
    assert "the [b]driver[/b] is; \\x1b[31mmissing" in result.stdout


@pytest.mark.parametrize("error", [rlora.ShapeError("a\nb"), MemoryError(), OSError("disk full")])
def test_the_door_turns_refusals_into_one_line(refused, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(rlora.backends, "available", fail)
    expected = {"a\nb": "a; b", "": "MemoryError"}.get(str(error), str(error))
    assert refused("info") == f"rlora: error: {expected}\n"


def test_the_door_lets_bugs_through(rlora_cli, monkeypatch):
    monkeypatch.setattr(rlora.backends, "available", lambda: 1 / 0)
    assert isinstance(rlora_cli("info").exception, ZeroDivisionError)


def test_brackets_and_colons_of_a_name_are_text_on_a_terminal(monkeypatch, capsys):
    name = "z[/b] :bug:[red].safetensors"
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(name.replace(":bug:", ""), 1) as tick:
        tick()
    assert "z[/b] [red].safetensors" in capsys.readouterr().err
    console().print(name)
    assert name in capsys.readouterr().out


def test_one_line_keeps_text_and_disarms_the_rest():
    assert one_line("größer\n\n  \x1b[31mred\x07") == "größer; \\x1b[31mred\\x07"
    assert one_line("Choose from:\n\tone,\n\ttwo") == "Choose from: one, two"


@pytest.mark.parametrize("args", ["reproduce --list", "bench run --help", "reproduce --help"])
def test_a_reader_that_has_gone_is_no_verdict(args):
    """As `head` goes: 1 would say that a claim fails, or that a timing became slower."""
    code = "import rlora.cli; rlora.cli.main()"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *args.split()],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=1200,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("model", ["strings", "gpt2"])
@pytest.mark.parametrize("inside", ["", "in/it"])
def test_a_study_wants_folders_and_says_so_at_once(refused, monkeypatch, tmp_path, model, inside):
    """Before it looks for packages."""
    monkeypatch.setattr("rlora.cli.study.command.check_installed", lambda *_, **__: 1 / 0)
    file = tmp_path / "file"
    file.write_text("")
    message = refused("study", "--model", model, "--output", file / inside)
    assert f"--output {file} is a file; give it a folder" in message
    for nothing in (file, tmp_path / "nothere"):
        message = refused("study", "--model", "gpt2", "--data", nothing, "--output", tmp_path)
        assert f"--data {nothing} is no folder" in message
    assert list(tmp_path.iterdir()) == [file]
