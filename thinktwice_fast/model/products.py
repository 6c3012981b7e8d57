"""Log-probabilities that are the same in rollouts and in training, bit for bit (`rollout.exact`, float32 on the CPU).

What makes them differ otherwise: a matrix product sums in another order for another number of rows, attention cuts its
keys where the batch makes it, and two programs for one softmax round differently. Here every product is the
extension's packed one, whose sums run in the order of the inputs whatever the rows; rollouts and training share one
attention (chunks of 64 keys, ``attention.py``), and both take their log-probabilities from ``token_logprobs``. Norms,
rotation and gate compute each row by itself anyway.

Letters: N rows, I inputs, O outputs, H hidden size, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor

from thinktwice_fast.model.csrc import ops
from thinktwice_kernels import token_logprobs

PANEL = 16  # outputs side by side in a packed weight, as in csrc/cpu/matmul.h
_ROWS = 1024  # of logits that exist at a time


class PackedProducts:
    """Exact products that keep weights packed, for rollouts, which read each many times."""

    def __init__(self) -> None:
        self._packed: dict[int, Tensor] = {}  # by the weight's address
        self._stale: set[int] = set()

    def refresh(self) -> None:
        """Weights may have changed. They don't say so themselves: fused optimizers leave their version as it was."""
        self._stale.update(self._packed)

    def __call__(
        self,
        x: Tensor,  # float32 [N, I]
        weight: Tensor,  # float32 [O, I]
        bias: Tensor | None,  # [O]
    ) -> Tensor:  # [N, O]
        address = weight.data_ptr()
        if address not in self._packed:
            self._packed[address] = _pack(weight)
        elif address in self._stale:
            ops.pack_weight(weight.detach(), self._packed[address], 0)
        self._stale.discard(address)
        return cast(Tensor, _ExactProduct.apply(x, weight, bias, self._packed[address]))


def exact_product(
    x: Tensor,  # float32 [N, I]
    weight: Tensor,  # float32 [O, I]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [N, O]
    """x W^T + b, whose rows do not depend on each other. Its gradients do: only the forward pass has to repeat."""
    return cast(Tensor, _ExactProduct.apply(x, weight, bias, _pack(weight)))


class _ExactProduct(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor:
        out: Tensor = ops.packed_linear(x.contiguous(), packed, len(weight))
        return out.contiguous() if bias is None else out + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, bias, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        of_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None


@torch.no_grad()
def exact_logprobs(
    hidden: Tensor,  # float32 [N, H]
    weight: Tensor,  # float32 [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    temperature: float,
) -> Tensor:  # float32 [N]
    """Log-probabilities of the targets, in nats, as rollouts note them."""
    product = PackedProducts()
    # One for each row, as rollouts have it: a number would be divided by in double precision.
    temperatures = torch.full(targets.shape, temperature)
    pieces = zip(hidden.split(_ROWS), targets.split(_ROWS), temperatures.split(_ROWS), strict=True)
    return torch.cat([token_logprobs(product(h, weight, bias), t, temperature=c) for h, t, c in pieces])


class WithValue(torch.autograd.Function):
    """The value of the second, the gradient of the first."""

    @staticmethod
    def forward(of_gradient: Tensor, of_value: Tensor) -> Tensor:
        return of_value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@torch.no_grad()
def _pack(weight: Tensor) -> Tensor:
    packed = weight.new_zeros(-(-len(weight) // PANEL), weight.shape[1], PANEL)
    ops.pack_weight(weight.detach(), packed, 0)
    return packed
