"""Helpers of the tests, for scripts that run on their own: what transformers renames, and arithmetic by formula."""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
upstream = importlib.import_module("upstream")
decoder_flops_g = importlib.import_module("decoder_flops").decoder_flops_g
flops_g = importlib.import_module("measuring").flops_g
