"""The definition of the loss straight from the hidden state: the two others one after the other.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

from typing import Any

from torch import Tensor

from thinktwice_kernels.reference.logprobs import linear_logprobs
from thinktwice_kernels.reference.loss import grpo_loss


def linear_grpo_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T]
    advantages: Tensor | None,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or [T]
    logit_softcap: float | None = None,
    **tensors_and_options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`thinktwice_kernels.linear_grpo_loss`, arguments and results alike; inputs are not checked."""
    logps, entropy = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        return_entropy=True,
    )
    return grpo_loss(logps, advantages, cu_seqlens, entropy=entropy, **tensors_and_options)
