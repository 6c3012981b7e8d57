"""A tensor times a number that lies on the device, rounded to another type on the way.

Letters: N elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import SHAPES, accumulation_dtype, launch


@triton.jit
def _narrowed(values, TYPE: tl.constexpr):
    """float64 goes to the 16-bit types by way of fp32, as torch has it; not every GPU knows the direct way."""
    if tl.float64 == TYPE or values.dtype == tl.float32:
        return values.to(TYPE)
    else:
        return values.to(tl.float32).to(TYPE)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["by_ptr"])
def scale(
    values_ptr,  # [N]
    by_ptr,  # [1]
    out_ptr,  # [N], or `values_ptr`
    size: tl.int64,  # N
    TYPE: tl.constexpr,  # of the product
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * LANES
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    by = tl.load(by_ptr).to(TYPE)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    positions = first + tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if first + BLOCK <= size:  # without a mask, which would cut vectors up where N is no multiple of them
        values = tl.load(values_ptr + positions).to(TYPE)
        tl.store(out_ptr + positions, _narrowed(values * by, OUT))
    else:
        there = positions < size
        values = tl.load(values_ptr + positions, mask=there, other=0.0).to(TYPE)
        tl.store(out_ptr + positions, _narrowed(values * by, OUT), mask=there)


def scale_in_triton(
    values: Tensor,  # of any shape, contiguous
    by: Tensor,  # a number, without dimensions
    out: Tensor,  # of the same shape, contiguous, any floating type; or `values` itself
) -> None:
    """The product in the accumulation type of the two, rounded to the type of `out`."""
    shape = SHAPES["scale"]
    lanes = shape.lanes(values.itemsize)
    arguments = {
        "values_ptr": values,
        "by_ptr": by,
        "out_ptr": out,
        "size": values.numel(),
        "TYPE": tl.float64 if accumulation_dtype(values, by) == torch.float64 else tl.float32,
        "VECTORS": shape.vectors,
        "LANES": lanes,
    }
    launch(scale, "scale", (-(-values.numel() // (shape.vectors * lanes)),), values.device, arguments)
