"""The autograd functions under `token_logprobs` and `linear_logprobs`.

Letters: T tokens, V vocabulary, H hidden size, t tokens of one chunk.

Both ops work through the tokens in chunks and recompute a chunk in the backward pass, so that beyond
their inputs and gradients they need the memory of one chunk. With z the logits after bias and softcap,
and tau the temperature of the row::

    logp    = (z / tau)[target] - logsumexp(z / tau)
    entropy = -sum_v p_v log p_v                          p = softmax(z / tau), in nats
    d logp / d z_v    = ([v = target] - p_v) / tau
    d entropy / d z_v = -p_v (log p_v + entropy) / tau
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels.packed import accumulation_dtype

# Bytes of one chunk of logits in the accumulation type. A GPU wants matrix products of thousands of rows, a CPU
# wants to stay near its caches.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
# Rows of a low-precision weight that are widened at a time where the device cannot accumulate in fp32 itself.
WIDENED_ROWS = 8192


class _SecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "token_logprobs and linear_logprobs have no second derivative: drop create_graph=True, "
            "or take the log-probabilities with torch.log_softmax"
        )


def _first_order_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    # torch's once_differentiable lets create_graph=True pass in silence when the incoming gradient is a constant,
    # and the second derivative then lacks this op's share.
    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        sources = [tensor for tensor in (*ctx.saved_tensors, *gradients) if tensor is not None and tensor.requires_grad]
        return tuple(None if result is None else _SecondOrder.apply(result, *sources) for result in results)

    return wrapped


class TokenLogprobs(torch.autograd.Function):
    """(logits [T, V], targets [T] int64, temperature, want_entropy) -> logps [T], entropy [T] or None."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        dtype = accumulation_dtype(logits)
        logps = logits.new_empty(logits.shape[0], dtype=dtype)
        entropy = torch.empty_like(logps) if want_entropy else None
        for chunk in _chunks(logits.shape[0], logits.shape[1], logits.device, dtype):
            scaled = logits[chunk].to(dtype) / _of_chunk(temperature, chunk)
            _forward_rows(scaled, targets[chunk], chunk, logps, entropy)
        return logps, entropy

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        dtype = accumulation_dtype(logits)
        d_logits = torch.zeros_like(logits) if d_logps is d_entropy is None else torch.empty_like(logits)
        if d_logps is not None or d_entropy is not None:
            for chunk in _chunks(logits.shape[0], logits.shape[1], logits.device, dtype):
                tau = _of_chunk(ctx.temperature, chunk)
                scaled = logits[chunk].to(dtype) / tau
                d_logits[chunk] = _backward_rows(scaled, targets, chunk, d_logps, d_entropy).div_(tau)
        return d_logits, None, None, None


class LinearLogprobs(torch.autograd.Function):
    """(hidden [T, H], weight [V, H], bias [V] or None, targets [T] int64, temperature, softcap, want_entropy) ->
    logps [T], entropy [T] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        softcap: float | None,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.softcap = temperature, softcap
        dtype = accumulation_dtype(hidden, weight)
        logps = hidden.new_empty(hidden.shape[0], dtype=dtype)
        entropy = torch.empty_like(logps) if want_entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(hidden.shape[0], weight.shape[0], hidden.device, dtype):
                scaled = _capped_logits(hidden[chunk], weight, bias, softcap).div_(_of_chunk(temperature, chunk))
                _forward_rows(scaled, targets[chunk], chunk, logps, entropy)
        return logps, entropy

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = accumulation_dtype(hidden, weight)
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(hidden.shape[0], weight.shape[0], hidden.device, dtype):
                tau = _of_chunk(ctx.temperature, chunk)
                logits = _capped_logits(hidden[chunk], weight, bias, ctx.softcap)
                d_logits = _backward_rows(logits / tau, targets, chunk, d_logps, d_entropy).div_(tau)
                if ctx.softcap is not None:
                    d_logits.mul_(1 - (logits / ctx.softcap).square_())
                del logits
                if d_hidden is not None:
                    d_hidden[chunk] = _hidden_gradient(d_logits, weight)
                if d_weight is not None:
                    _add_weight_gradient(d_weight, d_logits, hidden[chunk])
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _forward_rows(
    scaled: Tensor,  # [t, V], logits / temperature
    targets: Tensor,  # [t]
    chunk: slice,
    logps: Tensor,  # [T], written
    entropy: Tensor | None,  # [T], written
) -> None:
    log_p = torch.log_softmax(scaled, -1)
    logps[chunk] = log_p.gather(1, targets[:, None]).squeeze(1)
    if entropy is not None:
        p = log_p.exp()
        entropy[chunk] = -_finite_below(log_p).mul_(p).sum(-1)


def _backward_rows(
    scaled: Tensor,  # [t, V], logits / temperature
    targets: Tensor,  # [T]
    chunk: slice,
    d_logps: Tensor | None,  # [T]
    d_entropy: Tensor | None,  # [T]
) -> Tensor:  # [t, V], the gradient with respect to `scaled`
    log_p = torch.log_softmax(scaled, -1)
    p = log_p.exp()
    d_scaled = torch.zeros_like(p)
    if d_entropy is not None:
        log_p = _finite_below(log_p)
        entropy = -(p * log_p).sum(-1, keepdim=True)
        d_scaled = log_p.add_(entropy).mul_(p).mul_(-d_entropy[chunk, None])
    if d_logps is not None:
        d_logp = d_logps[chunk, None]
        index = targets[chunk, None]
        d_scaled.sub_(p.mul_(d_logp))
        d_scaled.scatter_(1, index, d_scaled.gather(1, index) + d_logp)
    return d_scaled


def _finite_below(log_p: Tensor) -> Tensor:
    # A token that cannot be drawn adds 0 log 0 = 0 to an entropy, where 0 * -inf would add NaN.
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _capped_logits(
    hidden: Tensor,  # [t, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
) -> Tensor:  # [t, V], fp32 or float64
    logits = accumulated_logits(hidden, weight, bias)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def accumulated_logits(
    hidden: Tensor,  # [t, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
) -> Tensor:  # [t, V], fp32 or float64
    """The accumulators of ``hidden @ weight.T + bias``, not rounded to the type of the inputs."""
    dtype = accumulation_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        if _accumulates_natively(hidden, weight):
            logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
        elif weight.dtype == dtype:
            logits = hidden.to(dtype) @ weight.t()
        else:
            wide = hidden.to(dtype)
            logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=dtype)
            for rows in _weight_rows(weight, dtype):
                logits[:, rows] = wide @ weight[rows].to(dtype).t()
    return logits if bias is None else logits.add_(bias)


def _hidden_gradient(
    d_logits: Tensor,  # [t, V]
    weight: Tensor,  # [V, H]
) -> Tensor:  # [t, H]
    if _accumulates_natively(weight):
        return d_logits.to(weight.dtype) @ weight
    gradient = d_logits.new_zeros(d_logits.shape[0], weight.shape[1])
    for rows in _weight_rows(weight, d_logits.dtype):
        gradient.addmm_(d_logits[:, rows], weight[rows].to(d_logits.dtype))
    return gradient


def _add_weight_gradient(
    d_weight: Tensor,  # [V, H], fp32 or float64, added to
    d_logits: Tensor,  # [t, V]
    hidden: Tensor,  # [t, H]
) -> None:
    if _accumulates_natively(hidden):
        d_weight += torch.mm(d_logits.to(hidden.dtype).t(), hidden, out_dtype=d_weight.dtype)
    else:
        d_weight.addmm_(d_logits.t(), hidden.to(d_weight.dtype))


def _accumulates_natively(*tensors: Tensor) -> bool:
    # float16 is left out: gradients of 1e-7 a token are below what it can hold.
    return all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in tensors)


def _weight_rows(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    step = max(weight.shape[0], 1) if weight.dtype == dtype else WIDENED_ROWS
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _chunks(tokens: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Iterator[slice]:
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    step = max(1, budget // max(1, vocabulary * dtype.itemsize))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _of_chunk(temperature: float | Tensor, chunk: slice) -> float | Tensor:
    return temperature[chunk, None] if isinstance(temperature, Tensor) else temperature
