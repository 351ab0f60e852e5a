"""Groups of 2 and of 4 processes, each started once for all tests of a file."""

import pytest
from processes import Processes


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """``groups(world)`` is a group of so many processes."""
    started = {}

    def of(world):
        if world not in started or not started[world].alive:
            started[world] = Processes(world, tmp_path_factory.mktemp("store"))
        return started[world]

    yield of
    for group in started.values():
        group.close()
