"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467), with the residual stream's addition before it.

    h = x + residual                            in their type; h = x where there is no residual
    y = h / sqrt(mean(h^2) + eps) * weight

Letters: R rows, H elements that a norm goes over.
"""

from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels import native
from thinktwice_kernels.launch import (
    Tile,
    accumulation_dtype,
    fake_gradient,
    first_order_only,
    launch_warps,
    looping_programs,
    op,
    row_arguments,
    row_tile,
    triton_type,
    uses_triton,
)
from thinktwice_kernels.triton.numerics import number
from thinktwice_kernels.triton.partials import sum_partials


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, cast_first: bool = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: None = ..., cast_first: bool = ...) -> Tensor: ...
def rms_norm(
    x: Tensor,  # [..., H], any floating type
    weight: Tensor,  # [H], any floating type
    eps: float,
    *,
    residual: Tensor | None = None,  # [..., H], of the type of x
    cast_first: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``h / sqrt(mean(h^2) + eps) * weight`` over the last dimension, of ``h = x + residual``.

    Statistics and gradients are fp32 whatever the type of the inputs (float64 for float64). A row's result does not
    depend on the other rows. Forward and backward take one pass over memory each; for the backward pass h is kept,
    nothing else. The gradient cannot be differentiated again: that raises a RuntimeError.

    Args:
        x: [..., H].
        weight: [H]; a frozen one costs no gradient.
        eps: added to the mean of the squares.
        residual: [..., H], added to x first. The sum is rounded to the type of x, and that is what is normed.
        cast_first: round the normed row to the type of x before the weight multiplies it, as Llama, Mistral and Qwen
            do; False: only afterwards, as OLMo does. Of float32 and float64 inputs both are the same.

    Returns:
        y [..., H] in the type of x; with a residual (y, h), h = x + residual.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.numel() == 0:
        raise ValueError(
            f"x has shape {list(x.shape)}, weight {list(weight.shape)}: pass [..., H] and [H], H at least 1"
        )
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x has type {x.dtype}, weight {weight.dtype}: pass floating-point tensors")
    if residual is None:
        return _rms_norm(x, weight, eps, cast_first)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)}: pass it in the type and shape of x, {x.dtype} "
            f"{list(x.shape)}"
        )
    return _add_rms_norm(x, residual, weight, eps, cast_first)


def rms_norm_reference(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    residual: Tensor | None = None,  # [..., H]
    cast_first: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm`, arguments and results alike, in plain torch; inputs are not checked."""
    h = x if residual is None else x + residual
    wide = h.to(accumulation_dtype(x, weight))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = ((normed.to(h.dtype) if cast_first else normed) * weight).to(h.dtype)
    return y if residual is None else (y, h)


@op("rms_norm")
def _rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    cast_first: bool,
) -> Tensor:
    """y [..., H]."""
    return _forward(x, None, weight, eps, cast_first)[0]


@op("add_rms_norm")
def _add_rms_norm(
    x: Tensor,  # [..., H]
    residual: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """y and h [..., H]."""
    return _forward(x, residual, weight, eps, cast_first)


@op("rms_norm_backward")
def _rms_norm_backward(
    d_y: Tensor,  # [..., H]
    d_h: Tensor | None,  # [..., H]: what flows into h besides
    h: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of h [..., H] and of the weight, [H] or where it is not wanted [0], in their types."""
    if uses_triton(h) and row_tile(len(weight)).fits(h.dtype):
        return norm_gradients_in_triton(d_y, d_h, h, weight, eps, want_weight)
    if native.computes(h, weight):
        of_h, of_weight = native.layer_op("rms_norm_backward")(
            d_y.contiguous(), native.contiguous(d_h), h.contiguous(), weight.contiguous(), eps, want_weight
        )
        return of_h.view(h.shape), of_weight
    return norm_gradients_in_torch(d_y, d_h, h, weight, eps, want_weight)


@_rms_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_rms_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y)


@_rms_norm_backward.register_fake
def _(d_y: Any, d_h: Any, h: Tensor, weight: Tensor, eps: Any, want_weight: bool) -> tuple[Tensor, Tensor]:
    d_weight = fake_gradient(weight, want_weight, weight.dtype)
    return torch.empty_like(h, memory_format=torch.contiguous_format), d_weight


def _forward(
    x: Tensor,  # [..., H]
    residual: Tensor | None,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """y, and h where there is a residual (else x)."""
    if uses_triton(x) and row_tile(len(weight)).fits(x.dtype):
        return norm_in_triton(x, residual, weight, eps, cast_first)
    if native.computes(x, weight):
        y, h = native.layer_op("rms_norm")(x.contiguous(), native.contiguous(residual), weight.contiguous(), eps)
        shaped = torch.ops.aten._unsafe_view  # no view for autograd: FSDP2 warns of those that a module gives
        return shaped(y, x.shape), x if residual is None else shaped(h, x.shape)
    found = rms_norm_reference(x, weight, eps, residual=residual, cast_first=cast_first)
    y, h = found if isinstance(found, tuple) else (found, x)
    return y.contiguous(), h.contiguous()


def norm_gradients_in_torch(
    d_y: Tensor,  # [..., H]
    d_h: Tensor | None,  # [..., H]
    h: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """What `_rms_norm_backward` gives."""
    dtype = accumulation_dtype(h, weight)
    wide, flow = h.to(dtype), d_y.to(dtype)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, scaled = wide * scale, flow * weight
    of_h = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * scale
    if d_h is not None:
        of_h += d_h
    of_weight = (flow * normed).reshape(-1, len(weight)).sum(0) if want_weight else weight.new_empty(0)
    return of_h.to(h.dtype).contiguous(), of_weight.to(weight.dtype)


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


@first_order_only
def _backward_norm(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    want_weight = ctx.needs_input_grad[1]
    d_x, d_weight = _rms_norm_backward(d_y, None, x, weight, ctx.eps, want_weight)
    return d_x, d_weight if want_weight else None, None, None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)  # of y and h one may not be used
    ctx.save_for_backward(output[1], weight)


@first_order_only
def _backward_add(ctx: Any, d_y: Tensor | None, d_h: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    if d_y is None:
        return d_h, d_h, *(None,) * 3
    want_weight = ctx.needs_input_grad[2]
    of_h, d_weight = _rms_norm_backward(d_y, d_h, h, weight, ctx.eps, want_weight)
    return of_h, of_h, d_weight if want_weight else None, None, None


_rms_norm.register_autograd(_backward_norm, setup_context=_setup_norm)
_add_rms_norm.register_autograd(_backward_add, setup_context=_setup_add)


@triton.jit
def scale_of(
    squares,  # the sum over a row
    size,
    eps,  # float64
    TYPE: tl.constexpr,
):
    """What a row of `size` elements is multiplied by."""
    return 1.0 / tl.sqrt(squares / size + number(eps, TYPE))


@triton.jit(do_not_specialize=["rows"])
def rms_norm_rows(
    x_ptr,  # [R, H]
    x_stride,  # from row to row
    residual_ptr,  # [R, H] or None
    residual_stride,
    weight_ptr,  # [H]
    y_ptr,  # [R, H]
    h_ptr,  # [R, H] or None
    rows,  # R
    size,  # H
    eps: tl.float64,
    CAST_FIRST: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < size)
    h = tl.load(x_ptr + row * x_stride + column, mask=there, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=there, other=0.0)
        h = (h.to(TYPE) + residual.to(TYPE)).to(h.dtype)
        tl.store(h_ptr + row * size + column, h, mask=there)
    wide = h.to(TYPE)
    normed = wide * scale_of(tl.sum(wide * wide, 1)[:, None], size, eps, TYPE)
    if CAST_FIRST:
        normed = normed.to(h.dtype).to(TYPE)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(TYPE)
    tl.store(y_ptr + row * size + column, normed * weight, mask=there)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_gradients(
    d_y_ptr,  # [R, H]
    d_y_stride,  # from row to row
    d_h_ptr,  # [R, H] or None
    d_h_stride,
    h_ptr,  # [R, H]
    h_stride,
    weight_ptr,  # [H]
    out_ptr,  # [R, H]
    partials_ptr,  # [programs, H] or None
    rows,  # R
    size,  # H
    eps: tl.float64,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    of_weight = tl.zeros((ROWS, COLUMNS), TYPE)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = number(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < size)
        h = tl.load(h_ptr + row * h_stride + column, mask=there, other=0.0).to(TYPE)
        flow = tl.load(d_y_ptr + row * d_y_stride + column, mask=there, other=0.0).to(TYPE)
        scale = scale_of(tl.sum(h * h, 1)[:, None], size, eps, TYPE)
        normed = h * scale
        of_weight += flow * normed
        # Loaded for every row: kept, it would take registers that large rows don't have.
        flow *= tl.load(weight_ptr + column, mask=column < size, other=0.0).to(TYPE)
        of_h = (flow - normed * (tl.sum(flow * normed, 1)[:, None] / size)) * scale
        if d_h_ptr is not None:
            of_h += tl.load(d_h_ptr + row * d_h_stride + column, mask=there, other=0.0).to(TYPE)
        tl.store(out_ptr + row * size + column, of_h, mask=there)
    if partials_ptr is not None:
        own = tl.program_id(0) * size + column
        tl.store(partials_ptr + own, tl.sum(of_weight, 0)[None, :], mask=column < size)


def norm_in_triton(
    x: Tensor,  # [..., H]
    residual: Tensor | None,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """y, and h where there is a residual (else x)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x if residual is None else torch.empty_like(y)
    arguments = {
        **row_arguments("x", x),
        **row_arguments("residual", residual),
        "weight_ptr": weight.contiguous(),
        "y_ptr": y,
        "h_ptr": None if residual is None else h,
        "CAST_FIRST": cast_first,
    }
    tile, shared = _shared_arguments(x, weight, eps)
    launch_warps(rms_norm_rows, tile.num_warps, (-(-shared["rows"] // tile.rows),), x.device, arguments | shared)
    return y, h


def norm_gradients_in_triton(
    d_y: Tensor,  # [..., H]
    d_h: Tensor | None,  # [..., H]
    h: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of h and of the weight, [0] where it is not wanted."""
    of_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    tile, shared = _shared_arguments(h, weight, eps)
    programs = looping_programs(-(-shared["rows"] // tile.rows), tile.num_warps, h.device)
    kind = accumulation_dtype(h, weight)
    partials = torch.empty(programs, len(weight), dtype=kind, device=h.device) if want_weight else None
    arguments = {
        **row_arguments("d_y", d_y),
        **row_arguments("d_h", d_h),
        **row_arguments("h", h),
        "weight_ptr": weight.contiguous(),
        "out_ptr": of_h,
        "partials_ptr": partials,
    }
    launch_warps(rms_norm_gradients, tile.num_warps, (programs,), h.device, arguments | shared)
    return of_h, weight.new_empty(0) if partials is None else sum_partials(partials, weight.dtype)


def _shared_arguments(x: Tensor, weight: Tensor, eps: float) -> tuple[Tile, dict[str, Any]]:
    tile = row_tile(x.shape[-1])
    return tile, {
        "rows": x.numel() // max(x.shape[-1], 1),
        "size": x.shape[-1],
        "eps": eps,
        "TYPE": triton_type(accumulation_dtype(x, weight)),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
