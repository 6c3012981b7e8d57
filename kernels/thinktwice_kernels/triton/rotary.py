"""Kernels of `thinktwice_kernels.rotary`: split, norm, rotation, forward and backward in one pass each.

A program has all heads of a token in its registers, lower and upper halves apart, so that a norm goes over one head or
over all of them without another pass. Going back, it takes every so-many-th token and adds up the gradients of the
norms' weights, which `partials` sums.

Letters: T tokens, Q / K query / key-value heads, D head size.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import (
    Tile,
    accumulation_dtype,
    launch_warps,
    looping_programs,
    row_arguments,
    triton_type,
)
from thinktwice_kernels.norm import scale_of
from thinktwice_kernels.triton.numerics import number
from thinktwice_kernels.triton.partials import sum_partials


@triton.jit
def angles(
    cos_ptr,  # of the token
    sin_ptr,
    column,
    half,
    SHARED: tl.constexpr,  # both halves have the same angles
    TYPE: tl.constexpr,
):
    """Of the lower and the upper half: cos_low, cos_high, sin_low, sin_high."""
    there = column < half
    cos_low = tl.load(cos_ptr + column, mask=there, other=0.0).to(TYPE)
    sin_low = tl.load(sin_ptr + column, mask=there, other=0.0).to(TYPE)
    cos_high, sin_high = cos_low, sin_low
    if not SHARED:
        cos_high = tl.load(cos_ptr + half + column, mask=there, other=0.0).to(TYPE)
        sin_high = tl.load(sin_ptr + half + column, mask=there, other=0.0).to(TYPE)
    return cos_low, cos_high, sin_low, sin_high


@triton.jit
def load_halves(ptr, at, half, there, TYPE: tl.constexpr):
    low = tl.load(ptr + at, mask=there, other=0.0).to(TYPE)
    return low, tl.load(ptr + at + half, mask=there, other=0.0).to(TYPE)


@triton.jit
def store_halves(ptr, at, half, there, low, high):
    tl.store(ptr + at, low, mask=there)
    tl.store(ptr + at + half, high, mask=there)


@triton.jit
def head_sums(x, WHOLE: tl.constexpr):
    """Over the elements that a norm goes over: [heads, columns] -> [heads, 1] or, over all heads, [1, 1]."""
    sums = tl.sum(x, 1)[:, None]
    if WHOLE:
        sums = tl.sum(sums, 0)[:, None]
    return sums


@triton.jit
def head_scale(low, high, heads, half, eps, WHOLE: tl.constexpr, TYPE: tl.constexpr):
    size = 2 * half * (heads if WHOLE else 1)
    return scale_of(head_sums(low * low + high * high, WHOLE), size, eps, TYPE)


@triton.jit
def load_norm(norm_ptr, head, column, heads, half, WHOLE: tl.constexpr, TYPE: tl.constexpr):
    """The weight's halves: [heads, columns], or [1, columns] where the heads share it."""
    if WHOLE:
        at, there = head * (2 * half) + column, (head < heads) & (column < half)
    else:
        at, there = column, column < half
    return load_halves(norm_ptr, at, half, there, TYPE)


@triton.jit
def turn_heads(
    x_ptr,  # [heads, D] of the token
    norm_ptr,  # [D] or [heads * D], or None
    out_ptr,  # [heads, D]
    cos_low,  # [1, D / 2], as the following
    cos_high,
    sin_low,
    sin_high,
    heads,
    half,
    eps,
    WHOLE: tl.constexpr,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    there = (head < heads) & (column < half)
    at = head * (2 * half) + column
    low, high = load_halves(x_ptr, at, half, there, TYPE)
    if norm_ptr is not None:
        scale = head_scale(low, high, heads, half, eps, WHOLE, TYPE)
        weight_low, weight_high = load_norm(norm_ptr, head, column, heads, half, WHOLE, TYPE)
        low, high = low * scale * weight_low, high * scale * weight_high
    store_halves(out_ptr, at, half, there, low * cos_low - high * sin_low, high * cos_high + low * sin_high)


@triton.jit
def store_norm_partials(
    partials_ptr,  # [programs, D] or [programs, heads * D]
    of_low,  # [heads, D / 2]
    of_high,
    heads,
    half,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    own_ptr = partials_ptr + tl.program_id(0) * (2 * half * (heads if WHOLE else 1))
    if WHOLE:
        there = (head < heads) & (column < half)
        store_halves(own_ptr, head * (2 * half) + column, half, there, of_low, of_high)
    else:
        low, high = tl.sum(of_low, 0)[None, :], tl.sum(of_high, 0)[None, :]
        store_halves(own_ptr, column, half, column < half, low, high)


@triton.jit
def turn_heads_back(
    flow_ptr,  # [T, heads, D]: the gradient of what turn_heads gives
    x_ptr,  # the first of [T, heads, D]; needed with a norm
    x_stride,  # from token to token
    norm_ptr,  # [D] or [heads * D], or None
    out_ptr,  # the first of [T, heads, D]
    out_stride,
    partials_ptr,  # [programs, elements of the norm], or None
    cos_ptr,  # [T, D] or [T, D / 2]
    cos_stride,
    sin_ptr,  # likewise
    sin_stride,
    tokens,
    heads,
    half,
    eps,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The program's share of the tokens."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    there = (head < heads) & (column < half)
    at = head * (2 * half) + column
    of_low = tl.zeros((HEADS, HALF), TYPE)  # of the norm's weight, heads apart
    of_high = tl.zeros((HEADS, HALF), TYPE)
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = number(index, tl.int64)
        cos_low, cos_high, sin_low, sin_high = angles(
            cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, column, half, SHARED, TYPE
        )
        flow_low, flow_high = load_halves(flow_ptr + token * (heads * 2 * half), at, half, there, TYPE)
        low = flow_low * cos_low + flow_high * sin_high
        high = flow_high * cos_high - flow_low * sin_low
        if norm_ptr is not None:
            n_low, n_high = load_halves(x_ptr + token * x_stride, at, half, there, TYPE)
            scale = head_scale(n_low, n_high, heads, half, eps, WHOLE, TYPE)
            n_low, n_high = n_low * scale, n_high * scale
            of_low += low * n_low
            of_high += high * n_high
            weight_low, weight_high = load_norm(norm_ptr, head, column, heads, half, WHOLE, TYPE)
            low, high = low * weight_low, high * weight_high
            shared = head_sums(low * n_low + high * n_high, WHOLE) / (2 * half * (heads if WHOLE else 1))
            low, high = (low - n_low * shared) * scale, (high - n_high * shared) * scale
        store_halves(out_ptr + token * out_stride, at, half, there, low, high)
    if partials_ptr is not None:
        store_norm_partials(partials_ptr, of_low, of_high, heads, half, WHOLE, HEADS, HALF)


@triton.jit
def copy_row(from_ptr, to_ptr, size, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    tl.store(to_ptr + column, tl.load(from_ptr + column, mask=column < size), mask=column < size)


@triton.jit
def rotary_heads(
    qkv_ptr,  # [T, (Q + 2 * K) * D]
    qkv_stride,  # from token to token
    cos_ptr,  # [T, D] or [T, D / 2]
    cos_stride,
    sin_ptr,  # likewise
    sin_stride,
    q_norm_ptr,  # [D] or [Q * D], or None
    k_norm_ptr,  # [D] or [K * D], or None
    q_ptr,  # [T, Q, D]
    k_ptr,  # [T, K, D]
    v_ptr,  # [T, K, D]
    query_heads,  # Q
    kv_heads,  # K
    half,  # D / 2
    eps: tl.float64,
    SHARED: tl.constexpr,
    Q_WHOLE: tl.constexpr,
    K_WHOLE: tl.constexpr,
    TYPE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    q_size, k_size = query_heads * (2 * half), kv_heads * (2 * half)
    row_ptr = qkv_ptr + token * qkv_stride
    column = tl.arange(0, HALF)[None, :]
    cos_low, cos_high, sin_low, sin_high = angles(
        cos_ptr + token * cos_stride, sin_ptr + token * sin_stride, column, half, SHARED, TYPE
    )
    turn_heads(
        row_ptr, q_norm_ptr, q_ptr + token * q_size, cos_low, cos_high, sin_low, sin_high,
        query_heads, half, eps, Q_WHOLE, TYPE, Q_HEADS, HALF,
    )  # fmt: skip
    turn_heads(
        row_ptr + q_size, k_norm_ptr, k_ptr + token * k_size, cos_low, cos_high, sin_low, sin_high,
        kv_heads, half, eps, K_WHOLE, TYPE, K_HEADS, HALF,
    )  # fmt: skip
    copy_row(row_ptr + q_size + k_size, v_ptr + token * k_size, k_size, 2 * K_HEADS * HALF)


@triton.jit(do_not_specialize=["tokens"])
def rotary_gradients(
    d_q_ptr,  # [T, Q, D]
    d_k_ptr,  # [T, K, D]
    d_v_ptr,  # [T, K, D]
    qkv_ptr,  # [T, (Q + 2 * K) * D], or None where there are no norms
    qkv_stride,  # from token to token
    cos_ptr,  # [T, D] or [T, D / 2]
    cos_stride,
    sin_ptr,  # likewise
    sin_stride,
    q_norm_ptr,  # [D] or [Q * D], or None
    k_norm_ptr,  # [D] or [K * D], or None
    out_ptr,  # [T, (Q + 2 * K) * D]
    q_partials_ptr,  # [programs, elements of q_norm], or None
    k_partials_ptr,  # [programs, elements of k_norm], or None
    tokens,
    query_heads,  # Q
    kv_heads,  # K
    half,  # D / 2
    eps: tl.float64,
    SHARED: tl.constexpr,
    Q_WHOLE: tl.constexpr,
    K_WHOLE: tl.constexpr,
    TYPE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    q_size, k_size = query_heads * (2 * half), kv_heads * (2 * half)
    width = q_size + 2 * k_size
    x_ptr = out_ptr if qkv_ptr is None else qkv_ptr  # read only where there are norms
    # One after another, so that the registers hold the sums of one norm at a time.
    turn_heads_back(
        d_q_ptr, x_ptr, qkv_stride, q_norm_ptr, out_ptr, width, q_partials_ptr,
        cos_ptr, cos_stride, sin_ptr, sin_stride, tokens, query_heads, half, eps, Q_WHOLE, SHARED, TYPE, Q_HEADS, HALF,
    )  # fmt: skip
    turn_heads_back(
        d_k_ptr, x_ptr + q_size, qkv_stride, k_norm_ptr, out_ptr + q_size, width, k_partials_ptr,
        cos_ptr, cos_stride, sin_ptr, sin_stride, tokens, kv_heads, half, eps, K_WHOLE, SHARED, TYPE, K_HEADS, HALF,
    )  # fmt: skip
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = number(index, tl.int64)
        copy_row(d_v_ptr + token * k_size, out_ptr + token * width + q_size + k_size, k_size, 2 * K_HEADS * HALF)


def rotary_in_triton(
    qkv: Tensor,  # [T, (Q + 2 * K) * D]
    cos: Tensor,  # [T, D] or [T, D / 2]
    sin: Tensor,  # likewise
    query_heads: int,
    kv_heads: int,
    q_norm: Tensor | None,  # [D] or [Q * D]
    k_norm: Tensor | None,  # [D] or [K * D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Q, D], k and v [T, K, D]."""
    tokens, dim = qkv.shape[0], qkv.shape[1] // (query_heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(tokens, heads, dim) for heads in (query_heads, kv_heads, kv_heads))
    arguments = row_arguments("qkv", qkv) | {"q_ptr": q, "k_ptr": k, "v_ptr": v}
    shared = _shared_arguments(q, k, cos, sin, q_norm, k_norm, eps)
    launch_warps(rotary_heads, _tile(query_heads, dim).num_warps, (tokens,), qkv.device, arguments | shared)
    return q, k, v


def rotary_gradients_in_triton(
    d_q: Tensor,  # [T, Q, D]
    d_k: Tensor,  # [T, K, D]
    d_v: Tensor,  # [T, K, D]
    qkv: Tensor | None,  # [T, (Q + 2 * K) * D]
    cos: Tensor,  # [T, D] or [T, D / 2]
    sin: Tensor,  # likewise
    q_norm: Tensor | None,  # [D] or [Q * D]
    k_norm: Tensor | None,  # [D] or [K * D]
    eps: float,
    want_q_norm: bool,
    want_k_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `qkv`, `q_norm` and `k_norm`, [0] for a norm whose gradient is not wanted."""
    (tokens, query_heads, dim), kv_heads = d_q.shape, d_k.shape[1]
    warps = min(_tile(query_heads, dim).num_warps, 8)  # with 16 sm_80 would have to put registers aside
    programs = looping_programs(tokens, warps, d_q.device) if want_q_norm or want_k_norm else tokens
    d_qkv = d_q.new_empty(tokens, (query_heads + 2 * kv_heads) * dim)
    kind = accumulation_dtype(d_q)
    q_partials, k_partials = (
        torch.empty(programs, len(norm), dtype=kind, device=d_q.device) if norm is not None and wanted else None
        for norm, wanted in ((q_norm, want_q_norm), (k_norm, want_k_norm))
    )
    arguments = {
        "d_q_ptr": d_q.contiguous(),
        "d_k_ptr": d_k.contiguous(),
        "d_v_ptr": d_v.contiguous(),
        **row_arguments("qkv", qkv),
        "out_ptr": d_qkv,
        "q_partials_ptr": q_partials,
        "k_partials_ptr": k_partials,
        "tokens": tokens,
    }
    shared = _shared_arguments(d_q, d_k, cos, sin, q_norm, k_norm, eps)
    launch_warps(rotary_gradients, warps, (programs,), d_q.device, arguments | shared)
    d_q_norm, d_k_norm = (
        d_q.new_empty(0) if norm is None or partials is None else sum_partials(partials, norm.dtype)
        for norm, partials in ((q_norm, q_partials), (k_norm, k_partials))
    )
    return d_qkv, d_q_norm, d_k_norm


def _shared_arguments(
    q: Tensor,  # [T, Q, D]
    k: Tensor,  # [T, K, D]
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> dict[str, Any]:
    (_, query_heads, dim), kv_heads = q.shape, k.shape[1]
    return {
        **row_arguments("cos", cos),
        **row_arguments("sin", sin),
        "q_norm_ptr": None if q_norm is None else q_norm.contiguous(),
        "k_norm_ptr": None if k_norm is None else k_norm.contiguous(),
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "half": dim // 2,
        "eps": eps,
        "SHARED": cos.shape[1] != dim,
        "Q_WHOLE": q_norm is not None and len(q_norm) != dim,
        "K_WHOLE": k_norm is not None and len(k_norm) != dim,
        "TYPE": triton_type(accumulation_dtype(q)),
        "Q_HEADS": _tile(query_heads, dim).rows,
        "K_HEADS": _tile(kv_heads, dim).rows,
        "HALF": _tile(kv_heads, dim).columns // 2,
    }


@lru_cache
def _tile(heads: int, dim: int) -> Tile:
    """A token's heads."""
    return Tile(triton.next_power_of_2(heads), 2 * triton.next_power_of_2(dim // 2))


def fits_registers(query_heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether a program can hold a token's heads, their gradient and that of their norm without spilling."""
    tile = _tile(max(query_heads, kv_heads), dim)
    return tile.fits(dtype) and tile.num_warps <= 16  # with 32 a thread has only 64 registers
