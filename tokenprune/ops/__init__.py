"""The ops that methods and models call.

`backend` is `"auto"`, `"torch"` or `"triton"`. The torch versions are the specification. `"auto"` takes Triton for CUDA
tensors where Triton is installed, and torch everywhere else; an explicit backend never falls back to another one.

Every formula is written once for users, here, and once more as a naive loop that the tests compare it with: that oracle
is no part of the library, and lies with the tests.
"""

from tokenprune.ops.attention import attention_importance
from tokenprune.ops.decode import DecodedStep, decode_attention
from tokenprune.ops.max_min import MaxMinCover, MaxMinSelection, max_min_cover, max_min_select
from tokenprune.ops.merging import BipartiteMatch, MergedTokens, bipartite_match, merge_tokens
from tokenprune.ops.planes import Planes, dequantize_planes, quantize_planes
from tokenprune.ops.top_k import top_k_select

__all__ = [
    "BipartiteMatch",
    "DecodedStep",
    "MaxMinCover",
    "MaxMinSelection",
    "MergedTokens",
    "Planes",
    "attention_importance",
    "bipartite_match",
    "decode_attention",
    "dequantize_planes",
    "max_min_cover",
    "max_min_select",
    "merge_tokens",
    "quantize_planes",
    "top_k_select",
]
