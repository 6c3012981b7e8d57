"""Log-probabilities of given tokens, and the entropies they were drawn at.

Letters: T tokens, V vocabulary, H hidden size.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinktwice_kernels.ops import logprobs as ops
from thinktwice_kernels.packed import accumulation_dtype
from thinktwice_kernels.products import accumulated_logits
from thinktwice_kernels.reference.logprobs import linear_logits as reference_logits


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    return_entropy: bool,
    inplace_backward: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,  # [T, V], any floating type
    targets: Tensor,  # [T], integers in [0, V)
    *,
    temperature: float | Tensor = 1.0,  # a number, or [T]
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and optionally each row's entropy.

    The arithmetic is fp32 whatever the type of the logits (float64 for float64 logits); gradients go to the
    logits, in their type. A logit of -inf is a token that cannot be drawn. A row that holds NaN or +inf gives
    NaN. The gradient cannot be differentiated again: that raises a RuntimeError.

    Args:
        logits: [T, V].
        targets: [T]; for tokens that carry no loss any valid id.
        temperature: positive; a number, or one value per token. No gradient flows to it.
        return_entropy: also return the entropy, in nats; it is differentiable too.
        inplace_backward: the gradient overwrites the logits, which saves its memory. Only for logits that nothing
            else reads after the backward pass has begun, and for one backward pass.

    Returns:
        logps [T], or (logps [T], entropy [T]); fp32, or float64 for float64 logits.

    Raises:
        ValueError: shapes that do not fit, targets that are no integers or (on the CPU) out of range, a
            temperature that is not positive or wants a gradient.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}: pass [T, V], for instance logits.flatten(0, -2)")
    check_targets(targets, *logits.shape)
    arguments = temperature_arguments(temperature, logits.shape[0])
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:  # not rows of their own, one after another
        logits = logits.contiguous()
    logps, _, entropy = ops.token_logprobs(logits, targets.long(), *arguments, return_entropy, inplace_backward)
    return (logps, entropy) if return_entropy else logps


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    logit_softcap: float | None = ...,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_logprobs(
    hidden: Tensor,  # [T, H], any floating type
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T], integers in [0, V)
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or [T]
    logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits ``hidden @ weight.T + bias``, which never exist whole.

    With `logit_softcap` c the logits become ``c tanh(logits / c)`` before the temperature divides them. Logits
    are fp32 accumulators, never rounded to the type of the inputs, and autocast does not change that. The
    backward pass recomputes each chunk of logits; the gradient of the weight accumulates in fp32 over the
    chunks and is rounded to the weight's type once. Inputs that need no gradient (a frozen weight) cost none.
    The gradient cannot be differentiated again: that raises a RuntimeError.

    Args:
        hidden: [T, H], the last hidden state; need not be contiguous.
        weight: [V, H], the output embedding.
        targets: [T]; for tokens that carry no loss any valid id.
        bias: [V].
        temperature: positive; a number, or one value per token. No gradient flows to it.
        logit_softcap: positive, or None.
        return_entropy: also return the entropy, in nats; it is differentiable too.

    Returns:
        logps [T], or (logps [T], entropy [T]); fp32, or float64 if `hidden` or `weight` is float64.

    Raises:
        ValueError: as for `token_logprobs`, and for a softcap that is not positive.
    """
    check_head(hidden, weight, bias, logit_softcap)
    check_targets(targets, hidden.shape[0], weight.shape[0])
    arguments = temperature_arguments(temperature, hidden.shape[0])
    logps, _, entropy = ops.linear_logprobs(
        hidden, weight, bias, targets.long(), *arguments, logit_softcap, return_entropy
    )
    return (logps, entropy) if return_entropy else logps


def linear_logits(
    hidden: Tensor,  # [T, H], any floating type
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
) -> Tensor:  # [T, V]
    """The logits ``hidden @ weight.T + bias`` that `linear_logprobs` computes with, whole: for sampling.

    They are fp32 accumulators (float64 if `hidden` or `weight` is float64), never rounded to the type of the inputs:
    what is sampled from them has the log-probabilities that `linear_logprobs` gives it. Autocast changes nothing. To
    train on, take `linear_logprobs`, which needs no whole logits for its gradient either.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_head(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return reference_logits(hidden, weight, bias)
        logits = accumulated_logits(hidden, weight)
        return logits if bias is None else logits.add_(bias)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None) -> None:
    """Raise ValueError unless these are [T, H], [V, H], [V] and a positive number."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}: pass [T, H] and [V, H]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}: pass [V], here [{weight.shape[0]}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap is {softcap}: pass a positive number, or None for no cap")
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        raise ValueError(
            "hidden or weight is a sharded DTensor: call this inside the forward of the module that FSDP2 wraps, where "
            "the weight is whole, or pass weight.full_tensor()"
        )


def check_targets(targets: Tensor, tokens: int, vocabulary: int) -> None:
    """Raise ValueError unless these are T integers; on the CPU, unless each is in [0, V)."""
    if targets.shape != (tokens,):
        raise ValueError(f"targets has shape {list(targets.shape)}: pass one token id per row, [{tokens}]")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets has type {targets.dtype}: pass integer token ids")
    # On a GPU this look would wait for the device; there a wrong id gives NaN.
    looked_at = targets.device.type == "cpu" and not torch.compiler.is_compiling() and tokens
    if looked_at and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise ValueError(
            f"targets lie between {int(targets.min())} and {int(targets.max())}: pass ids from 0 to {vocabulary - 1}, "
            "and for tokens without loss any of these"
        )


def temperature_arguments(temperature: float | Tensor, tokens: int) -> tuple[float, Tensor | None]:
    """The number, or 1 and a tensor [T], as the ops take them. Raises ValueError."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: pass a positive number")
        return float(temperature), None
    if temperature.requires_grad:
        raise ValueError("temperature wants a gradient, and none is computed for it: pass temperature.detach()")
    if temperature.dim() == 0:
        temperature = temperature.expand(tokens)
    if temperature.shape != (tokens,):
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}: pass a number or one value per row, [{tokens}]"
        )
    return 1.0, temperature.to(accumulation_dtype(temperature)).contiguous()
