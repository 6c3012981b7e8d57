"""Every op once more as its definition: plain torch, whole logits, autograd; float64 inputs give float64 results.

Arguments and results are those of the op of the same name; inputs are not checked. The code stands in the op's own
file. The tests and benchmarks hold the fast versions against these, and so may you.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels.advantages import ADVANTAGE_EPS
from thinktwice_kernels.advantages import group_advantages_reference as group_advantages
from thinktwice_kernels.gate import swiglu_reference as swiglu
from thinktwice_kernels.launch import accumulation_dtype
from thinktwice_kernels.logprobs import linear_logits_reference as linear_logits
from thinktwice_kernels.logprobs import linear_logprobs_reference as linear_logprobs
from thinktwice_kernels.logprobs import token_logprobs_reference as token_logprobs
from thinktwice_kernels.loss import restrict_to_kept, selected_in_torch, terms_of, with_dropped
from thinktwice_kernels.merge import merge_attention_reference as merge_attention
from thinktwice_kernels.metrics import PARTIALS, absent_metrics, metrics_of, partials_of, totals_of
from thinktwice_kernels.norm import rms_norm_reference as rms_norm
from thinktwice_kernels.options import (
    LossInputs,
    LossOptions,
    ScaleRewards,
    Sequences,
    loss_weights,
    prepared_tensors,
)
from thinktwice_kernels.rotary import rotary_reference as rotary

__all__ = [
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logits",
    "linear_logprobs",
    "merge_attention",
    "rms_norm",
    "rotary",
    "swiglu",
    "token_logprobs",
]
_TENSORS = ("old_logps", "ref_logps", "rollout_logps", "entropy", "loss_mask", "guide_mask")


def grpo_loss(
    logps: Tensor,  # [T]
    advantages: Tensor | None,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    rewards: Tensor | None = None,  # [S]
    group_ids: Tensor | None = None,  # [S]
    scale_rewards: ScaleRewards = "none",
    advantage_eps: float = ADVANTAGE_EPS,
    normalizer: float | Tensor | None = None,
    **tensors_and_options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`thinktwice_kernels.grpo_loss` by `loss.terms_of`."""
    optional = {name: tensors_and_options.pop(name, None) for name in _TENSORS}
    options = LossOptions(**tensors_and_options)
    if advantages is None:
        assert rewards is not None and group_ids is not None
        advantages = group_advantages(rewards, group_ids, scale_rewards=scale_rewards, eps=advantage_eps)
    logps = logps.to(accumulation_dtype(logps))
    cu_seqlens = cu_seqlens.to(logps.device)
    given: dict[str, Any] = prepared_tensors(optional, logps.shape, options, logps.dtype)
    kept = restrict_to_kept(given, cu_seqlens, options)
    weights = loss_weights(cu_seqlens, given["loss_mask"], options, normalizer, logps, kept.dropped_sequences)
    inputs = LossInputs(logps, advantages.detach().to(logps.dtype), cu_seqlens, weights, **given)
    selected = selected_in_torch(inputs, options)
    inputs = selected.inputs
    terms = terms_of(inputs, Sequences(inputs.cu_seqlens, inputs.logps.numel()), options)
    with torch.no_grad():
        totals = totals_of(partials_of(terms))
    totals[PARTIALS.index("tokens")] = selected.in_loss
    absent = absent_metrics(given, options.rollout_is != "none")
    return (terms.weights * terms.value).sum(), metrics_of(with_dropped(totals, kept), logps.dtype, absent)


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
    """`thinktwice_kernels.linear_grpo_loss`: the two others one after the other."""
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
