"""The policy-gradient loss from log-probabilities.

Letters: T tokens, S sequences. A is the advantage, r the importance ratio, logp the current log-probability.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from thinktwice_kernels.advantages import ADVANTAGE_EPS, check_rewards, prepared_rewards
from thinktwice_kernels.ops import loss as ops
from thinktwice_kernels.options import (
    GuideFallback,
    ImportanceSamplingLevel,
    KlEstimator,
    LossAggMode,
    LossOptions,
    PolicyLoss,
    RolloutIs,
    ScaleRewards,
)
from thinktwice_kernels.packed import accumulation_dtype, check_cu_seqlens
from thinktwice_kernels.totals import loss_weights, metrics_of


def grpo_loss(
    logps: Tensor,  # [T], any floating type
    advantages: Tensor | None,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1] int32
    *,
    rewards: Tensor | None = None,  # [S]
    group_ids: Tensor | None = None,  # [S]
    scale_rewards: ScaleRewards = "none",
    advantage_eps: float = ADVANTAGE_EPS,
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
        advantages: one per sequence, or one per token (S = T is read as one per sequence); None with `rewards`.
        rewards, group_ids, scale_rewards, advantage_eps: in place of advantages, the arguments of `group_advantages`,
            which is then computed in the same kernel.
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
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(
            f"logps has shape {list(logps.shape)} and type {logps.dtype}: pass one floating-point number per token, "
            "[T], without padding"
        )
    check_cu_seqlens(cu_seqlens, logps.shape[0])
    optional = {
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "entropy": entropy,
        "loss_mask": loss_mask,
        "guide_mask": guide_mask,
    }
    given = prepared_tensors(optional, logps.shape, options, accumulation_dtype(logps))
    check_advantages(advantages, rewards, group_ids, cu_seqlens, logps.shape[0], scale_rewards, advantage_eps)
    check_normalizer(normalizer)
    logps = logps.to(accumulation_dtype(logps)).contiguous()
    per_group = (None, None) if rewards is None or group_ids is None else prepared_rewards(rewards, group_ids)
    loss, totals, _, _ = ops.grpo_loss(
        logps,
        None if advantages is None else advantages.detach().to(logps.dtype).contiguous(),
        *per_group,
        scale_rewards,
        advantage_eps,
        cu_seqlens.to(logps.device).contiguous(),
        loss_weights(cu_seqlens, given["loss_mask"], options, normalizer, logps),
        *given.values(),
        options.encode(),
        torch.is_grad_enabled() and (logps.requires_grad or (entropy is not None and entropy.requires_grad)),
    )
    return loss, metrics_of(totals, loss.dtype, absent_metrics(given))


def absent_metrics(given: Mapping[str, Tensor | None]) -> set[str]:
    """The metrics that are not there without an optional tensor."""
    needs = {"ref_logps": "kl_ref", "rollout_logps": "mismatch", "entropy": "entropy"}
    return {metric for name, metric in needs.items() if given.get(name) is None}


def prepared_tensors(
    optional: Mapping[str, Tensor | None],
    shape: torch.Size,  # [T]
    options: LossOptions,
    dtype: torch.dtype,
    computed: Collection[str] = (),
) -> dict[str, Tensor | None]:
    """The optional tensors [T] checked, and as the ops take them: masks as bool, the others in `dtype`.

    Only `entropy` keeps its gradient. `computed` names those that are not given but computed on the way.
    """
    options.check_inputs({name for name, tensor in optional.items() if tensor is not None} | set(computed))
    prepared: dict[str, Tensor | None] = {}
    for name, tensor in optional.items():
        if tensor is None:
            prepared[name] = None
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: pass one value per token, {list(shape)}")
        if name.endswith("mask"):
            tensor = tensor if tensor.dtype == torch.bool else tensor != 0
        else:
            tensor = (tensor if name == "entropy" else tensor.detach()).to(dtype)
        prepared[name] = tensor.contiguous()
    return prepared


def check_advantages(
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_ids: Tensor | None,
    cu_seqlens: Tensor,
    tokens: int,
    scale_rewards: str,
    eps: float,
) -> None:
    """Raise ValueError unless there are advantages [S] or [T], or rewards [S] and group_ids [S]."""
    count = cu_seqlens.numel() - 1
    if rewards is None and group_ids is None:
        if scale_rewards != "none":
            raise ValueError(f"scale_rewards={scale_rewards!r} has no effect without rewards: leave it at 'none'")
        if eps != ADVANTAGE_EPS:
            raise ValueError(f"advantage_eps={eps} has no effect without rewards: leave it at {ADVANTAGE_EPS}")
        if advantages is None or advantages.dim() != 1 or advantages.numel() not in (count, tokens):
            shape = None if advantages is None else list(advantages.shape)
            raise ValueError(
                f"advantages has shape {shape}: pass one per sequence, [{count}], or one per token, [{tokens}], or "
                "rewards and group_ids in their place"
            )
        return
    if advantages is not None or rewards is None or group_ids is None:
        raise ValueError("pass either advantages, or rewards and group_ids with advantages=None")
    check_rewards(rewards, group_ids, scale_rewards, eps)
    if rewards.numel() != count:
        raise ValueError(f"rewards has shape {list(rewards.shape)}: pass one per sequence, [{count}]")


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Raise ValueError for a number that is no positive count."""
    if isinstance(normalizer, float | int) and not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer}: pass a positive count, or None for this batch's own")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {list(normalizer.shape)}: pass a single count")
