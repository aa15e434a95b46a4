"""The ops that methods and models call.

`backend` is `"auto"`, `"torch"` or `"triton"`. The torch versions are the specification. `"auto"` takes Triton for CUDA
tensors where Triton is installed, and torch everywhere else; an explicit backend never falls back to another one.
"""

from tokenprune.ops.max_min import MaxMinCover, MaxMinSelection, max_min_cover, max_min_select

__all__ = ["MaxMinCover", "MaxMinSelection", "max_min_cover", "max_min_select"]
