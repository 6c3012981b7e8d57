"""The definition of the policy-gradient loss, in plain torch; autograd gives its gradient.

Letters: T tokens, S sequences. A is the advantage, r the importance ratio, logp the current log-probability.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels.metrics import masked_max, masked_mean
from thinktwice_kernels.options import LossOptions
from thinktwice_kernels.packed import Sequences, accumulation_dtype
from thinktwice_kernels.reference.advantages import group_advantages
from thinktwice_kernels.reference.objectives import clipped, kl_to_reference, shaped, surrogate, too_unlikely_to_shape

_TENSORS = ("old_logps", "ref_logps", "rollout_logps", "entropy", "loss_mask", "guide_mask")


def grpo_loss(
    logps: Tensor,  # [T]
    advantages: Tensor | None,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    rewards: Tensor | None = None,  # [S]
    group_ids: Tensor | None = None,  # [S]
    scale_rewards: Any = "none",
    advantage_eps: float = 1e-6,
    normalizer: float | Tensor | None = None,
    **tensors_and_options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`thinktwice_kernels.grpo_loss`, arguments and results alike; inputs are not checked."""
    given = {name: tensors_and_options.pop(name, None) for name in _TENSORS}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    options = LossOptions(**tensors_and_options)
    if advantages is None:
        assert rewards is not None and group_ids is not None
        advantages = group_advantages(rewards, group_ids, scale_rewards=scale_rewards, eps=advantage_eps)
    sequences = Sequences(cu_seqlens.to(logps.device), logps.numel())
    tokens = _prepare(logps, advantages, given, sequences, options)
    log_ratio = _log_ratio(tokens, sequences, options)
    per_token, flows = _policy_term(tokens, log_ratio, sequences, options)
    kl = None if tokens.ref_logps is None else kl_to_reference(tokens.logps, tokens.ref_logps, options.kl_estimator)
    if kl is not None and options.beta != 0:
        per_token = per_token + options.beta * kl
    if tokens.entropy is not None and options.entropy_coef != 0:
        per_token = per_token - options.entropy_coef * tokens.entropy
    loss = _aggregate(per_token, tokens.in_loss, sequences, options, normalizer)
    with torch.no_grad():
        return loss, _metrics(tokens, log_ratio, flows, kl, options)


@dataclass(frozen=True)
class _Tokens:
    """The inputs in one floating type, with 0 in place of every value that may not be read."""

    logps: Tensor  # [T], of `computed`
    old_logps: Tensor  # [T], of `with_ratio`, constant
    advantages: Tensor  # [T], of `computed`
    ref_logps: Tensor | None  # [T], of `computed`
    rollout_logps: Tensor | None  # [T], of `ordinary`
    entropy: Tensor | None  # [T], of `computed`
    in_loss: Tensor  # [T] bool: selected by loss_mask
    computed: Tensor  # [T] bool: of those, not skipped
    ordinary: Tensor  # [T] bool: of those, not guided
    with_ratio: Tensor  # [T] bool: ordinary, or guided and fallen back to the ratio objective


def _prepare(
    logps: Tensor,  # [T]
    advantages: Tensor,  # [S] or [T]
    given: Mapping[str, Tensor],  # the optional [T] tensors by name
    sequences: Sequences,
    options: LossOptions,
) -> _Tokens:
    dtype = accumulation_dtype(logps)

    def read(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values.to(dtype), 0)

    def read_constant(name: str, where: Tensor) -> Tensor | None:
        return read(given[name].detach(), where) if name in given else None

    in_loss = given["loss_mask"] != 0 if "loss_mask" in given else torch.ones_like(logps, dtype=torch.bool)
    per_token = advantages.detach()
    if advantages.numel() == sequences.count:
        per_token = sequences.spread(per_token)
    computed = in_loss
    if options.beta == 0 and options.entropy_coef == 0:
        computed = in_loss & (per_token != 0)
        if options.needs_whole_sequences():
            computed = in_loss & sequences.any(computed)
    logps, per_token = read(logps, computed), read(per_token, computed)

    guided = torch.zeros_like(in_loss)
    if "guide_mask" in given:
        guided = in_loss & (given["guide_mask"] != 0)
        if options.released_code_compat:
            guided = sequences.any(guided)
    ordinary = computed & ~guided
    with_ratio = ordinary
    if options.guide_fallback == "clip":
        with_ratio = ordinary | (computed & guided & too_unlikely_to_shape(logps, per_token))
    return _Tokens(
        logps=logps,
        old_logps=read(given.get("old_logps", logps).detach(), with_ratio),
        advantages=per_token,
        ref_logps=read_constant("ref_logps", computed),
        rollout_logps=read_constant("rollout_logps", ordinary),
        entropy=read(given["entropy"], computed) if "entropy" in given else None,
        in_loss=in_loss,
        computed=computed,
        ordinary=ordinary,
        with_ratio=with_ratio,
    )


def _log_ratio(tokens: _Tokens, sequences: Sequences, options: LossOptions) -> Tensor:  # [T], 0 outside with_ratio
    log_ratio = torch.where(tokens.with_ratio, tokens.logps - tokens.old_logps, 0)
    if options.importance_sampling_level == "token":
        return log_ratio
    lengths = sequences.sum(tokens.with_ratio.to(log_ratio.dtype)).clamp(min=1)
    return torch.where(tokens.with_ratio, sequences.spread(sequences.sum(log_ratio) / lengths), 0)


def _rollout_weight(tokens: _Tokens, sequences: Sequences, options: LossOptions) -> Tensor:  # [T], constant
    if options.rollout_is == "none" or tokens.rollout_logps is None:
        return torch.ones_like(tokens.old_logps)
    log_weight = torch.where(tokens.ordinary, tokens.old_logps - tokens.rollout_logps, 0)
    if options.rollout_is.startswith("sequence"):
        log_weight = sequences.spread(sequences.sum(log_weight))
    weight = log_weight.exp()
    floor, cap = options.rollout_is_floor or 0.0, options.rollout_is_cap
    if options.rollout_is.endswith("truncate"):
        weight = weight.clamp(floor, cap)
    else:
        weight = weight.masked_fill((weight < floor) | (weight > cap), 0)
    return torch.where(tokens.ordinary, weight, 1)


def _policy_term(
    tokens: _Tokens,
    log_ratio: Tensor,  # [T]
    sequences: Sequences,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # [T] loss, [T] bool: a gradient comes from it
    weight = _rollout_weight(tokens, sequences, options)
    used = tokens.with_ratio & (tokens.advantages != 0) & (weight != 0)
    # Unused tokens get arguments at which every objective and its slope are finite.
    objective, flows = surrogate(
        torch.where(used, log_ratio, 0),
        torch.where(used, tokens.logps, 0),
        torch.where(used, tokens.advantages, 0),
        options,
    )
    policy = torch.where(used, weight * objective, 0)
    flows = flows & used
    if options.importance_sampling_level == "sequence" and options.policy_loss != "cispo":
        flows = tokens.ordinary & sequences.any(flows)
    guided = tokens.computed & ~tokens.with_ratio
    shaped_policy, shaped_flows = shaped(tokens.logps, tokens.advantages, guided, options)
    return torch.where(guided, shaped_policy, policy), flows | shaped_flows


def _aggregate(
    per_token: Tensor,  # [T], 0 outside in_loss
    in_loss: Tensor,  # [T] bool
    sequences: Sequences,
    options: LossOptions,
    normalizer: float | Tensor | None,
) -> Tensor:
    if options.loss_agg_mode == "token-mean":
        return per_token.sum() / (in_loss.sum().clamp(min=1) if normalizer is None else normalizer)
    count = max(sequences.count, 1) if normalizer is None else normalizer
    if options.loss_agg_mode == "seq-mean-token-mean":
        lengths = sequences.sum(in_loss.to(per_token.dtype)).clamp(min=1)
        return (sequences.sum(per_token) / lengths).sum() / count
    if options.max_response_length is not None:
        per_token = per_token / options.max_response_length
    return per_token.sum() / count


def _metrics(
    tokens: _Tokens,
    log_ratio: Tensor,  # [T]
    flows: Tensor,  # [T] bool
    kl: Tensor | None,  # [T]
    options: LossOptions,
) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    difference = tokens.logps - tokens.old_logps
    low, high = clipped(log_ratio, tokens.advantages, options)
    every_token_has_gradient = options.beta != 0 or options.entropy_coef != 0
    metrics = {
        "tokens": tokens.in_loss.sum(),
        "tokens_skipped": (tokens.in_loss & ~tokens.computed).sum(),
        "tokens_guided": (tokens.computed & ~tokens.ordinary).sum(),
        "tokens_with_gradient": (tokens.computed if every_token_has_gradient else flows).sum(),
        "clip_fraction_low": masked_mean(low.to(ratio.dtype), tokens.ordinary),
        "clip_fraction_high": masked_mean(high.to(ratio.dtype), tokens.ordinary),
        "ratio_mean": masked_mean(ratio, tokens.ordinary),
        "ratio_max": masked_max(ratio, tokens.ordinary),
        "approx_kl": masked_mean(difference.expm1() - difference, tokens.ordinary),
    }
    if kl is not None:
        metrics["kl_ref"] = masked_mean(kl, tokens.ordinary)
    if tokens.rollout_logps is not None:
        metrics["mismatch"] = masked_mean((tokens.old_logps - tokens.rollout_logps).abs(), tokens.ordinary)
    if tokens.entropy is not None:
        metrics["entropy"] = masked_mean(tokens.entropy, tokens.computed)
    return {name: value.detach() for name, value in metrics.items()}
