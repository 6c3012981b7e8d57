"""Gradients of weights in a 16-bit type go to their float32 masters as soon as they are computed.

Where they come out of a product of the layers, this adds its float32 sums to what the master has: they are never
rounded, and no pass over memory widens and adds them. Those of embedding, head, norms and biases are widened once
autograd has them.

Letters: T tokens, I inputs, O outputs.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from thinktwice_kernels.rows import add_product


class MasterProduct:
    """x W^T + b; backward, the gradient of W adds up in its master's, and W gets none.

    For a GPU: a CPU's products do not give their float32 sums, so that there both factors are widened.

    Args:
        masters: float32 leaves, by the weights; with another weight this is ``linear``.
    """

    def __init__(self, masters: Mapping[Tensor, Tensor]):
        self._masters = masters

    def __call__(
        self,
        x: Tensor,  # [T, I]
        weight: Tensor,  # [O, I]
        bias: Tensor | None,  # [O]
    ) -> Tensor:  # [T, O]
        master = self._masters.get(weight)
        if master is None or not (weight.requires_grad and torch.is_grad_enabled()):
            return linear(x, weight, bias)
        return cast(Tensor, _Product.apply(x, weight, bias, master))


def hand_over_gradients(masters: Mapping[Tensor, Tensor]) -> None:
    """Have weights give away what autograd computes: micro-batches add up in float32, and no second gradient stays.

    Args:
        masters: float32 leaves, by the weights.
    """
    for weight, master in masters.items():
        weight.register_post_accumulate_grad_hook(partial(_hand_over, master))


@torch.no_grad()
def _hand_over(master: Tensor, weight: Tensor) -> None:
    if weight.grad is None:  # its product's is where it belongs
        return
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, master: Tensor) -> Tensor:
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, ctx.master = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        master = ctx.master
        is_first = master.grad is None
        if is_first:
            master.grad = torch.empty_like(master)
        add_product(master.grad, grad, x, beta=int(not is_first))
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None
