"""What each token of a block adds to the loss, and its derivative: `reference.objectives` with derivatives.

All values are float64 blocks of tokens. Modes are constexpr: the position of the value among its
choices. "Slope" is a derivative with respect to logp or, of a ratio objective, to the log-ratio.
"""

from typing import get_args

import triton
import triton.language as tl

from thinktwice_kernels.options import KlEstimator, PolicyLoss
from thinktwice_kernels.triton_kernels.numerics import expm1, expm1_minus, number

_CLIP = tl.constexpr(get_args(PolicyLoss).index("clip"))
_CISPO = tl.constexpr(get_args(PolicyLoss).index("cispo"))
_SAPO = tl.constexpr(get_args(PolicyLoss).index("sapo"))
_K1 = tl.constexpr(get_args(KlEstimator).index("k1"))
_K2 = tl.constexpr(get_args(KlEstimator).index("k2"))
# From here on SAPO's sigmoid is 1 and its slope 0; the ratio itself would go on to inf, and 0 * inf.
_SAPO_LOG_RATIO_LIMIT = tl.constexpr(60.0)
_SHAPING_SLOPE = tl.constexpr(2.5e-4)
_SHAPING_LIMIT = tl.constexpr(1e-3)
_SHAPING_LOW_PROBABILITY = tl.constexpr(0.01)


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
def too_unlikely_to_shape(logps, advantages):
    """Where shaping leaves a guided token out."""
    return (advantages < 0) & (tl.exp(logps) < number(_SHAPING_LOW_PROBABILITY, tl.float64))


@triton.jit
def shaped(logps, advantages, guided, COMPAT: tl.constexpr):
    """Objective of the shaping, which is its slope too, and where it flows."""
    used = guided & (too_unlikely_to_shape(logps, advantages) == 0) & (advantages != 0)
    p = tl.exp(tl.where(used, logps, 0.0))
    gamma = advantages * _SHAPING_SLOPE
    limit = number(_SHAPING_LIMIT, tl.float64)
    gamma = tl.where(gamma > limit, limit, gamma)
    gamma = tl.where(gamma < -limit, -limit, gamma)
    if COMPAT:
        gamma = tl.zeros_like(gamma) - limit
    return tl.where(used, -advantages * (p / (p + gamma)), 0.0), used


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
