"""What each token adds to the loss, before the loss is aggregated.

Letters: T tokens. A is the advantage, r the importance ratio, logp the current policy's log-probability,
sg stop-gradient. Every function selects (torch.where) and never multiplies by a mask, so that a token whose
value is not used cannot spoil the others with inf or NaN.
"""

import torch
from torch import Tensor

from thinktwice_kernels.options import KlEstimator, LossOptions

# ThinkTuning's gamma(A) = clip(slope A, -limit, +limit), and the probability under which a guided token with a
# negative advantage is left out.
_SHAPING_SLOPE = 2.5e-4
_SHAPING_LIMIT = 1e-3
_SHAPING_LOW_PROBABILITY = 0.01
# From here on SAPO's sigmoid is 1 and its slope 0, in fp32 and float64; r itself would go on to inf, and 0 * inf.
_SAPO_LOG_RATIO_LIMIT = 60.0


def surrogate(
    log_ratio: Tensor,  # [T]
    logps: Tensor,  # [T]
    advantages: Tensor,  # [T]
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # [T] loss, [T] bool: the gradient flows
    """The objective that `options.policy_loss` names."""
    if options.policy_loss == "cispo":
        return _cispo(log_ratio, logps, advantages, options)
    if options.policy_loss == "sapo":
        return _sapo(log_ratio, advantages, options)
    return _clip(log_ratio, advantages, options)


def _clip(log_ratio: Tensor, advantages: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    low, high = clipped(log_ratio, advantages, options)
    stopped = low | high
    bound = torch.full_like(advantages, 1 + options.epsilon_high).masked_fill(low, 1 - options.epsilon_low)
    # Where A < 0, dual clip's "loss at most -c A" and delta's "ratio at most delta" are one and the same bound.
    ceiling = options.dual_clip if options.dual_clip is not None else options.delta
    if ceiling is not None:
        capped = (advantages < 0) & (log_ratio.detach().exp() > ceiling)
        stopped = stopped | capped
        bound = bound.masked_fill(capped, ceiling)
    ratio = torch.where(stopped, 0, log_ratio).exp()
    return -advantages * torch.where(stopped, bound, ratio), ~stopped


def clipped(
    log_ratio: Tensor,  # [T]
    advantages: Tensor,  # [T]
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # [T] bool low, [T] bool high
    """Where the ratio is beyond a bound that binds.

    clip: low is A < 0 and r < 1 - epsilon_low, high is A > 0 and r > 1 + epsilon_high. cispo: high is
    r > 1 + epsilon_high, whatever A; nothing is low. sapo has no bounds.
    """
    ratio = log_ratio.detach().exp()
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    if options.policy_loss == "sapo":
        return nowhere, nowhere
    above = ratio > 1 + options.epsilon_high
    if options.policy_loss == "cispo":
        return nowhere, above
    return (advantages < 0) & (ratio < 1 - options.epsilon_low), (advantages > 0) & above


def _cispo(log_ratio: Tensor, logps: Tensor, advantages: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    weight = log_ratio.detach().exp().clamp(max=1 + options.epsilon_high)
    return -weight * advantages * logps, torch.ones_like(advantages, dtype=torch.bool)


def _sapo(log_ratio: Tensor, advantages: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    tau = torch.full_like(advantages, options.sapo_temperature_neg).masked_fill(
        advantages > 0, options.sapo_temperature_pos
    )
    ratio = log_ratio.clamp(max=_SAPO_LOG_RATIO_LIMIT).exp()
    gate = torch.sigmoid(tau * (ratio - 1)) * (4 / tau)
    return -advantages * gate, torch.ones_like(advantages, dtype=torch.bool)


def too_unlikely_to_shape(
    logps: Tensor,  # [T]
    advantages: Tensor,  # [T]
) -> Tensor:  # [T] bool
    """Where shaping leaves a guided token out: A < 0 and exp(logp) < 0.01."""
    return (advantages < 0) & (logps.detach().exp() < _SHAPING_LOW_PROBABILITY)


def shaped(
    logps: Tensor,  # [T]
    advantages: Tensor,  # [T]
    guided: Tensor,  # [T] bool
    options: LossOptions,
) -> tuple[Tensor, Tensor]:  # [T] loss, [T] bool: the gradient flows
    """ThinkTuning's advantage-aware shaping of guided tokens (arXiv 2508.07616).

    With p = exp(logp) and gamma(A) = clip(2.5e-4 A, -1e-3, +1e-3): loss = -A p / (sg(p) + gamma(A)), and 0 where
    `too_unlikely_to_shape`. `released_code_compat`: gamma = -1e-3 whatever A.
    """
    used = guided & ~too_unlikely_to_shape(logps, advantages) & (advantages != 0)
    p = torch.where(used, logps, 0).exp()
    if options.released_code_compat:
        gamma = torch.full_like(advantages, -_SHAPING_LIMIT)
    else:
        gamma = (advantages * _SHAPING_SLOPE).clamp(-_SHAPING_LIMIT, _SHAPING_LIMIT)
    return torch.where(used, -advantages * (p / (p.detach() + gamma)), 0), used


def kl_to_reference(
    logps: Tensor,  # [T]
    ref_logps: Tensor,  # [T]
    estimator: KlEstimator,
) -> Tensor:  # [T]
    """Per-token estimate of KL(policy || reference), in nats (J. Schulman, "Approximating KL divergence").

    k1 = logp - ref, k2 = (logp - ref)^2 / 2, k3 = exp(ref - logp) - (ref - logp) - 1.
    """
    difference = ref_logps - logps
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.expm1() - difference
