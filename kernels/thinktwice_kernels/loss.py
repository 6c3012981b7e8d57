"""The policy-gradient loss from log-probabilities.

Letters: T tokens, S sequences. A is the advantage, r the importance ratio, logp the current log-probability.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thinktwice_kernels.metrics import masked_max, masked_mean
from thinktwice_kernels.objectives import clipped, kl_to_reference, shaped, surrogate, too_unlikely_to_shape
from thinktwice_kernels.options import (
    GuideFallback,
    ImportanceSamplingLevel,
    KlEstimator,
    LossAggMode,
    LossOptions,
    PolicyLoss,
    RolloutIs,
)
from thinktwice_kernels.packed import Sequences, accumulation_dtype, check_cu_seqlens


def grpo_loss(
    logps: Tensor,  # [T], any floating type
    advantages: Tensor,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1] int32
    *,
    old_logps: Tensor | None = None,  # [T]
    ref_logps: Tensor | None = None,  # [T]
    rollout_logps: Tensor | None = None,  # [T]
    entropy: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T], bool or 0/1
    guide_mask: Tensor | None = None,  # [T], bool or 0/1
    policy_loss: PolicyLoss = "clip",
    importance_sampling_level: ImportanceSamplingLevel = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    rollout_is: RolloutIs = "none",
    rollout_is_cap: float = 2.0,
    rollout_is_floor: float | None = None,
    guide_fallback: GuideFallback = "mask",
    released_code_compat: bool = False,
    beta: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    entropy_coef: float = 0.0,
    loss_agg_mode: LossAggMode = "token-mean",
    max_response_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of one batch of packed responses.

    Each loss token adds ``w * objective + beta * kl - entropy_coef * entropy``, and `loss_agg_mode` makes one
    number of them. With r = exp(logp - old_logp)::

        clip    -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)               PPO, GRPO
                dual_clip c: at most -c A where A < 0;  delta: r is at most delta in the first term
        cispo   -sg(min(r, 1 + epsilon_high)) A logp                                  arXiv 2506.13585
        sapo    -A (4 / tau) sigmoid(tau (r - 1)), tau = sapo_temperature_pos for     arXiv 2511.20347
                A > 0, else sapo_temperature_neg

    Without `old_logps` the current ones, detached, stand in: r is 1 and keeps its gradient. At `sequence` level
    (GSPO, arXiv 2507.18071) r is exp of the mean of logp - old_logp over the sequence's loss tokens, and the
    gradient flows through that mean, as TRL does it. Where advantage and w are one per sequence, the gradient
    equals that of the per-token form ``sg(r) exp(logp - sg(logp))``.

    `rollout_is` corrects for a rollout engine whose log-probabilities differ from the trainer's: the objective is
    multiplied by the constant w = exp(old_logp - rollout_logp) of the token (`token-*`), or by the product of
    these over the sequence's loss tokens (`sequence-*`). `*-truncate` brings w into [rollout_is_floor,
    rollout_is_cap], `*-mask` drops what lies outside. The KL and entropy terms are not weighted.

    `guide_mask` marks tokens that another model wrote (ThinkTuning, arXiv 2508.07616). With p = exp(logp) and
    gamma(A) = clip(2.5e-4 A, -1e-3, +1e-3) their objective is ``-A p / (sg(p) + gamma(A))``, without ratio and w.
    Where A < 0 and p < 0.01 it is 0, or with `guide_fallback` "clip" that of an ordinary token.
    `released_code_compat` follows the released code: gamma is always -1e-3, and one guided token makes its whole
    sequence guided. Guided tokens stay out of sequence-level ratios and products; the KL and entropy terms are theirs
    as well.

    Aggregation divides, with n_s the loss tokens of a sequence::

        token-mean                sum of all / loss tokens
        seq-mean-token-mean       sum over sequences of (sum / n_s) / S
        seq-mean-token-sum        sum of all / S
        seq-mean-token-sum-norm   sum of all / (S max_response_length)                Dr.GRPO, 2503.20783

    `normalizer` replaces the number of loss tokens, respectively S, so that losses of micro-batches and ranks add
    up to the loss of the whole batch. S counts empty sequences too.

    A token outside `loss_mask`, or with advantage exactly 0 while `beta` and `entropy_coef` are 0, is skipped:
    whatever its inputs hold, inf and NaN included, it adds 0 and gets gradient 0, but the latter kind still counts
    as a loss token. Likewise the objective of a token that `*-mask` drops. NaN anywhere else comes out as NaN.

    Args:
        logps: log-probabilities of the tokens under the current policy; the gradient goes here (and to `entropy`).
        advantages: one per sequence, or one per token (S = T is read as one per sequence).
        cu_seqlens: offsets of the sequences, from 0 to T.
        old_logps, ref_logps, rollout_logps: under the policy at the start of the update, the reference, and as the
            rollout engine saw them. Constants. `ref_logps` and `rollout_logps` alone only add metrics.
        entropy: of the distributions the tokens were drawn from, nats; alone it only adds a metric.
        normalizer: a positive number or a tensor without dimensions (its value is not checked).

    Returns:
        The loss, without dimensions, fp32 (float64 for float64 `logps`), and the metrics that
        `thinktwice_kernels.METRICS` defines, detached. Nothing waits for the device.

    Raises:
        ValueError: shapes that do not fit, options out of range or without effect, a missing tensor.
    """
    options = LossOptions(
        policy_loss=policy_loss,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        delta=delta,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        rollout_is=rollout_is,
        rollout_is_cap=rollout_is_cap,
        rollout_is_floor=rollout_is_floor,
        guide_fallback=guide_fallback,
        released_code_compat=released_code_compat,
        beta=beta,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        loss_agg_mode=loss_agg_mode,
        max_response_length=max_response_length,
    )
    optional = {
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "entropy": entropy,
        "loss_mask": loss_mask,
        "guide_mask": guide_mask,
    }
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    options.check_inputs(given)
    _check_shapes(logps, advantages, cu_seqlens, given)
    if isinstance(normalizer, float | int) and not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer}: pass a positive count, or None for this batch's own")

    sequences = Sequences(cu_seqlens.to(logps.device), logps.numel())
    tokens = _prepare(logps, advantages, given, sequences, options)
    log_ratio = _log_ratio(tokens, sequences, options)
    per_token, flows = _policy_term(tokens, log_ratio, sequences, options)
    kl = None if tokens.ref_logps is None else kl_to_reference(tokens.logps, tokens.ref_logps, kl_estimator)
    if kl is not None and beta != 0:
        per_token = per_token + beta * kl
    if tokens.entropy is not None and entropy_coef != 0:
        per_token = per_token - entropy_coef * tokens.entropy
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


def _check_shapes(logps: Tensor, advantages: Tensor, cu_seqlens: Tensor, given: Mapping[str, Tensor]) -> None:
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(
            f"logps has shape {list(logps.shape)} and type {logps.dtype}: pass one floating-point number per token, "
            "[T], without padding"
        )
    check_cu_seqlens(cu_seqlens, logps.numel())
    for name, tensor in given.items():
        if tensor.shape != logps.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: pass one value per token, {list(logps.shape)}")
    count = cu_seqlens.numel() - 1
    if advantages.dim() != 1 or advantages.numel() not in (count, logps.numel()):
        raise ValueError(
            f"advantages has shape {list(advantages.shape)}: pass one per sequence, [{count}], or one per token, "
            f"{list(logps.shape)}"
        )
