"""SwiGLU, the gate of an MLP (Shazeer 2020, arXiv 2002.05202), of a product that holds gate and up side by side.

    y = silu(gate) * up,   silu(g) = g / (1 + exp(-g))

Letters: F elements of a gate.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels import native
from thinktwice_kernels.launch import (
    SHAPES,
    accumulation_dtype,
    first_order_only,
    launch,
    op,
    row_arguments,
    triton_type,
    uses_triton,
)


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
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
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


@op("swiglu")
def _swiglu(
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """[..., F]."""
    if uses_triton(gate_up):
        return swiglu_in_triton(gate_up)
    if native.computes(gate_up):
        rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        return native.layer_op("swiglu")(rows).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return swiglu_reference(gate_up)


@op("swiglu_backward")
def _swiglu_backward(
    d_y: Tensor,  # [..., F]
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """The gradient of `gate_up`, [..., 2 * F]."""
    if uses_triton(gate_up):
        return swiglu_gradient_in_triton(d_y, gate_up)
    if native.computes(gate_up):
        rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        return native.layer_op("swiglu_backward")(d_y.contiguous(), rows).view(gate_up.shape)
    return swiglu_gradient_in_torch(d_y, gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu_backward.register_fake
def _(d_y: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def swiglu_gradient_in_torch(
    d_y: Tensor,  # [..., F]
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """[..., 2 * F]."""
    dtype = accumulation_dtype(gate_up)
    (gate, up), flow = gate_up.to(dtype).chunk(2, -1), d_y.to(dtype)
    sigmoid = gate.sigmoid()
    of_gate = flow * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, flow * gate * sigmoid], -1).to(gate_up.dtype)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@first_order_only
def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return (_swiglu_backward(d_y, *ctx.saved_tensors),)


_swiglu.register_autograd(_backward, setup_context=_setup)


@triton.jit
def gate_and_up(
    row_ptr,  # [2 * F]
    column,
    size,  # F
    TYPE: tl.constexpr,
):
    there = column < size
    gate = tl.load(row_ptr + column, mask=there, other=0.0).to(TYPE)
    return gate, tl.load(row_ptr + size + column, mask=there, other=0.0).to(TYPE)


@triton.jit
def swiglu_rows(
    gate_up_ptr,  # [R, 2 * F]
    gate_up_stride,  # from row to row
    y_ptr,  # [R, F]
    size,  # F
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate, up = gate_and_up(gate_up_ptr + row * gate_up_stride, column, size, TYPE)
    tl.store(y_ptr + row * size + column, gate / (1.0 + tl.exp(-gate)) * up, mask=column < size)


@triton.jit
def swiglu_gradients(
    d_y_ptr,  # [R, F]
    d_y_stride,  # from row to row
    gate_up_ptr,  # [R, 2 * F]
    gate_up_stride,
    out_ptr,  # [R, 2 * F]
    size,  # F
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < size
    gate, up = gate_and_up(gate_up_ptr + row * gate_up_stride, column, size, TYPE)
    flow = tl.load(d_y_ptr + row * d_y_stride + column, mask=there, other=0.0).to(TYPE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    to_ptr = out_ptr + row * (2 * size) + column
    tl.store(to_ptr, flow * up * (sigmoid + silu * (1.0 - sigmoid)), mask=there)
    tl.store(to_ptr + size, flow * silu, mask=there)


def swiglu_in_triton(
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """[..., F]."""
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _launch(swiglu_rows, gate_up, {"y_ptr": y})
    return y


def swiglu_gradient_in_triton(
    d_y: Tensor,  # [..., F]
    gate_up: Tensor,  # [..., 2 * F]
) -> Tensor:
    """[..., 2 * F]."""
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _launch(swiglu_gradients, gate_up, {**row_arguments("d_y", d_y), "out_ptr": out})
    return out


def _launch(kernel: Any, gate_up: Tensor, own: dict[str, Any]) -> None:
    size = gate_up.shape[-1] // 2
    shape = SHAPES["swiglu"]
    columns = shape.lanes(gate_up.itemsize)
    arguments = {
        **row_arguments("gate_up", gate_up),
        **own,
        "size": size,
        "TYPE": triton_type(accumulation_dtype(gate_up)),
        "COLUMNS": columns,
    }
    grid = gate_up.numel() // (2 * size), -(-size // columns)
    launch(kernel, "swiglu", grid, gate_up.device, arguments)
