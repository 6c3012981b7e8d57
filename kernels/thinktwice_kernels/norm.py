"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467), with the residual stream's addition before it.

    h = x + residual                            in their type; h = x where there is no residual
    y = h / sqrt(mean(h^2) + eps) * weight

Letters: R rows, H elements that a norm goes over.
"""

from typing import Any, overload

import torch
from torch import Tensor

from thinktwice_kernels.launch import NAMESPACE, accumulation_dtype, fake_gradient, first_order_only


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
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x has shape {list(x.shape)}, weight {list(weight.shape)}: pass [..., H] and [H]")
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


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    cast_first: bool,
) -> Tensor:
    """y [..., H]."""
    return _forward(x, None, weight, eps, cast_first)[0]


@torch.library.custom_op(f"{NAMESPACE}::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor,  # [..., H]
    residual: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """y and h [..., H]."""
    return _forward(x, residual, weight, eps, cast_first)


@torch.library.custom_op(f"{NAMESPACE}::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_y: Tensor,  # [..., H]
    d_h: Tensor | None,  # [..., H]: what flows into h besides
    h: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of h [..., H] and of the weight, [H] or where it is not wanted [0], in their types."""
    return _gradients_in_torch(d_y, d_h, h, weight, eps, want_weight)


@_rms_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_rms_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))  # type: ignore


@_rms_norm_backward.register_fake
def _(d_y: Any, d_h: Any, h: Tensor, weight: Tensor, eps: Any, want_weight: bool) -> tuple[Tensor, Tensor]:
    d_weight = fake_gradient(weight, want_weight, weight.dtype)
    return torch.empty_like(h, memory_format=torch.contiguous_format), d_weight


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """y, and h where there is a residual (else nothing of use)."""
    found = rms_norm_reference(x, weight, eps, residual=residual, cast_first=cast_first)
    y, h = found if isinstance(found, tuple) else (found, x)
    return y.contiguous(), h.contiguous()


def _gradients_in_torch(
    d_y: Tensor, d_h: Tensor | None, h: Tensor, weight: Tensor, eps: float, want_weight: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(h, weight)
    wide, flow = h.to(dtype), d_y.to(dtype)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, scaled = wide * scale, flow * weight
    of_h = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * scale
    if d_h is not None:
        of_h += d_h
    of_weight = (flow * normed).flatten(0, -2).sum(0) if want_weight else weight.new_empty(0)
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
    ctx.set_materialize_grads(False)  # of the last layers' sum only y may be used, or only h
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
