"""Log-probabilities that are the same in rollouts and in training, bit for bit (`rollout.exact`, float32 on the CPU).

What makes them differ otherwise: a matrix product sums in another order for another number of rows, attention cuts its
keys where the batch makes it, and two programs for one softmax round differently. Here every product goes through the
extension's packed product, whose sums run in the order of the inputs whatever the rows, rollouts and training share one
attention (chunks of 64 keys, ``attention.py``), and both take their log-probabilities from ``token_logprobs``. SiLU is
the extension's too: torch computes the last elements of each thread's share with another function. The rest (norms,
rotary) is torch's, row by row the same.

Letters: N rows, I inputs, O outputs, H hidden size, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from thinktwice_fast.model.csrc import ops
from thinktwice_fast.model.decoder import PANEL
from thinktwice_kernels import token_logprobs

_ROWS = 1024  # of logits that exist at a time


class ExactLinear(nn.Linear):
    """A linear layer whose rows do not depend on each other; made from one by ``make_exact``."""

    _packed: tuple[int, Tensor] | None = None  # version of the weight, and what it was packed to

    def pack(self) -> None:
        """Keep the weight packed until it changes (in place): for rollouts, which read it many times."""
        self._packed = (self.weight._version, _pack(self.weight))

    def packed(self) -> Tensor:
        """The weight as ``packed_linear`` takes it."""
        if self._packed is None:
            return _pack(self.weight)
        if self._packed[0] != self.weight._version:
            ops.pack_weight(self.weight.detach(), self._packed[1], 0)
            self._packed = (self.weight._version, self._packed[1])
        return self._packed[1]

    def forward(self, input: Tensor) -> Tensor:
        return _ExactProduct.apply(input, self.weight, self.bias, self.packed())


class _ExactProduct(torch.autograd.Function):
    """x W^T + b; its gradients are torch's own products, since only the forward pass has to repeat."""

    @staticmethod
    def forward(
        x: Tensor,  # [..., I]
        weight: Tensor,  # [O, I]
        bias: Tensor | None,  # [O]
        packed: Tensor,
    ) -> Tensor:  # [..., O]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = ops.packed_linear(rows, packed, len(weight)).view(*x.shape[:-1], len(weight))
        return out.contiguous() if bias is None else out + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, bias, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_weight = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None


class ExactSiLU(SiLUActivation):
    """SiLU whose elements do not depend on where they stand; made from one by ``make_exact``."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _ExactSiLU.apply(input))


class _ExactSiLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, ops.silu(x.contiguous())).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return grad * gate * (1 + x * (1 - gate))


_EXACT: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ExactLinear, SiLUActivation: ExactSiLU}


def make_exact(model: nn.Module) -> None:
    """Turn the linear layers and SiLUs of a float32 model on the CPU into exact ones, in place."""
    for module in model.modules():
        module.__class__ = _EXACT.get(type(module), type(module))


def make_plain(model: nn.Module) -> None:
    """Undo ``make_exact``."""
    plain = {exact: kind for kind, exact in _EXACT.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))


def pack_weights(model: nn.Module) -> None:
    """Pack every exact layer's weight as it stands."""
    for module in model.modules():
        if isinstance(module, ExactLinear):
            module.pack()


@torch.no_grad()
def exact_logits(
    hidden: Tensor,  # float32 [N, H]
    weight: Tensor,  # float32 [V, H]
    bias: Tensor | None,  # [V]
    packed: Tensor | None = None,  # of the weight, where it is at hand
) -> Tensor:  # float32 [N, V]
    """Logits whose rows do not depend on each other."""
    logits: Tensor = ops.packed_linear(hidden.contiguous(), _pack(weight) if packed is None else packed, len(weight))
    return logits if bias is None else logits + bias


@torch.no_grad()
def exact_logprobs(
    hidden: Tensor,  # float32 [N, H]
    weight: Tensor,  # float32 [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    temperature: float,
) -> Tensor:  # float32 [N]
    """Log-probabilities of the targets, in nats, as rollouts note them."""
    packed = _pack(weight)
    # One for each row, as rollouts have it: a number would be divided by in double precision.
    temperatures = torch.full(targets.shape, temperature)
    pieces = zip(hidden.split(_ROWS), targets.split(_ROWS), temperatures.split(_ROWS), strict=True)
    return torch.cat([token_logprobs(exact_logits(h, weight, bias, packed), t, temperature=c) for h, t, c in pieces])


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
