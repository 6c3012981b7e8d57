"""Attention over two sets of keys, put together from that over each by their log-sum-exps.

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Letters: Q queries, H heads, D head size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import (
    accumulation_dtype,
    launch_warps,
    op,
    row_tile,
    triton_type,
    uses_triton,
)
from thinktwice_kernels.triton.numerics import INFINITY, number


def merge_attention(
    out: Tensor,  # [Q, H, D], any floating type and strides but the last; becomes that over both
    lse: Tensor,  # [H, Q], fp32 or float64, its last stride 1; likewise
    other_out: Tensor,  # [Q, H, D], of the type of `out`
    other_lse: Tensor,  # [H, Q], of the type of `lse`
) -> None:
    """Merge attention over other keys, and its log-sum-exps of the scaled scores in nats, into `out` and `lse`.

    A query that has no others keeps its own, bit for bit: its other log-sum-exp is infinite, of either sign, as
    kernels write it, and its other result is not looked at. The arithmetic is fp32 whatever the type of the results
    (float64 for float64), rounded once; one pass over memory. It has no gradient of its own: each part's backward
    pass, given the merged results, computes its own share of the exact one.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if out.dim() != 3 or other_out.shape != out.shape or other_out.dtype != out.dtype or not out.is_floating_point():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, other_out {other_out.dtype} {list(other_out.shape)}: pass two "
            "[Q, H, D] of one floating-point type"
        )
    queries, heads, _ = out.shape
    kind = accumulation_dtype(out)
    if not lse.shape == other_lse.shape == (heads, queries) or not lse.dtype == other_lse.dtype == kind:
        raise ValueError(
            f"lse is {lse.dtype} {list(lse.shape)}, other_lse {other_lse.dtype} {list(other_lse.shape)}: pass "
            f"[{heads}, {queries}] of {kind}"
        )
    _merge_attention(out, lse, other_out, other_lse)


def merge_attention_reference(
    out: Tensor,  # [Q, H, D]
    lse: Tensor,  # [H, Q]
    other_out: Tensor,  # [Q, H, D]
    other_lse: Tensor,  # [H, Q]
) -> None:
    """`merge_attention` in plain torch; inputs are not checked."""
    none = other_lse.isinf()
    share = (other_lse - lse).sigmoid().T[..., None]
    mixed = torch.lerp(out.to(lse.dtype), other_out.to(lse.dtype), share).to(out.dtype)
    out.copy_(torch.where(none.T[..., None], out, mixed))
    lse.copy_(torch.where(none, lse, torch.logaddexp(lse, other_lse)))


@op("merge_attention", mutates=("out", "lse"))
def _merge_attention(
    out: Tensor,  # [Q, H, D]
    lse: Tensor,  # [H, Q]
    other_out: Tensor,  # [Q, H, D]
    other_lse: Tensor,  # [H, Q]
) -> None:
    if uses_triton(out) and row_tile(out.shape[2]).fits(out.dtype):
        merge_in_triton(out, lse, other_out, other_lse)
    else:
        merge_attention_reference(out, lse, other_out, other_lse)


@_merge_attention.register_fake
def _(*_: Any) -> None:
    pass


@triton.jit(
    do_not_specialize=["lse_stride", "other_lse_stride", "queries"],
    do_not_specialize_on_alignment=["lse_ptr", "other_lse_ptr"],
)
def merge_heads(
    out_ptr,  # [Q, H, D]
    out_stride,  # from query to query
    out_head_stride,
    lse_ptr,  # [H, Q]
    lse_stride,  # from head to head
    other_out_ptr,  # [Q, H, D]
    other_out_stride,
    other_out_head_stride,
    other_lse_ptr,  # [H, Q]
    other_lse_stride,
    queries,  # Q
    dim,  # D
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    known = query < queries
    lse = tl.load(lse_ptr + head * lse_stride + query, mask=known, other=0.0)
    other_lse = tl.load(other_lse_ptr + head * other_lse_stride + query, mask=known, other=0.0)
    none = tl.abs(other_lse) == number(INFINITY, TYPE)
    # Of the smaller by the larger: no exponential overflows.
    ratio = tl.exp(-tl.abs(other_lse - lse))
    share = tl.where(other_lse > lse, number(1.0, TYPE), ratio) / (ratio + 1.0)
    merged = tl.where(other_lse > lse, other_lse, lse) + tl.log(ratio + 1.0)
    # A warp whose rows of the tile ask for a weight reads it for itself, and one warp writes for all.
    tl.debug_barrier()
    tl.store(lse_ptr + head * lse_stride + query, tl.where(none, lse, merged), mask=known)

    there = known[:, None] & (column < dim)
    at_ptr = out_ptr + query[:, None] * out_stride + head * out_head_stride + column
    other_ptr = other_out_ptr + query[:, None] * other_out_stride + head * other_out_head_stride + column
    own = tl.load(at_ptr, mask=there, other=0.0).to(TYPE)
    other = tl.load(other_ptr, mask=there, other=0.0).to(TYPE)
    tl.store(at_ptr, tl.where(none[:, None], own, own + (other - own) * share[:, None]), mask=there)


def merge_in_triton(
    out: Tensor,  # [Q, H, D]
    lse: Tensor,  # [H, Q]
    other_out: Tensor,  # [Q, H, D]
    other_lse: Tensor,  # [H, Q]
) -> None:
    """Into `out` and `lse`."""
    queries, heads, dim = out.shape
    tile = row_tile(dim)
    arguments = {
        "out_ptr": out,
        "out_stride": out.stride(0),
        "out_head_stride": out.stride(1),
        "lse_ptr": lse,
        "lse_stride": lse.stride(0),
        "other_out_ptr": other_out,
        "other_out_stride": other_out.stride(0),
        "other_out_head_stride": other_out.stride(1),
        "other_lse_ptr": other_lse,
        "other_lse_stride": other_lse.stride(0),
        "queries": queries,
        "dim": dim,
        "TYPE": triton_type(lse.dtype),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
    grid = heads, triton.cdiv(queries, tile.rows)
    launch_warps(merge_heads, tile.num_warps, grid, out.device, arguments)
