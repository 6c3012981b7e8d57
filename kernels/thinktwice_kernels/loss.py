"""The policy-gradient loss from log-probabilities.

A token's rule stands here in torch, which autograd can differentiate and which also gives the derivative, and once more
in triton/loss.py, function by function. The reference and the CPU run the former, CUDA the latter.

Letters: T tokens, S sequences. A is the advantage, r the importance ratio, logp the current log-probability,
sg stop-gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from thinktwice_kernels.advantages import (
    ADVANTAGE_EPS,
    check_advantages,
    group_advantages_reference,
    prepared_rewards,
)
from thinktwice_kernels.launch import accumulation_dtype, first_order_only, in_triton, op, uses_triton
from thinktwice_kernels.metrics import (
    PARTIALS,
    Shaping,
    Terms,
    absent_metrics,
    metrics_of,
    only,
    partials_of,
    totals_of,
)
from thinktwice_kernels.options import (
    GuideFallback,
    ImportanceSamplingLevel,
    KlEstimator,
    LossAggMode,
    LossInputs,
    LossKeywords,
    LossOptions,
    PolicyLoss,
    RolloutIs,
    RolloutIsDenominator,
    ScaleRewards,
    Selection,
    Sequences,
    check_cu_seqlens,
    check_normalizer,
    counted,
    guided_tokens,
    loss_weights,
    prepared_tensors,
    select_tokens_in_torch,
)

# What the released code of ThinkTuning has for the weight of a guided token where the denominator is below 0, above 1.
GUARDED_BELOW = 1.0001
GUARDED_ABOVE = 0.9999
# From here on SAPO's sigmoid is 1 and its slope 0, in fp32 and float64; r itself would go on to inf, and 0 * inf.
_SAPO_LOG_RATIO_LIMIT = 60.0


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
    rollout_is_denominator: RolloutIsDenominator = "all",
    shaping_coefficient: float = 2.5e-4,
    shaping_clamp: float = 1e-3,
    shaping_min_probability: float = 0.01,
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
    rollout_is_cap], `*-mask` drops what lies outside. The KL and entropy terms are not weighted. A dropped token still
    counts in what the aggregation divides by, as in TRL and NeMo-RL; with `rollout_is_denominator` "kept" it is out of
    the loss altogether, as if `loss_mask` left it out, and a sequence that is dropped whole is none of the S, as in
    verl and slime. That needs `old_logps`, and `loss_count` gives the `normalizer` of a micro-batch.

    `guide_mask` marks tokens that another model wrote (ThinkTuning, arXiv 2508.07616). With p = exp(logp) and
    gamma(A) = clip(shaping_coefficient A, -shaping_clamp, +shaping_clamp) their objective is
    ``-A p / (sg(p) + gamma(A))``, without ratio and w. Where A < 0 and p < shaping_min_probability it is 0, or with
    `guide_fallback` "clip" that of an ordinary token. `released_code_compat` follows the released code: gamma is
    always -shaping_clamp; where sg(p) + gamma is below 0 it is replaced by sg(p) / 1.0001, where above 1 by
    sg(p) / 0.9999 (at exactly 0, where theirs divides by it, as below); and one guided token makes its whole sequence
    guided. Guided tokens stay out of sequence-level ratios and products; the KL and entropy terms are theirs as well.

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
        rollout_is_denominator=rollout_is_denominator,
        shaping_coefficient=shaping_coefficient,
        shaping_clamp=shaping_clamp,
        shaping_min_probability=shaping_min_probability,
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
    kept = restrict_to_kept(given, cu_seqlens, options)
    per_group = (None, None) if rewards is None or group_ids is None else prepared_rewards(rewards, group_ids)
    loss, totals, _, _ = _grpo_loss(
        logps,
        None if advantages is None else advantages.detach().to(logps.dtype).contiguous(),
        *per_group,
        scale_rewards,
        advantage_eps,
        cu_seqlens.to(logps.device).contiguous(),
        loss_weights(cu_seqlens, given["loss_mask"], options, normalizer, logps, kept.dropped_sequences),
        *given.values(),
        options.encode(),
        torch.is_grad_enabled() and (logps.requires_grad or (entropy is not None and entropy.requires_grad)),
    )
    return loss, metrics_of(with_dropped(totals, kept), loss.dtype, absent_metrics(given, options.rollout_is != "none"))


def loss_count(
    cu_seqlens: Tensor,  # [S+1]
    *,
    old_logps: Tensor | None = None,  # [T]
    rollout_logps: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T], bool or 0/1
    guide_mask: Tensor | None = None,  # [T], bool or 0/1
    **options: Unpack[LossKeywords],
) -> Tensor:
    """What `grpo_loss` divides this batch by for itself: loss tokens or S, as `loss_agg_mode` says, without those that
    `rollout_is_denominator` "kept" leaves out.

    Summed over all micro-batches and ranks it is the `normalizer` of each.

    Args:
        cu_seqlens, old_logps, rollout_logps, loss_mask, guide_mask, options: as `grpo_loss` gets them; the
            log-probabilities are looked at with `rollout_is_denominator` "kept" only.

    Returns:
        int64, without dimensions. Nothing waits for the device.

    Raises:
        ValueError: as `grpo_loss` does.
    """
    parsed = LossOptions(**options)
    optional = {
        "old_logps": old_logps,
        "rollout_logps": rollout_logps,
        "loss_mask": loss_mask,
        "guide_mask": guide_mask,
    }
    shape = next((tensor.shape for tensor in optional.values() if tensor is not None), torch.Size())
    given = prepared_tensors(optional, shape, parsed, torch.float64, computed={"ref_logps", "entropy"})
    kept = restrict_to_kept(given, cu_seqlens, parsed)
    count = counted(cu_seqlens, given["loss_mask"], parsed, cu_seqlens[-1], kept.dropped_sequences)
    return torch.as_tensor(count).long()


@dataclass(frozen=True)
class Kept:
    """What `rollout_is_denominator` "kept" leaves out; None with "all"."""

    dropped_tokens: Tensor | None = None  # []: loss tokens
    dropped_sequences: Tensor | None = None  # []: sequences that have no other loss tokens


@torch.no_grad()
def restrict_to_kept(
    given: dict[str, Tensor | None],  # of `prepared_tensors`
    cu_seqlens: Tensor,  # [S+1]
    options: LossOptions,
) -> Kept:
    """With "kept", take what `rollout_is` drops out of ``given["loss_mask"]``; with "all" nothing happens."""
    old_logps, rollout_logps, guide_mask = (given[name] for name in ("old_logps", "rollout_logps", "guide_mask"))
    if not options.counts_kept_only():
        return Kept()
    assert old_logps is not None and rollout_logps is not None
    device = old_logps.device
    sequences = Sequences(cu_seqlens.to(device), old_logps.numel())
    in_loss = given["loss_mask"]
    in_loss = torch.ones_like(old_logps, dtype=torch.bool) if in_loss is None else in_loss.to(device)
    guided = guided_tokens(None if guide_mask is None else guide_mask.to(device), in_loss, sequences, options)
    ordinary = in_loss if guided is None else in_loss & ~guided
    log_weight = only(ordinary, old_logps.double() - rollout_logps.double())
    dropped = ordinary & (rollout_weight(log_weight, sequences, options) == 0)
    kept = in_loss & ~dropped
    given["loss_mask"] = kept
    emptied = (sequences.sum(dropped.int()) > 0) & (sequences.sum(kept.int()) == 0)
    return Kept(dropped.sum(), emptied.sum())


def with_dropped(
    totals: Tensor,  # [len(PARTIALS)]
    kept: Kept,
) -> Tensor:
    """The totals, with what was left out before they were added up."""
    if kept.dropped_tokens is None:
        return totals
    column = torch.arange(len(PARTIALS), device=totals.device) == PARTIALS.index("dropped")
    return torch.where(column, kept.dropped_tokens.to(totals.dtype), totals)


@op("grpo_loss")
def _grpo_loss(
    logps: Tensor,  # [T]
    advantages: Tensor | None,  # [S] or [T]
    rewards: Tensor | None,  # [S]
    group_ids: Tensor | None,  # [S]
    scale_rewards: str,
    advantage_eps: float,
    cu_seqlens: Tensor,  # [S+1]
    weights: Tensor,  # [S]
    old_logps: Tensor | None,  # [T]
    ref_logps: Tensor | None,  # [T]
    rollout_logps: Tensor | None,  # [T]
    entropy: Tensor | None,  # [T]
    loss_mask: Tensor | None,  # [T] bool
    guide_mask: Tensor | None,  # [T] bool
    options: Sequence[float],  # LossOptions.encode()
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the totals [len(PARTIALS)] float64, and the gradients of logps [T] and entropy [T]."""
    inputs = LossInputs(
        logps, advantages, cu_seqlens, weights, old_logps, ref_logps, rollout_logps, entropy, loss_mask, guide_mask,
        rewards, group_ids, cast(ScaleRewards, scale_rewards), advantage_eps,
    )  # fmt: skip
    partials, d_logps, d_entropy = sequence_loss(inputs, LossOptions.decode(options), want_gradient)
    totals = totals_of(partials)
    return totals[0].to(logps.dtype, copy=True), totals, d_logps, d_entropy


@_grpo_loss.register_fake
def _(logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, want_gradient = rest[-2:]
    totals = logps.new_empty(len(PARTIALS), dtype=torch.float64)
    with_entropy = want_gradient and LossOptions.decode(options).entropy_coef != 0
    return (
        logps.new_empty(()),
        totals,
        logps.new_empty(logps.shape[0] if want_gradient else 0),
        logps.new_empty(logps.shape[0] if with_entropy else 0),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, totals, d_logps, d_entropy = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(totals, d_logps, d_entropy)
    ctx.save_for_backward(inputs[0], inputs[11], d_logps, d_entropy)


@first_order_only
def _loss_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 16
    *_, d_logps, d_entropy = ctx.saved_tensors
    of_logps = d_logps * gradient if ctx.needs_input_grad[0] else None
    of_entropy = d_entropy * gradient if ctx.needs_input_grad[11] and d_entropy.numel() else None
    return of_logps, *(None,) * 10, of_entropy, *(None,) * 4


_grpo_loss.register_autograd(_loss_backward, setup_context=_loss_setup)


def sequence_loss(
    inputs: LossInputs, options: LossOptions, want_gradient: bool, selected: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and gradient of sequences whose tokens depend on no others.

    Returns float64 sums over the tokens of each of n parts [n, len(PARTIALS)]; the gradients of their total loss with
    respect to `logps` and `entropy` [T], in the type of `logps`, 0 where nothing flows. Without `want_gradient` both
    are empty, [0]; the second also while `entropy_coef` is 0.

    `selected`: the inputs are those of `select_tokens`; the number of loss tokens is then that of the computed ones.
    """
    if uses_triton(inputs.logps):
        return in_triton("loss").sequence_loss_in_triton(inputs, options, want_gradient)
    return _selected_loss(inputs, options, want_gradient) if selected else _any_loss(inputs, options, want_gradient)


def _any_loss(inputs: LossInputs, options: LossOptions, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The selected tokens' loss, and their gradients among zeros."""
    if inputs.advantages is None:
        assert inputs.rewards is not None and inputs.group_ids is not None
        scale, eps = inputs.scale_rewards, inputs.advantage_eps
        advantages = group_advantages_reference(inputs.rewards, inputs.group_ids, scale_rewards=scale, eps=eps)
        inputs = replace(inputs, advantages=advantages)
    found = selected_in_torch(inputs, options)
    partials, d_logps, d_entropy = _selected_loss(found.inputs, options, want_gradient)
    partials[0, PARTIALS.index("tokens")] = found.in_loss
    if want_gradient and not found.everything:
        zeros = torch.zeros_like(inputs.logps)
        d_logps = zeros.index_copy(0, found.rows, d_logps)
        if options.entropy_coef != 0:
            d_entropy = zeros.index_copy(0, found.rows, d_entropy)
    return partials, d_logps, d_entropy


def _selected_loss(inputs: LossInputs, options: LossOptions, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, as Triton has it."""
    dtype = inputs.logps.dtype
    given: dict[str, Any] = vars(inputs)
    inputs = LossInputs(**{name: x.double() if _is_number(x) else x for name, x in given.items()})
    sequences = Sequences(inputs.cu_seqlens, inputs.logps.numel())
    terms = terms_of(inputs, sequences, options)
    d_logps, d_entropy = (inputs.logps.new_empty(0, dtype=dtype) for _ in range(2))
    if want_gradient:
        d_logps = _d_logps(terms, sequences).to(dtype)
        if options.entropy_coef != 0:
            d_entropy = (-options.entropy_coef * inputs.weights).to(dtype)
    return partials_of(terms), d_logps, d_entropy


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _d_logps(terms: Terms, sequences: Sequences) -> Tensor:  # [T]
    own = terms.weights * terms.slope
    if terms.shared_slope is None:
        return own
    shared = sequences.sum(terms.weights * terms.shared_slope) / _count(terms.ordinary, sequences, own)
    return own + only(terms.ordinary, sequences.spread(shared))


def selected_in_torch(inputs: LossInputs, options: LossOptions) -> Selection:
    """`select_tokens_in_torch`, with log-probabilities and entropies."""
    found = select_tokens_in_torch(inputs, inputs.logps.numel(), options)
    if found.everything:
        return found
    entropy = None if inputs.entropy is None else inputs.entropy.index_select(0, found.rows)
    logps = inputs.logps.index_select(0, found.rows)
    return replace(found, inputs=replace(found.inputs, logps=logps, entropy=entropy))


def terms_of(
    inputs: LossInputs,  # those of `select_tokens`, T tokens; floating-point tensors of one type
    sequences: Sequences,
    options: LossOptions,
) -> Terms:
    """The definition of the loss, token by token. Autograd may differentiate the values.

    Some tokens are guided. Others are ordinary, and these have a ratio, as have guided ones that fall back to it.
    """
    logps, advantages = inputs.logps, inputs.advantages
    assert advantages is not None
    ordinary = with_ratio = None if inputs.guide_mask is None else ~inputs.guide_mask  # None: all tokens
    if ordinary is not None and options.guide_fallback == "clip":
        with_ratio = ordinary | too_unlikely_to_shape(logps, advantages, options)
    old_logps = logps.detach() if inputs.old_logps is None else inputs.old_logps
    difference = log_ratio = only(with_ratio, logps - old_logps)
    if options.importance_sampling_level == "sequence":
        mean = sequences.sum(difference) / _count(with_ratio, sequences, difference)
        log_ratio = only(with_ratio, sequences.spread(mean))
    ratio = log_ratio.detach().exp()
    low, high = clipped(ratio, advantages, options)
    log_weight = None if inputs.rollout_logps is None else only(ordinary, old_logps - inputs.rollout_logps)

    used = with_ratio
    if options.needs_whole_sequences() or not options.skips_zero_advantages():  # else no advantage is 0
        used = both(used, advantages != 0)
    weight = dropped = None
    if log_weight is not None and options.rollout_is != "none":
        weight = rollout_weight(log_weight, sequences, options)
        weight = weight if ordinary is None else torch.where(ordinary, weight, 1)
        used = both(used, weight != 0)
        dropped = weight == 0 if options.rollout_is.endswith("mask") else None
    # Unused tokens get arguments at which autograd multiplies no 0 by inf.
    value, slope, flows = surrogate(
        only(used, log_ratio), only(used, logps), only(used, advantages), ratio, low, high, options
    )
    if weight is not None:
        value, slope = weight * value, only(flows, weight * slope)
    value, slope, flows = only(used, value), only(used, slope), both(used, flows)
    shared_slope = None
    if options.importance_sampling_level == "sequence" and options.policy_loss != "cispo":
        # The slope is one with respect to the mean log-ratio, and goes to all tokens that it was taken over.
        flows = both(ordinary, sequences.any(flows))
        slope, shared_slope = torch.zeros_like(slope), slope
    shaping = None
    if with_ratio is not None:
        assert ordinary is not None
        shaped_value, shaping = shaped(logps, advantages, ~ordinary, options)
        value, slope = value + shaped_value, slope + shaped_value.detach()
        flows = flows | shaping.pos | shaping.neg

    kl = None
    if inputs.ref_logps is not None:
        kl, kl_slope = kl_to_reference(logps, inputs.ref_logps, options.kl_estimator)
        if options.beta != 0:
            value, slope = value + options.beta * kl, slope + options.beta * kl_slope
    if options.entropy_coef != 0:
        assert inputs.entropy is not None
        value = value - options.entropy_coef * inputs.entropy
    return Terms(
        ordinary=ordinary,
        weights=inputs.weights,
        value=value,
        slope=slope,
        shared_slope=shared_slope,
        flows=flows if options.skips_zero_advantages() else None,
        difference=difference.detach(),
        ratio=ratio,
        clipped=(low, high),
        kl=kl,
        mismatch=None if log_weight is None else log_weight.abs(),
        rollout_is=weight,
        dropped=dropped,
        shaping=shaping,
        entropy=inputs.entropy,
    )


def both(flags: Tensor | None, others: Tensor) -> Tensor:  # [T] bool
    """Where both are set; None: everywhere."""
    return others if flags is None else flags & others


def _count(flags: Tensor | None, sequences: Sequences, like: Tensor) -> Tensor:  # [S]
    """How many tokens of each sequence have the flag (None: all), at least 1."""
    counts = sequences.offsets.diff() if flags is None else sequences.sum(flags.to(like.dtype))
    return counts.clamp(min=1)


def surrogate(
    log_ratio: Tensor,  # [T]
    logps: Tensor,  # [T]
    advantages: Tensor,  # [T]
    ratio: Tensor,  # [T]: exp(log_ratio), constant
    low: Tensor,  # [T] bool, and
    high: Tensor,  # [T] bool: where it is `clipped`
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # [T] loss, [T] slope, [T] bool: the gradient flows
    """The objective that `options.policy_loss` names.

    The slope is the derivative with respect to the log-ratio; cispo's, which has none, with respect to logp.
    """
    if options.policy_loss == "cispo":
        slope = -ratio.clamp(max=1 + options.epsilon_high) * advantages
        return slope * logps, slope, torch.ones_like(low)
    if options.policy_loss == "sapo":
        return *_sapo(log_ratio, advantages, options), torch.ones_like(low)
    stopped = low | high
    bound = ratio.clamp(1 - options.epsilon_low, 1 + options.epsilon_high)
    # Where A < 0, dual clip's "loss at most -c A" and delta's "ratio at most delta" are one and the same bound.
    ceiling = options.dual_clip if options.dual_clip is not None else options.delta
    if ceiling is not None:
        capped = (advantages < 0) & (ratio > ceiling)
        stopped = stopped | capped
        bound.masked_fill_(capped, ceiling)
    if log_ratio.requires_grad:
        ratio = log_ratio.masked_fill(stopped, 0).exp()  # so that autograd multiplies no 0 by inf
    value = -advantages * torch.where(stopped, bound, ratio)
    return value, value.detach().masked_fill(stopped, 0), ~stopped


def clipped(
    ratio: Tensor,  # [T]
    advantages: Tensor,  # [T]
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # [T] bool low, [T] bool high
    """Where the ratio is beyond a bound that binds.

    clip: low is A < 0 and r < 1 - epsilon_low, high is A > 0 and r > 1 + epsilon_high. cispo: high is
    r > 1 + epsilon_high, whatever A; nothing is low. sapo has no bounds.
    """
    above = ratio > 1 + options.epsilon_high
    if options.policy_loss == "clip":
        return (advantages < 0) & (ratio < 1 - options.epsilon_low), (advantages > 0) & above
    nowhere = torch.zeros_like(above)
    return nowhere, above if options.policy_loss == "cispo" else nowhere


def _sapo(log_ratio: Tensor, advantages: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    tau = torch.full_like(advantages, options.sapo_temperature_neg).masked_fill_(
        advantages > 0, options.sapo_temperature_pos
    )
    ratio = log_ratio.clamp(max=_SAPO_LOG_RATIO_LIMIT).exp()
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = -advantages * gate * (1 - gate) * 4 * ratio
    return -advantages * gate * (4 / tau), slope.detach()


def rollout_weight(
    log_weight: Tensor,  # [T], 0 where guided
    sequences: Sequences,
    options: LossOptions,
) -> Tensor:  # [T], constant
    """What a ratio objective is multiplied by."""
    if options.rollout_is.startswith("sequence"):
        log_weight = sequences.spread(sequences.sum(log_weight))
    weight = log_weight.exp()
    floor = options.rollout_is_floor or 0.0
    if options.rollout_is.endswith("truncate"):
        return weight.clamp(floor, options.rollout_is_cap)
    return torch.where((weight < floor) | (weight > options.rollout_is_cap), 0, weight)


def too_unlikely_to_shape(
    logps: Tensor,  # [T]
    advantages: Tensor,  # [T]
    options: LossOptions,
) -> Tensor:  # [T] bool
    """Where shaping leaves a guided token out: A < 0 and exp(logp) < shaping_min_probability."""
    return (advantages < 0) & (logps.detach().exp() < options.shaping_min_probability)


def shaped(
    logps: Tensor,  # [T]
    advantages: Tensor,  # [T]
    guided: Tensor,  # [T] bool
    options: LossOptions,
) -> tuple[Tensor, Shaping]:  # [T] loss, which is its slope too
    """ThinkTuning's advantage-aware shaping of guided tokens (arXiv 2508.07616).

    With p = exp(logp) and gamma(A) = clip(coefficient A, -clamp, +clamp): loss = -A p / (sg(p) + gamma(A)), and 0
    where `too_unlikely_to_shape`. `released_code_compat`: gamma = -clamp whatever A, and guards.
    """
    masked = guided & too_unlikely_to_shape(logps, advantages, options)
    used = guided & ~masked & (advantages != 0)
    own = torch.where(used, logps, 0)
    p = own.detach().exp()
    limit = options.shaping_clamp
    if options.released_code_compat:
        denominator = p - limit
        weight = torch.where(denominator > 1, GUARDED_ABOVE, p / denominator)
        weight = torch.where(denominator <= 0, GUARDED_BELOW, weight)
    else:
        weight = p / (p + (advantages * options.shaping_coefficient).clamp(-limit, limit))
    if own.requires_grad:
        own = only(own.isfinite(), own)
        # The factor is 1, with the slope of p / sg(p).
        value = -advantages * (weight * (own - own.detach()).exp())
    else:
        value = -advantages * weight
    shaping = Shaping(weight, used & (advantages > 0), used & ~(advantages > 0), masked)
    return torch.where(used, value, 0), shaping


def kl_to_reference(
    logps: Tensor,  # [T]
    ref_logps: Tensor,  # [T]
    estimator: KlEstimator,
) -> tuple[Tensor, Tensor]:  # [T] the estimate, [T] its slope
    """Per-token estimate of KL(policy || reference), in nats (J. Schulman, "Approximating KL divergence").

    k1 = logp - ref, k2 = (logp - ref)^2 / 2, k3 = exp(ref - logp) - (ref - logp) - 1.
    """
    difference = ref_logps - logps
    if estimator == "k1":
        return -difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference.square() / 2, -difference.detach()
    rest = difference.expm1()
    return rest - difference, -rest.detach()
