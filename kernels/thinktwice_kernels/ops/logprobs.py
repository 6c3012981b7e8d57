"""The custom ops under `token_logprobs` and `linear_logprobs`, with fake versions and gradients: call those, not these.

An optional result that is not wanted is empty, [0]: schemas have no optional results. Temperatures come as a number,
or as a tensor [T] that then counts instead.

Letters: T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from thinktwice_kernels.backends import backend_of
from thinktwice_kernels.first_order import first_order_only
from thinktwice_kernels.linear_head import logprobs_backward, logprobs_forward
from thinktwice_kernels.ops.common import NAMESPACE, fake_gradient, head_of
from thinktwice_kernels.packed import accumulation_dtype


@torch.library.custom_op(f"{NAMESPACE}::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T] int64
    temperature: float,
    temperatures: Tensor | None,  # [T]
    want_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], log-sum-exp [T], entropy [T]."""
    head = head_of(None, temperature, temperatures, None)
    logps, lse, entropy = backend_of(logits).row_statistics(logits, targets, head, want_entropy)
    return logps, lse, logps.new_empty(0) if entropy is None else entropy


@token_logprobs.register_fake
def _(logits: Tensor, targets: Tensor, _1: Any, _2: Any, want_entropy: bool, _3: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(logits.shape[0], want_entropy, logits)


@torch.library.custom_op(f"{NAMESPACE}::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T]
    temperature: float,
    temperatures: Tensor | None,  # [T]
    lse: Tensor,  # [T]
    entropy: Tensor,  # [T] or [0]
    d_logps: Tensor | None,  # [T]
    d_entropy: Tensor | None,  # [T]
) -> Tensor:
    """The gradient of the logits, [T, V] in their type."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _token_gradient(logits, targets, temperature, temperatures, lse, entropy, d_logps, d_entropy, out)
    return out


@token_logprobs_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::token_logprobs_backward_", mutates_args=("logits",))
def token_logprobs_backward_(
    logits: Tensor,  # [T, V], becomes its gradient
    targets: Tensor,  # [T]
    temperature: float,
    temperatures: Tensor | None,  # [T]
    lse: Tensor,  # [T]
    entropy: Tensor,  # [T] or [0]
    d_logps: Tensor | None,  # [T]
    d_entropy: Tensor | None,  # [T]
) -> None:
    """`token_logprobs_backward` in the memory of the logits."""
    _token_gradient(logits, targets, temperature, temperatures, lse, entropy, d_logps, d_entropy, logits)


def _token_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    d_logps: Tensor | None,
    d_entropy: Tensor | None,
    out: Tensor,
) -> None:
    if d_logps is None and d_entropy is None:
        out.zero_()
        return
    head = head_of(None, temperature, temperatures, None)
    backend = backend_of(logits)
    known = entropy if entropy.numel() else None
    backend.row_gradient(logits, targets, head, lse, known, d_logps, d_entropy, None, out)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature, temperatures, _, ctx.inplace = inputs
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, targets, temperatures, lse, entropy)


@first_order_only
def _token_backward(ctx: Any, d_logps: Tensor | None, _: None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, lse, entropy = ctx.saved_tensors
    arguments = targets, ctx.temperature, temperatures, lse, entropy, d_logps, _of_tokens(d_entropy)
    if ctx.inplace:
        gradient = logits.detach()
        token_logprobs_backward_(gradient, *arguments)
    else:
        gradient = token_logprobs_backward(logits, *arguments)
    return gradient, *(None,) * 5


token_logprobs.register_autograd(_token_backward, setup_context=_token_setup)


@torch.library.custom_op(f"{NAMESPACE}::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T] int64
    temperature: float,
    temperatures: Tensor | None,  # [T]
    softcap: float | None,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], log-sum-exp [T], entropy [T]."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(bias, temperature, temperatures, softcap)
        return logprobs_forward(hidden, weight, targets, head, want_entropy)


@linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Any, _1: Any, _2: Any, _3: Any, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(hidden.shape[0], want_entropy, hidden, weight)


@torch.library.custom_op(f"{NAMESPACE}::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    temperature: float,
    temperatures: Tensor | None,  # [T]
    softcap: float | None,
    lse: Tensor,  # [T]
    entropy: Tensor,  # [T] or [0]
    d_logps: Tensor | None,  # [T]
    d_entropy: Tensor | None,  # [T]
    wanted: Sequence[bool],  # the gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """The wanted gradients, in the types of their inputs."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(bias, temperature, temperatures, softcap)
        known = entropy if entropy.numel() else None
        of_hidden, of_weight, of_bias = logprobs_backward(
            hidden, weight, targets, head, lse, known, d_logps, d_entropy, cast(Any, tuple(wanted))
        )
    return (
        of_hidden.to(hidden.dtype),
        of_weight.to(weight.dtype),
        of_bias.to(weight.dtype if bias is None else bias.dtype),
    )


@linear_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    like = hidden, weight, weight.new_empty(0) if bias is None else bias
    return cast(Any, tuple(fake_gradient(x, wanted, x.dtype) for x, wanted in zip(like, rest[-1], strict=True)))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.temperature, temperatures, ctx.softcap, _ = inputs
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, lse, entropy)


@first_order_only
def _linear_backward(ctx: Any, d_logps: Tensor | None, _: None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, temperatures, lse, entropy = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = linear_logprobs_backward(
        hidden, weight, bias, targets, ctx.temperature, temperatures, ctx.softcap, lse, entropy, d_logps,
        _of_tokens(d_entropy), wanted,
    )  # fmt: skip
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *(None,) * 5


linear_logprobs.register_autograd(_linear_backward, setup_context=_linear_setup)


def _of_tokens(d_entropy: Tensor | None) -> Tensor | None:
    return None if d_entropy is None or d_entropy.numel() == 0 else d_entropy


def _fake_results(tokens: int, want_entropy: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(*inputs)

    def numbers(count: int) -> Tensor:
        return inputs[0].new_empty(count, dtype=dtype)

    return numbers(tokens), numbers(tokens), numbers(tokens if want_entropy else 0)
