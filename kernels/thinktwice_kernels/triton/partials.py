"""Sums that programs left behind, added up in a fixed order: gradients that do not change from run to run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import launch_warps

_ROWS, _COLUMNS, _WARPS = 64, 32, 4


@triton.jit(do_not_specialize=["count"])
def sum_rows(
    partials_ptr,  # [count, size]
    out_ptr,  # [size]
    count,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), partials_ptr.dtype.element_ty)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < count)[:, None] & (column < size)[None, :]
        total += tl.load(partials_ptr + row[:, None] * size + column[None, :], mask=there, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < size)


def sum_partials(
    partials: Tensor,  # [programs, size], fp32 or float64
    dtype: torch.dtype,
) -> Tensor:  # [size]
    """The sum over the programs, rounded to `dtype`."""
    count, size = partials.shape
    out = torch.empty(size, dtype=dtype, device=partials.device)
    arguments = {"partials_ptr": partials, "out_ptr": out, "count": count, "size": size}
    blocks = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    launch_warps(sum_rows, _WARPS, (-(-size // _COLUMNS),), partials.device, arguments | blocks)
    return out
