"""The loss of whole sequences with metrics and gradient, as loss.py has it in torch, one program per sequence.

All arithmetic is in float64, which costs nothing beside the memory that a token takes, and sums of a hundred thousand
tokens keep their digits. Sums add up per lane and meet once, at the end, always in the same order.

First what each token adds, and its derivative, over float64 blocks of tokens. Modes are constexpr: the position of the
value among its choices. "Slope" is a derivative with respect to logp or, of a ratio objective, to the log-ratio.

Letters: T tokens, S sequences.
"""

import math
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import SHAPES, launch
from thinktwice_kernels.loss import GUARDED_ABOVE, GUARDED_BELOW
from thinktwice_kernels.metrics import PARTIALS
from thinktwice_kernels.options import KlEstimator, LossInputs, LossOptions, PolicyLoss
from thinktwice_kernels.triton.advantages import SCALES, advantage_of
from thinktwice_kernels.triton.numerics import expm1, expm1_minus, number
from thinktwice_kernels.triton.tokens import any_of, in_loss_of, mask_bytes, of_tokens, read

_CLIP = tl.constexpr(get_args(PolicyLoss).index("clip"))
_CISPO = tl.constexpr(get_args(PolicyLoss).index("cispo"))
_SAPO = tl.constexpr(get_args(PolicyLoss).index("sapo"))
_K1 = tl.constexpr(get_args(KlEstimator).index("k1"))
_K2 = tl.constexpr(get_args(KlEstimator).index("k2"))
# From here on SAPO's sigmoid is 1 and its slope 0; the ratio itself would go on to inf, and 0 * inf.
_SAPO_LOG_RATIO_LIMIT = tl.constexpr(60.0)
_GUARDED_BELOW = tl.constexpr(GUARDED_BELOW)
_GUARDED_ABOVE = tl.constexpr(GUARDED_ABOVE)
_COLUMNS = tl.constexpr(len(PARTIALS))
_LOSS = tl.constexpr(PARTIALS.index("loss"))
_TOKENS = tl.constexpr(PARTIALS.index("tokens"))
_COMPUTED = tl.constexpr(PARTIALS.index("computed"))
_GUIDED = tl.constexpr(PARTIALS.index("guided"))
_MASKED = tl.constexpr(PARTIALS.index("masked"))
_SHAPED_POS = tl.constexpr(PARTIALS.index("shaped_pos"))
_SHAPED_NEG = tl.constexpr(PARTIALS.index("shaped_neg"))
_DROPPED = tl.constexpr(PARTIALS.index("dropped"))
_WITH_GRADIENT = tl.constexpr(PARTIALS.index("with_gradient"))
_CLIP_LOW = tl.constexpr(PARTIALS.index("clip_low"))
_CLIP_HIGH = tl.constexpr(PARTIALS.index("clip_high"))
_RATIO = tl.constexpr(PARTIALS.index("ratio"))
_APPROX_KL = tl.constexpr(PARTIALS.index("approx_kl"))
_KL_REF = tl.constexpr(PARTIALS.index("kl_ref"))
_MISMATCH = tl.constexpr(PARTIALS.index("mismatch"))
_ROLLOUT_IS = tl.constexpr(PARTIALS.index("rollout_is"))
_SHAPING_POS = tl.constexpr(PARTIALS.index("shaping_pos"))
_SHAPING_NEG = tl.constexpr(PARTIALS.index("shaping_neg"))
_ENTROPY = tl.constexpr(PARTIALS.index("entropy"))
_RATIO_MAX = tl.constexpr(PARTIALS.index("ratio_max"))


@triton.jit
def clipped(ratio, advantages, epsilon_low, epsilon_high, POLICY: tl.constexpr):
    """Where the ratio is below, or above, a bound that binds."""
    low = (advantages < 0) & (ratio < 1.0 - epsilon_low) & (POLICY == _CLIP)
    high = ((advantages > 0) | (POLICY == _CISPO)) & (ratio > 1.0 + epsilon_high) & (POLICY != _SAPO)
    return low, high


@triton.jit
def surrogate(
    log_ratio,
    ratio,  # its exponential
    logps,
    advantages,
    epsilon_low,
    epsilon_high,
    ceiling,  # of the ratio where the advantage is negative; inf: none
    temperature_pos,
    temperature_neg,
    POLICY: tl.constexpr,
):
    """Objective, slope, and whether a gradient flows."""
    low, high = clipped(ratio, advantages, epsilon_low, epsilon_high, POLICY)
    if POLICY == _CISPO:
        weight = tl.where(high, 1.0 + epsilon_high, ratio)
        slope = -weight * advantages
        value = slope * logps
        flows = tl.full(advantages.shape, True, tl.int1)
    elif POLICY == _SAPO:
        value, slope = _sapo(log_ratio, advantages, temperature_pos, temperature_neg)
        flows = tl.full(advantages.shape, True, tl.int1)
    else:
        capped = (advantages < 0) & (ratio > ceiling)
        stopped = low | high | capped
        bounded = tl.where(low, 1.0 - epsilon_low, tl.where(high, 1.0 + epsilon_high, ratio))
        value = -advantages * tl.where(capped, ceiling, bounded)
        slope = tl.where(stopped, 0.0, value)
        flows = stopped == 0
    return value, slope, flows


@triton.jit
def _sapo(log_ratio, advantages, temperature_pos, temperature_neg):
    tau = tl.where(advantages > 0, temperature_pos, temperature_neg)
    beyond = log_ratio > _SAPO_LOG_RATIO_LIMIT
    bounded = tl.where(beyond, _SAPO_LOG_RATIO_LIMIT, log_ratio)
    gate = 1.0 / (1.0 + tl.exp(-tau * expm1(bounded)))
    slope = tl.where(beyond, 0.0, gate * (1.0 - gate) * 4.0 * tl.exp(bounded))
    return -advantages * gate * 4.0 / tau, -advantages * slope


@triton.jit
def too_unlikely_to_shape(logps, advantages, min_probability):
    """Where shaping leaves a guided token out."""
    return (advantages < 0) & (tl.exp(logps) < min_probability)


@triton.jit
def shaped(logps, advantages, guided, coefficient, limit, min_probability, COMPAT: tl.constexpr):
    """Objective of the shaping, which is its slope too, the weight in it, where it flows and where it is masked."""
    masked = guided & too_unlikely_to_shape(logps, advantages, min_probability)
    used = guided & (masked == 0) & (advantages != 0)
    p = tl.exp(tl.where(used, logps, 0.0))
    if COMPAT:
        denominator = p - limit
        weight = tl.where(denominator > 1.0, number(_GUARDED_ABOVE, tl.float64), p / denominator)
        weight = tl.where(denominator <= 0.0, number(_GUARDED_BELOW, tl.float64), weight)
    else:
        gamma = advantages * coefficient
        gamma = tl.where(gamma > limit, limit, gamma)
        gamma = tl.where(gamma < -limit, -limit, gamma)
        weight = p / (p + gamma)
    return tl.where(used, -advantages * weight, 0.0), weight, used, masked


@triton.jit
def rollout_weight(log_weight, floor, cap, TRUNCATE: tl.constexpr):
    """The constant that a ratio objective is multiplied by."""
    weight = tl.exp(log_weight)
    below, above = weight < floor, weight > cap
    if TRUNCATE:
        return tl.where(below, floor, tl.where(above, cap, weight))
    else:
        return tl.where(below | above, 0.0, weight)


@triton.jit
def kl_to_reference(logps, ref_logps, ESTIMATOR: tl.constexpr):
    """The estimate and its slope."""
    difference = ref_logps - logps
    if ESTIMATOR == _K1:
        return -difference, tl.zeros_like(difference) + 1.0
    elif ESTIMATOR == _K2:
        return difference * difference * 0.5, -difference
    else:
        return expm1_minus(difference), -expm1(difference)


@triton.jit
def _load_tokens(
    tokens,
    inside,
    own_advantage,
    any_advantage,
    any_guided,
    logps_ptr,
    advantages_ptr,
    old_logps_ptr,
    loss_mask_ptr,
    guide_mask_ptr,
    shaping_min_probability,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    WHOLE: tl.constexpr,
    SKIP: tl.constexpr,
    FALLBACK: tl.constexpr,
    COMPAT: tl.constexpr,
):
    """Flags (in loss, computed, guided among these, with ratio), then logp, old logp and advantage."""
    in_loss = in_loss_of(loss_mask_ptr, tokens, inside)
    advantages = of_tokens(advantages_ptr, tokens, in_loss, own_advantage, ADVANTAGE_PER_TOKEN)
    computed = in_loss
    if SKIP:
        computed = in_loss & (any_advantage if WHOLE else advantages != 0)
    logps = read(logps_ptr, tokens, computed)
    guided = computed & any_guided
    if guide_mask_ptr is not None and not COMPAT:
        guided = tl.load(guide_mask_ptr + tokens, mask=computed, other=0) != 0
    with_ratio = computed & (guided == 0)
    if FALLBACK:
        with_ratio = with_ratio | (guided & too_unlikely_to_shape(logps, advantages, shaping_min_probability))
    old_logps = tl.where(with_ratio, logps, 0.0)
    if old_logps_ptr is not None:
        old_logps = read(old_logps_ptr, tokens, with_ratio)
    return in_loss, computed, guided, with_ratio, logps, old_logps, advantages


@triton.jit(
    do_not_specialize=["sequences", "scale_rewards"],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr",
        "logps_ptr",
        "advantages_ptr",
        "rewards_ptr",
        "group_ids_ptr",
        "weights_ptr",
        "old_logps_ptr",
        "ref_logps_ptr",
        "rollout_logps_ptr",
        "entropy_ptr",
        "loss_mask_ptr",
        "guide_mask_ptr",
        "partials_ptr",
        "d_logps_ptr",
        "d_entropy_ptr",
    ],
)
def sequence_loss(
    cu_seqlens_ptr,  # [S+1]
    logps_ptr,  # [T]
    advantages_ptr,  # [S] or [T]; None: from the rewards
    rewards_ptr,  # [S] or None
    group_ids_ptr,  # [S] or None
    weights_ptr,  # [S] or [T]
    old_logps_ptr,  # [T] or None
    ref_logps_ptr,  # [T] or None
    rollout_logps_ptr,  # [T] or None
    entropy_ptr,  # [T] or None
    loss_mask_ptr,  # [T] bytes or None
    guide_mask_ptr,  # [T] bytes or None
    partials_ptr,  # [S, len(PARTIALS)]
    d_logps_ptr,  # [T]; None: no gradient wanted
    d_entropy_ptr,  # [T]; None: not wanted, or entropy_coef is 0
    sequences,  # S
    scale_rewards,  # position among its choices
    epsilon_low: tl.float64,
    epsilon_high: tl.float64,
    ceiling: tl.float64,
    temperature_pos: tl.float64,
    temperature_neg: tl.float64,
    rollout_floor: tl.float64,
    rollout_cap: tl.float64,
    shaping_coefficient: tl.float64,
    shaping_clamp: tl.float64,
    shaping_min_probability: tl.float64,
    beta: tl.float64,
    entropy_coef: tl.float64,
    advantage_eps: tl.float64,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    WEIGHT_PER_TOKEN: tl.constexpr,
    POLICY: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    ROLLOUT_IS: tl.constexpr,  # importance correction of the rollout
    SEQUENCE_ROLLOUT: tl.constexpr,  # of which the weight is the sequence's
    TRUNCATE: tl.constexpr,  # of which the weight is bounded, not masked
    FALLBACK: tl.constexpr,  # guided tokens too unlikely to shape use the ratio
    COMPAT: tl.constexpr,
    KL: tl.constexpr,  # estimator
    USE_KL: tl.constexpr,  # beta is not 0
    USE_ENTROPY: tl.constexpr,  # entropy_coef is not 0
    BLOCK: tl.constexpr,
):
    WHOLE: tl.constexpr = SEQUENCE_RATIO or SEQUENCE_ROLLOUT
    SKIP: tl.constexpr = not USE_KL and not USE_ENTROPY
    # Whether the gradient flows through the mean log-ratio of the sequence.
    SPREAD: tl.constexpr = SEQUENCE_RATIO and POLICY != _CISPO

    epsilon_low = number(epsilon_low, tl.float64)
    epsilon_high = number(epsilon_high, tl.float64)
    ceiling = number(ceiling, tl.float64)
    temperature_pos = number(temperature_pos, tl.float64)
    temperature_neg = number(temperature_neg, tl.float64)
    rollout_floor = number(rollout_floor, tl.float64)
    rollout_cap = number(rollout_cap, tl.float64)
    shaping_coefficient = number(shaping_coefficient, tl.float64)
    shaping_clamp = number(shaping_clamp, tl.float64)
    shaping_min_probability = number(shaping_min_probability, tl.float64)
    beta = number(beta, tl.float64)
    entropy_coef = number(entropy_coef, tl.float64)

    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    own_weight = tl.full((), 0.0, tl.float64)
    if not WEIGHT_PER_TOKEN:
        own_weight = tl.load(weights_ptr + sequence).to(tl.float64)
    own_advantage = tl.full((), 0.0, tl.float64)
    if advantages_ptr is None:
        own_advantage = advantage_of(
            sequence, rewards_ptr, group_ids_ptr, sequences, advantage_eps, scale_rewards, BLOCK
        ).to(tl.float64)
    elif not ADVANTAGE_PER_TOKEN:
        own_advantage = tl.load(advantages_ptr + sequence).to(tl.float64)

    # What all tokens need to know of the sequence: flags.
    any_advantage = own_advantage != 0
    any_guided = begin > end
    if COMPAT or (WHOLE and SKIP):
        advantage_found = tl.zeros((BLOCK,), tl.int1)
        guide_found = tl.zeros((BLOCK,), tl.int1)
        for start in range(begin, end, BLOCK):
            tokens = start + lanes
            in_loss = in_loss_of(loss_mask_ptr, tokens, tokens < end)
            advantages = of_tokens(advantages_ptr, tokens, in_loss, own_advantage, ADVANTAGE_PER_TOKEN)
            advantage_found = advantage_found | (advantages != 0)
            if COMPAT:
                guide_found = guide_found | (tl.load(guide_mask_ptr + tokens, mask=in_loss, other=0) != 0)
        any_advantage = any_of(advantage_found)
        any_guided = any_of(guide_found)

    # Then the means and sums of log-ratios.
    log_ratio_mean = tl.full((), 0.0, tl.float64)
    log_weight_sum = tl.full((), 0.0, tl.float64)
    with_ratio_count = tl.full((), 0.0, tl.float64)
    if WHOLE:
        log_ratios = tl.zeros((BLOCK,), tl.float64)
        log_weights = tl.zeros((BLOCK,), tl.float64)
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            tokens = start + lanes
            _, computed, guided, with_ratio, logps, old_logps, _ = _load_tokens(
                tokens, tokens < end, own_advantage, any_advantage, any_guided,
                logps_ptr, advantages_ptr, old_logps_ptr, loss_mask_ptr, guide_mask_ptr, shaping_min_probability,
                ADVANTAGE_PER_TOKEN, WHOLE, SKIP, FALLBACK, COMPAT,
            )  # fmt: skip
            log_ratios += tl.where(with_ratio, logps - old_logps, 0.0)
            counts += with_ratio.to(tl.int32)
            if SEQUENCE_ROLLOUT:
                ordinary = computed & (guided == 0)
                rollout_logps = read(rollout_logps_ptr, tokens, ordinary)
                log_weights += tl.where(ordinary, old_logps - rollout_logps, 0.0)
        with_ratio_count = tl.maximum(tl.sum(counts, 0), 1).to(tl.float64)
        log_ratio_mean = tl.sum(log_ratios, 0) / with_ratio_count
        log_weight_sum = tl.sum(log_weights, 0)

    # Then each token's term, its own slope and the metrics.
    loss = tl.zeros((BLOCK,), tl.float64)
    ratio_sum = tl.zeros((BLOCK,), tl.float64)
    ratio_max = tl.zeros((BLOCK,), tl.float64)
    approx_kl = tl.zeros((BLOCK,), tl.float64)
    kl_ref = tl.zeros((BLOCK,), tl.float64)
    mismatch = tl.zeros((BLOCK,), tl.float64)
    rollout_sum = tl.zeros((BLOCK,), tl.float64)
    shaping_pos = tl.zeros((BLOCK,), tl.float64)
    shaping_neg = tl.zeros((BLOCK,), tl.float64)
    entropy_sum = tl.zeros((BLOCK,), tl.float64)
    shared_slope = tl.zeros((BLOCK,), tl.float64)
    token_count = tl.zeros((BLOCK,), tl.int32)
    computed_count = tl.zeros((BLOCK,), tl.int32)
    guided_count = tl.zeros((BLOCK,), tl.int32)
    flow_count = tl.zeros((BLOCK,), tl.int32)
    shaped_pos_count = tl.zeros((BLOCK,), tl.int32)
    shaped_neg_count = tl.zeros((BLOCK,), tl.int32)
    masked_count = tl.zeros((BLOCK,), tl.int32)
    dropped_count = tl.zeros((BLOCK,), tl.int32)
    low_count = tl.zeros((BLOCK,), tl.int32)
    high_count = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        tokens = start + lanes
        inside = tokens < end
        in_loss, computed, guided, with_ratio, logps, old_logps, advantages = _load_tokens(
            tokens, inside, own_advantage, any_advantage, any_guided,
            logps_ptr, advantages_ptr, old_logps_ptr, loss_mask_ptr, guide_mask_ptr, shaping_min_probability,
            ADVANTAGE_PER_TOKEN, WHOLE, SKIP, FALLBACK, COMPAT,
        )  # fmt: skip
        ordinary = computed & (guided == 0)
        token_count += in_loss.to(tl.int32)
        computed_count += computed.to(tl.int32)
        guided_count += guided.to(tl.int32)

        difference = tl.where(with_ratio, logps - old_logps, 0.0)
        log_ratio = difference
        if SEQUENCE_RATIO:
            log_ratio = tl.where(with_ratio, log_ratio_mean, 0.0)
        ratio = tl.exp(log_ratio)
        low, high = clipped(ratio, advantages, epsilon_low, epsilon_high, POLICY)
        low_count += (low & ordinary).to(tl.int32)
        high_count += (high & ordinary).to(tl.int32)
        ratio_sum += tl.where(ordinary, ratio, 0.0)
        # A NaN stays: nothing is larger.
        larger = ordinary & ((ratio > ratio_max) | (ratio != ratio))
        ratio_max = tl.where(larger, ratio, ratio_max)
        approx_kl += tl.where(ordinary, expm1_minus(difference), 0.0)

        rollout = tl.full((BLOCK,), 1.0, tl.float64)
        if rollout_logps_ptr is not None:
            rollout_logps = read(rollout_logps_ptr, tokens, ordinary)
            log_weight = tl.where(ordinary, old_logps - rollout_logps, 0.0)
            mismatch += tl.abs(log_weight)
            if ROLLOUT_IS:
                if SEQUENCE_ROLLOUT:
                    log_weight = tl.where(ordinary, log_weight_sum, 0.0)
                corrected = rollout_weight(log_weight, rollout_floor, rollout_cap, TRUNCATE)
                rollout = tl.where(ordinary, corrected, 1.0)
                rollout_sum += tl.where(ordinary, corrected, 0.0)
                if not TRUNCATE:
                    dropped_count += (rollout == 0).to(tl.int32)

        objective, slope, flows = surrogate(
            log_ratio, ratio, logps, advantages, epsilon_low, epsilon_high, ceiling,
            temperature_pos, temperature_neg, POLICY,
        )  # fmt: skip
        used = with_ratio & (advantages != 0) & (rollout != 0)
        flows = flows & used
        value = tl.where(used, rollout * objective, 0.0)
        slope = tl.where(flows, rollout * slope, 0.0)
        shaped_value, shaping, shaped_flows, masked = shaped(
            logps, advantages, guided, shaping_coefficient, shaping_clamp, shaping_min_probability, COMPAT
        )
        value += shaped_value
        flow_count += flows.to(tl.int32)
        if guide_mask_ptr is not None:
            shaped_pos = shaped_flows & (advantages > 0)
            shaped_neg = shaped_flows & (shaped_pos == 0)
            shaping_pos += tl.where(shaped_pos, shaping, 0.0)
            shaping_neg += tl.where(shaped_neg, shaping, 0.0)
            shaped_pos_count += shaped_pos.to(tl.int32)
            shaped_neg_count += shaped_neg.to(tl.int32)
            masked_count += masked.to(tl.int32)

        weights = of_tokens(weights_ptr, tokens, computed, own_weight, WEIGHT_PER_TOKEN)
        if SPREAD:
            shared_slope += weights * slope
            slope = shaped_value
        else:
            slope += shaped_value
        if ref_logps_ptr is not None:
            kl, kl_slope = kl_to_reference(logps, read(ref_logps_ptr, tokens, computed), KL)
            kl_ref += tl.where(ordinary, kl, 0.0)
            if USE_KL:
                value += beta * kl
                slope += beta * kl_slope
        if entropy_ptr is not None:
            entropy = read(entropy_ptr, tokens, computed)
            entropy_sum += entropy
            if USE_ENTROPY:
                value -= entropy_coef * entropy
        loss += tl.where(computed, weights * value, 0.0)
        if d_logps_ptr is not None and not SPREAD:
            tl.store(d_logps_ptr + tokens, tl.where(computed, weights * slope, 0.0), mask=inside)
        if d_entropy_ptr is not None:
            tl.store(d_entropy_ptr + tokens, tl.where(computed, -entropy_coef * weights, 0.0), mask=inside)

    # The slope with respect to the mean log-ratio goes to all tokens that it was taken over.
    if d_logps_ptr is not None and SPREAD:
        share = tl.sum(shared_slope, 0) / with_ratio_count
        for start in range(begin, end, BLOCK):
            tokens = start + lanes
            inside = tokens < end
            _, computed, guided, with_ratio, logps, _, advantages = _load_tokens(
                tokens, inside, own_advantage, any_advantage, any_guided,
                logps_ptr, advantages_ptr, old_logps_ptr, loss_mask_ptr, guide_mask_ptr, shaping_min_probability,
                ADVANTAGE_PER_TOKEN, WHOLE, SKIP, FALLBACK, COMPAT,
            )  # fmt: skip
            slope, _, _, _ = shaped(
                logps, advantages, guided, shaping_coefficient, shaping_clamp, shaping_min_probability, COMPAT
            )
            if USE_KL:
                _, kl_slope = kl_to_reference(logps, read(ref_logps_ptr, tokens, computed), KL)
                slope += beta * kl_slope
            weights = of_tokens(weights_ptr, tokens, computed, own_weight, WEIGHT_PER_TOKEN)
            slope = tl.where(computed, weights * slope, 0.0) + tl.where(with_ratio, share, 0.0)
            tl.store(d_logps_ptr + tokens, slope, mask=inside)

    computed_total = tl.sum(computed_count, 0)
    guided_total = tl.sum(guided_count, 0)
    flow_total = tl.sum(flow_count, 0)
    if SPREAD:
        flow_total = tl.where(flow_total > 0, computed_total - guided_total, 0)
    shaped_pos_total = tl.sum(shaped_pos_count, 0)
    shaped_neg_total = tl.sum(shaped_neg_count, 0)
    flow_total += shaped_pos_total + shaped_neg_total
    if not SKIP:
        flow_total = computed_total
    not_a_number = any_of(ratio_max != ratio_max)

    own_ptr = partials_ptr + sequence * _COLUMNS
    tl.store(own_ptr + _LOSS, tl.sum(loss, 0))
    tl.store(own_ptr + _TOKENS, tl.sum(token_count, 0))
    tl.store(own_ptr + _COMPUTED, computed_total)
    tl.store(own_ptr + _GUIDED, guided_total)
    tl.store(own_ptr + _MASKED, tl.sum(masked_count, 0))
    tl.store(own_ptr + _SHAPED_POS, shaped_pos_total)
    tl.store(own_ptr + _SHAPED_NEG, shaped_neg_total)
    tl.store(own_ptr + _DROPPED, tl.sum(dropped_count, 0))
    tl.store(own_ptr + _WITH_GRADIENT, flow_total)
    tl.store(own_ptr + _CLIP_LOW, tl.sum(low_count, 0))
    tl.store(own_ptr + _CLIP_HIGH, tl.sum(high_count, 0))
    tl.store(own_ptr + _RATIO, tl.sum(ratio_sum, 0))
    tl.store(own_ptr + _APPROX_KL, tl.sum(approx_kl, 0))
    tl.store(own_ptr + _KL_REF, tl.sum(kl_ref, 0))
    tl.store(own_ptr + _MISMATCH, tl.sum(mismatch, 0))
    tl.store(own_ptr + _ROLLOUT_IS, tl.sum(rollout_sum, 0))
    tl.store(own_ptr + _SHAPING_POS, tl.sum(shaping_pos, 0))
    tl.store(own_ptr + _SHAPING_NEG, tl.sum(shaping_neg, 0))
    tl.store(own_ptr + _ENTROPY, tl.sum(entropy_sum, 0))
    tl.store(own_ptr + _RATIO_MAX, tl.where(not_a_number, float("nan"), tl.max(ratio_max, 0)))


def sequence_loss_in_triton(
    inputs: LossInputs, options: LossOptions, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss.sequence_loss`."""
    logps = inputs.logps
    tokens, sequences = logps.numel(), inputs.cu_seqlens.numel() - 1
    partials = torch.empty(sequences, len(PARTIALS), dtype=torch.float64, device=logps.device)
    want_entropy = want_gradient and options.entropy_coef != 0
    d_logps = torch.empty(tokens if want_gradient else 0, dtype=logps.dtype, device=logps.device)
    d_entropy = torch.empty(tokens if want_entropy else 0, dtype=logps.dtype, device=logps.device)
    arguments = {
        **_token_arguments(inputs),
        **_option_arguments(inputs, options),
        "partials_ptr": partials,
        "d_logps_ptr": d_logps if want_gradient else None,
        "d_entropy_ptr": d_entropy if want_entropy else None,
        "sequences": sequences,
        "BLOCK": SHAPES["sequence_loss"].block,
    }
    launch(sequence_loss, "sequence_loss", (sequences,), logps.device, arguments)
    return partials, d_logps, d_entropy


def _token_arguments(inputs: LossInputs) -> dict[str, Any]:
    fused = inputs.advantages is None
    sequences = inputs.cu_seqlens.numel() - 1
    return {
        "cu_seqlens_ptr": inputs.cu_seqlens,
        "logps_ptr": inputs.logps,
        "advantages_ptr": inputs.advantages,
        "rewards_ptr": inputs.rewards if fused else None,
        "group_ids_ptr": inputs.group_ids if fused else None,
        "weights_ptr": inputs.weights,
        "old_logps_ptr": inputs.old_logps,
        "ref_logps_ptr": inputs.ref_logps,
        "rollout_logps_ptr": inputs.rollout_logps,
        "entropy_ptr": inputs.entropy,
        "loss_mask_ptr": mask_bytes(inputs.loss_mask),
        "guide_mask_ptr": mask_bytes(inputs.guide_mask),
        "ADVANTAGE_PER_TOKEN": inputs.advantages is not None and inputs.advantages.numel() != sequences,
        "WEIGHT_PER_TOKEN": inputs.weights.numel() != sequences,
    }


def _option_arguments(inputs: LossInputs, options: LossOptions) -> dict[str, Any]:
    """Numbers as numbers; modes, each a kernel of its own, by their position among the choices, where they matter."""
    ceiling = options.dual_clip if options.dual_clip is not None else options.delta
    guided = inputs.guide_mask is not None
    return {
        "epsilon_low": options.epsilon_low,
        "epsilon_high": options.epsilon_high,
        "ceiling": math.inf if ceiling is None else ceiling,
        "temperature_pos": options.sapo_temperature_pos,
        "temperature_neg": options.sapo_temperature_neg,
        "rollout_floor": options.rollout_is_floor or 0.0,
        "rollout_cap": options.rollout_is_cap,
        "shaping_coefficient": options.shaping_coefficient,
        "shaping_clamp": options.shaping_clamp,
        "shaping_min_probability": options.shaping_min_probability,
        "beta": options.beta,
        "entropy_coef": options.entropy_coef,
        "advantage_eps": inputs.advantage_eps,
        "scale_rewards": SCALES.index(inputs.scale_rewards),
        "POLICY": get_args(PolicyLoss).index(options.policy_loss),
        "SEQUENCE_RATIO": options.importance_sampling_level == "sequence",
        "ROLLOUT_IS": options.rollout_is != "none",
        "SEQUENCE_ROLLOUT": options.rollout_is.startswith("sequence"),
        "TRUNCATE": options.rollout_is.endswith("truncate"),
        "FALLBACK": guided and options.guide_fallback == "clip",
        "COMPAT": guided and options.released_code_compat,
        "KL": get_args(KlEstimator).index(options.kl_estimator),
        "USE_KL": options.beta != 0,
        "USE_ENTROPY": options.entropy_coef != 0,
    }
