"""The tests' helper of what transformers renames, for scripts that run on their own: `upstream`."""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
upstream = importlib.import_module("upstream")
