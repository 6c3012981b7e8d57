"""Backward passes that must not be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class _SecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the ops of thinktwice_kernels have no second derivative: drop create_graph=True, or use "
            "thinktwice_kernels.reference"
        )


def first_order_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make the second derivative an error, for ``backward(ctx, *gradients)`` with its inputs in ctx.saved_tensors.

    It finds ctx.creates_graph set: whether what it gives may be looked at again.

    torch's once_differentiable lets create_graph=True pass in silence when the incoming gradient is a constant, and
    the second derivative then lacks this op's share.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Gradients:
        ctx.creates_graph = torch.is_grad_enabled()
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        sources = [tensor for tensor in (*ctx.saved_tensors, *gradients) if tensor is not None and tensor.requires_grad]
        return tuple(None if result is None else _SecondOrder.apply(result, *sources) for result in results)

    return wrapped
