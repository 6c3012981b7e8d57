"""SwiGLU, the gate of an MLP (Shazeer 2020, arXiv 2002.05202), of a product that holds gate and up side by side.

    y = silu(gate) * up,   silu(g) = g / (1 + exp(-g))

Letters: F elements of a gate.
"""

from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels.launch import NAMESPACE, accumulation_dtype, first_order_only


def swiglu(
    gate_up: Tensor,  # [..., 2 * F], a row's gate, then its up; any floating type
) -> Tensor:  # [..., F]
    """``silu(gate) * up`` of the joint product of both.

    The arithmetic is fp32 whatever the type of the input (float64 for float64), rounded once. Forward and backward
    take one pass over memory each; for the backward pass the input is kept, nothing else. The gradient cannot be
    differentiated again: that raises a RuntimeError.

    Returns:
        [..., F] in the type of `gate_up`.

    Raises:
        ValueError: a last dimension that has no two halves, or another type.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}: pass [..., 2 * F], gate and up side by side")
    if not gate_up.is_floating_point():
        raise ValueError(f"gate_up has type {gate_up.dtype}: pass a floating-point tensor")
    return _swiglu(gate_up)


def swiglu_reference(
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:  # [..., F]
    """`swiglu` in plain torch; the input is not checked."""
    gate, up = gate_up.to(accumulation_dtype(gate_up)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@torch.library.custom_op(f"{NAMESPACE}::swiglu", mutates_args=())
def _swiglu(
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """[..., F]."""
    return swiglu_reference(gate_up)


@torch.library.custom_op(f"{NAMESPACE}::swiglu_backward", mutates_args=())
def _swiglu_backward(
    d_y: Tensor,  # [..., F]
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """The gradient of `gate_up`, [..., 2 * F]."""
    dtype = accumulation_dtype(gate_up)
    (gate, up), flow = gate_up.to(dtype).chunk(2, -1), d_y.to(dtype)
    sigmoid = gate.sigmoid()
    of_gate = flow * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, flow * gate * sigmoid], -1).to(gate_up.dtype)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu_backward.register_fake
def _(d_y: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@first_order_only
def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return (_swiglu_backward(d_y, *ctx.saved_tensors),)


_swiglu.register_autograd(_backward, setup_context=_setup)
