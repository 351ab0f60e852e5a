import rlora.methods
from rlora.backends import BUILTIN
from rlora.cli.bench.problem import PRESETS
from rlora.cli.bench.third_party import KNOWN


def test_every_name_has_a_line(rlora_cli):
    result = rlora_cli("bench", "list")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    names = [line[0] for line in lines]
    for name in ("adamw", "sgd", *rlora.methods.__all__, *BUILTIN, *PRESETS, *KNOWN):
        assert names.count(name) == 1, name
        assert len(lines[names.index(name)]) > 1
    assert "scaled_adamw:before" in result.stdout
    assert "`" not in result.stdout  # the markup of docstrings
