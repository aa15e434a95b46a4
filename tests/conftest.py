"""Test modules import by name what lies in ``helpers``, and each other. So do the processes that they start."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = [str(room) for room in sorted(Path(__file__).parent.iterdir()) if room.is_dir() and room.name[0] not in "_."]

sys.path[:0] = ROOMS
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads wait for each other
os.environ["PYTHONPATH"] = os.pathsep.join([*ROOMS, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def _no_forward_left_open() -> Iterator[None]:
    """What a test interrupts in mid-forward (torch runs no hook then) is no business of the next one."""
    yield
    from tokenprune import running

    running._INNERMOST.set(None)
