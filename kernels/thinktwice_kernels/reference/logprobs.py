"""The definitions of the log-probability ops, in plain torch: whole logits, gradients by autograd.

Letters: T tokens, V vocabulary, H hidden size.
"""

import torch
from torch import Tensor

from thinktwice_kernels.packed import accumulation_dtype


def token_logprobs(
    logits: Tensor,  # [T, V]
    targets: Tensor,  # [T]
    *,
    temperature: float | Tensor = 1.0,  # a number, or [T]
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`thinktwice_kernels.token_logprobs`, arguments and results alike; inputs are not checked."""
    tau = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_p = torch.log_softmax(logits.to(accumulation_dtype(logits)) / tau, -1)
    logps = log_p.gather(1, targets.long()[:, None]).squeeze(1)
    if not return_entropy:
        return logps
    # A token that cannot be drawn adds 0 log 0 = 0 to an entropy, where 0 * -inf would add NaN.
    return logps, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def linear_logprobs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or [T]
    logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`thinktwice_kernels.linear_logprobs`, arguments and results alike; inputs are not checked."""
    logits = linear_logits(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return token_logprobs(logits, targets, temperature=temperature, return_entropy=return_entropy)


def linear_logits(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
) -> Tensor:  # [T, V]
    """The logits, with sums and result in fp32 (float64 if an input is)."""
    dtype = accumulation_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)
