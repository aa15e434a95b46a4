"""Alias of the top-level ``kernels/`` folder in a checkout.

An installed distribution gets the files of ``kernels/`` in this package's place, without this file. In a checkout the
files stay in the top-level folder, which this module appends to the package's search path.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
