"""How kernels over packed tokens read them.

Letters: T tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def in_loss_of(loss_mask_ptr, tokens, inside):
    """Which of the tokens are in the loss."""
    if loss_mask_ptr is None:
        return inside
    else:
        return tl.load(loss_mask_ptr + tokens, mask=inside, other=0) != 0


@triton.jit
def of_tokens(values_ptr, tokens, where, own, PER_TOKEN: tl.constexpr):
    """Values of tokens, 0 where they may not be read; `own` is the sequence's, which all of its tokens share."""
    if PER_TOKEN:
        return tl.load(values_ptr + tokens, mask=where, other=0.0).to(tl.float64)
    else:
        return tl.where(where, own, 0.0)


@triton.jit
def read(values_ptr, tokens, where):
    """In float64; 0 where they may not be read."""
    return tl.load(values_ptr + tokens, mask=where, other=0.0).to(tl.float64)


@triton.jit
def any_of(flags):
    """Whether a flag is set in any lane."""
    return tl.max(flags.to(tl.int32), 0) > 0


def mask_bytes(mask: Tensor | None) -> Tensor | None:  # [T] bool -> [T]
    """As kernels take it."""
    return None if mask is None else mask.view(torch.uint8)
