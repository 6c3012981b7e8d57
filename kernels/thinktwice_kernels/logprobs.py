"""Log-probabilities of given tokens, and the entropies they were drawn at.

Letters: T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from thinktwice_kernels.launch import accumulation_dtype, fake_gradient, first_order_only, op
from thinktwice_kernels.rows import (
    Head,
    HeadGradients,
    accumulated_logits,
    bytes_per_logit,
    check_head,
    check_targets,
    gradient_dtype,
    head_of,
    new_tile,
    row_gradient,
    row_statistics,
    rows_per_tile,
    temperature_arguments,
    tiles,
)


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
    logps, _, entropy = _token_logprobs(logits, targets.long(), *arguments, return_entropy, inplace_backward)
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
    logps, _, entropy = _linear_logprobs(
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
            return linear_logits_reference(hidden, weight, bias)
        logits = accumulated_logits(hidden, weight)
        return logits if bias is None else logits.add_(bias)


def token_logprobs_reference(
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T]
    *,
    temperature: float | Tensor = 1.0,  # a number, or [T]
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs`, arguments and results alike, in plain torch; inputs are not checked."""
    tau = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_p = torch.log_softmax(logits.to(accumulation_dtype(logits)) / tau, -1)
    logps = log_p.gather(1, targets.long()[:, None]).squeeze(1)
    if not return_entropy:
        return logps
    # A token that cannot be drawn adds 0 log 0 = 0 to an entropy, where 0 * -inf would add NaN.
    return logps, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def linear_logprobs_reference(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or [T]
    logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logprobs`, arguments and results alike, in plain torch; inputs are not checked."""
    logits = linear_logits_reference(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return token_logprobs_reference(logits, targets, temperature=temperature, return_entropy=return_entropy)


def linear_logits_reference(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
) -> Tensor:  # [T, V]
    """The logits, with sums and result in fp32 (float64 if an input is)."""
    dtype = accumulation_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


# The custom ops. A result that is not wanted is empty, [0]: schemas have no optional results. Temperatures come as a
# number, or as a tensor [T] that then counts instead.


@op("token_logprobs")
def _token_logprobs(
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T] int64
    temperature: float,
    temperatures: Tensor | None,  # [T]
    want_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], log-sum-exp [T], entropy [T]."""
    head = head_of(None, temperature, temperatures, None)
    logps, lse, entropy = row_statistics(logits, targets, head, want_entropy)
    return logps, lse, logps.new_empty(0) if entropy is None else entropy


@_token_logprobs.register_fake
def _(logits: Tensor, targets: Tensor, _1: Any, _2: Any, want_entropy: bool, _3: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(logits.shape[0], want_entropy, logits)


@op("token_logprobs_backward")
def _token_logprobs_backward(
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
    out = logits.new_empty(logits.shape)
    _token_gradient(logits, targets, temperature, temperatures, lse, entropy, d_logps, d_entropy, out)
    return out


@_token_logprobs_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@op("token_logprobs_backward_", mutates=("logits",))
def _token_logprobs_backward_(
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
    known = entropy if entropy.numel() else None
    row_gradient(logits, targets, head, lse, known, d_logps, d_entropy, None, out)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature, temperatures, want_entropy, ctx.inplace = inputs
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((lse,) if want_entropy else (lse, entropy)))
    ctx.save_for_backward(logits, targets, temperatures, lse, entropy)


@first_order_only
def _token_backward(ctx: Any, d_logps: Tensor | None, _: None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, lse, entropy = ctx.saved_tensors
    arguments = targets, ctx.temperature, temperatures, lse, entropy, d_logps, _of_tokens(d_entropy)
    if ctx.inplace:
        gradient = logits.detach()
        _token_logprobs_backward_(gradient, *arguments)
    else:
        gradient = _token_logprobs_backward(logits, *arguments)
    return gradient, *(None,) * 5


_token_logprobs.register_autograd(_token_backward, setup_context=_token_setup)


@op("linear_logprobs")
def _linear_logprobs(
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
        return _tiled_forward(hidden, weight, targets, head, want_entropy)


@_linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Any, _1: Any, _2: Any, _3: Any, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(hidden.shape[0], want_entropy, hidden, weight)


@op("linear_logprobs_backward")
def _linear_logprobs_backward(
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
        of_hidden, of_weight, of_bias = _tiled_backward(
            hidden, weight, targets, head, lse, known, d_logps, d_entropy, cast(Any, tuple(wanted))
        )
    return (
        of_hidden.to(hidden.dtype),
        of_weight.to(weight.dtype),
        of_bias.to(weight.dtype if bias is None else bias.dtype),
    )


@_linear_logprobs_backward.register_fake
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
    gradients = _linear_logprobs_backward(
        hidden, weight, bias, targets, ctx.temperature, temperatures, ctx.softcap, lse, entropy, d_logps,
        _of_tokens(d_entropy), wanted,
    )  # fmt: skip
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *(None,) * 5


_linear_logprobs.register_autograd(_linear_backward, setup_context=_linear_setup)


def _of_tokens(d_entropy: Tensor | None) -> Tensor | None:
    return None if d_entropy is None or d_entropy.numel() == 0 else d_entropy


def _fake_results(tokens: int, want_entropy: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(*inputs)

    def numbers(count: int) -> Tensor:
        return inputs[0].new_empty(count, dtype=dtype)

    return numbers(tokens), numbers(tokens), numbers(tokens if want_entropy else 0)


def _tiled_forward(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T] int64
    head: Head,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], log-sum-exp [T], and entropy [T] or, unwanted, [0]."""
    tokens, dtype = hidden.shape[0], accumulation_dtype(hidden, weight)
    logps, lse = (hidden.new_empty(tokens, dtype=dtype) for _ in range(2))
    entropy = hidden.new_empty(tokens if want_entropy else 0, dtype=dtype)
    step = rows_per_tile(weight.shape[0], dtype.itemsize, hidden.device)
    buffer = new_tile(hidden, weight, min(step, tokens))
    for rows in tiles(0, tokens, step):
        logits = accumulated_logits(hidden[rows], weight, out=buffer[: rows.stop - rows.start])
        logps[rows], lse[rows], tile_entropy = row_statistics(logits, targets[rows], head.of_rows(rows), want_entropy)
        if tile_entropy is not None:
            entropy[rows] = tile_entropy
    return logps, lse, entropy


def _tiled_backward(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T] int64
    head: Head,
    lse: Tensor,  # [T]
    entropy: Tensor | None,  # [T], needed with d_entropy
    d_logps: Tensor | None,  # [T]
    d_entropy: Tensor | None,  # [T]
    wanted: tuple[bool, bool, bool],  # the gradients of hidden, weight and bias
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden [T, H], weight [V, H] and bias [V], as `HeadGradients.result` gives them.

    Rows without incoming gradient cost nothing.
    """
    gradients = HeadGradients(hidden, weight, head.bias, wanted)
    flows = [gradient != 0 for gradient in (d_logps, d_entropy) if gradient is not None]
    if not flows:
        return gradients.result()
    active = torch.nonzero(torch.stack(flows).any(0)).squeeze(1)
    dtype, out_dtype = accumulation_dtype(hidden, weight), gradient_dtype(hidden, weight)
    step = rows_per_tile(weight.shape[0], bytes_per_logit(dtype, out_dtype), hidden.device)
    buffer = new_tile(hidden, weight, min(step, active.numel()))
    for piece in tiles(0, active.numel(), step):
        rows: Tensor | slice = piece if active.numel() == hidden.shape[0] else active[piece]
        logits = accumulated_logits(hidden[rows], weight, out=buffer[: piece.stop - piece.start])
        d_logits = logits if out_dtype == dtype else torch.empty_like(logits, dtype=out_dtype)
        row_gradient(
            logits,
            targets[rows],
            head.of_rows(rows),
            lse[rows],
            None if entropy is None else entropy[rows],
            None if d_logps is None else d_logps[rows],
            None if d_entropy is None else d_entropy[rows],
            None,
            d_logits,
        )
        gradients.add(d_logits, rows)
    return gradients.result()
