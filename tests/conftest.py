"""Test modules import by name what lies in ``helpers``, and each other. So do the processes that they start."""

import os
import sys
from pathlib import Path

ROOMS = [str(room) for room in sorted(Path(__file__).parent.iterdir()) if room.is_dir() and room.name[0] not in "_."]

sys.path[:0] = ROOMS
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads wait for each other
os.environ["PYTHONPATH"] = os.pathsep.join([*ROOMS, *filter(None, [os.environ.get("PYTHONPATH")])])
