"""What several kernels share: masks, operands of products, and what a device offers."""

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # Kernels run on CPU tensors too.
_WIDEN = tl.constexpr(INTERPRETED)  # The interpreter multiplies bf16 as if it were integers.
EXACT = {"enable_fp_fusion": False}  # Options of kernels whose results must not depend on what a compiler fuses.


@triton.jit
def taking_part(mask, place, inside, HAS_MASK: tl.constexpr):
    """Which of the entries `inside` take part: those whose byte of `mask` is not 0, or all without a mask."""
    if HAS_MASK:
        inside = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    return inside


@triton.jit
def operand(block):
    """Half precision multiplies exactly into fp32 on the tensor cores; fp64 is narrowed to the fp32 of the rules."""
    if _WIDEN or block.dtype == tl.float64:
        block = block.to(tl.float32)
    return block


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a GPU; in the interpreter, as many as on Hopper."""
    if device.type != "cuda":
        return 227 << 10
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
