"""The rows of several records together, each with what its record knows of it."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from rlora.cli.console import one_line

from .schema import Record, Row

MACHINE: Final = ("cpu", "cpus", "system", "accelerators")
"""Keys of the environment that make a set-up, with the number of threads."""


class Measured(NamedTuple):
    """A row, and what its record knows of it."""

    row: Row
    setup: str
    home: str
    """Backend and device of the baseline that it is compared with."""

    baseline: int | None
    """Bytes of AdamW's state on the same problem."""

    @property
    def source(self) -> str:
        """The model or the adapter."""
        return one_line(self.row["preset"] or self.row["adapter"] or "unnamed")

    @property
    def plain(self) -> bool:
        """Return whether others are compared with it."""
        row = self.row
        return (row["method"], row["backend"]) == (row["ratio_to"], row["ratio_to_backend"])


def setups(records: Sequence[Record]) -> list[str]:
    """Name what each record was measured on; nothing, if all of them are of the same."""
    kinds = [
        (*(str(record["environment"][key]) for key in MACHINE), record["command"]["threads"])
        for record in records
    ]
    different = list(dict.fromkeys(kinds))
    if len(different) < 2:
        return [""] * len(records)
    return [f"set-up {1 + different.index(kind)}" for kind in kinds]


def join(records: Sequence[Record]) -> list[Measured]:
    """Take the rows of all records; of one that was measured again on the same set-up the last."""
    found = {}
    for record, setup in zip(records, setups(records), strict=True):
        plains = {(*problem(row), row["backend"], row["method"]): row for row in record["rows"]}
        for row in record["rows"]:
            where = (*problem(row), row["ratio_to_backend"])
            baseline = plains.get((*where, "adamw"))
            home = plains.get((*where, row["ratio_to"]), row)
            key = (setup, *problem(row), row["backend"], row["device"], row["method"])
            found[key] = Measured(
                row,
                setup,
                one_line(f"{row['ratio_to_backend']} {home['device']}"),
                baseline["state_bytes"] if baseline else None,
            )
    return list(found.values())


def problem(row: Row) -> tuple[str, ...]:
    """Name what a row was measured on; adapters of one name may have other shapes."""
    keys = ("dtype", "preset", "adapter", "rank", "pairs", "parameters")
    return tuple(str(row[key]) for key in keys)
