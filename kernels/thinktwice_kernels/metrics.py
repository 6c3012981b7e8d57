"""The metrics of a loss: each one's definition, declared once, and how those of several micro-batches combine.

Metrics are detached tensors without dimensions on the inputs' device; nothing here waits for that device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weight = Literal["ordinary", "computed"]


@dataclass(frozen=True)
class Metric:
    """What a metric is. A mean over no tokens, and a largest value among none, are 0."""

    definition: str
    combine: Literal["mean", "max", "sum"]
    weight: Weight | None = None  # of a mean: the tokens it is taken over, see METRICS


METRICS: dict[str, Metric] = {
    "tokens": Metric("loss tokens: those that loss_mask selects, or all", "sum"),
    "tokens_skipped": Metric(
        "loss tokens left uncomputed: advantage exactly 0 while beta and entropy_coef are 0 (where the ratio or the "
        "rollout correction is a sequence's: all of the sequence's advantages)",
        "sum",
    ),
    "tokens_guided": Metric("computed loss tokens that are guided", "sum"),
    "tokens_with_gradient": Metric(
        "loss tokens whose term depends on the policy: computed and, where beta and entropy_coef are 0, not clipped, "
        "not zeroed by rollout_is, not left out of the shaping (a sequence's ratio: if one of its tokens is so)",
        "sum",
    ),
    "clip_fraction_low": Metric("share with A < 0 and ratio < 1 - epsilon_low (clip only)", "mean", "ordinary"),
    "clip_fraction_high": Metric(
        "share with A > 0 and ratio > 1 + epsilon_high (clip), or ratio > 1 + epsilon_high (cispo)", "mean", "ordinary"
    ),
    "ratio_mean": Metric("mean of the ratio policy / old policy, the token's or its sequence's", "mean", "ordinary"),
    "ratio_max": Metric("largest of those ratios", "max"),
    "approx_kl": Metric(
        "mean of exp(d) - 1 - d with d = logp - old_logp, which estimates KL(old || policy) in nats", "mean", "ordinary"
    ),
    "kl_ref": Metric("mean of the chosen estimator of KL(policy || reference), in nats", "mean", "ordinary"),
    "mismatch": Metric(
        "mean of |old_logp - rollout_logp| (without old_logps: |logp - rollout_logp|), in nats: how far rollout and "
        "trainer are apart under the same weights; says nothing where the rollout's own are passed as old_logps",
        "mean",
        "ordinary",
    ),
    "entropy": Metric("mean entropy, in nats", "mean", "computed"),
}
"""Name -> definition. "computed" tokens are ``tokens - tokens_skipped``; the "ordinary" ones among them are those
that are not guided, ``tokens - tokens_skipped - tokens_guided``. ``kl_ref``, ``mismatch`` and ``entropy`` are there
only if ``ref_logps``, ``rollout_logps`` and ``entropy`` were given."""


def combine_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of several micro-batches (or ranks) together, as one call over all their tokens would give them.

    Counts add up, means are weighted by the number of tokens they were taken over, ``ratio_max`` is the largest.

    Raises:
        ValueError: no parts, or parts with different metrics.
    """
    if not parts:
        raise ValueError("there are no metrics to combine: pass at least one dict that grpo_loss returned")
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(
            "the parts hold different metrics: call grpo_loss with the same optional tensors for every micro-batch"
        )
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    weights = {weight: _weight(stacked, weight) for weight in ("ordinary", "computed")}
    return {name: _combine(values, METRICS[name], weights) for name, values in stacked.items()}


def _weight(metrics: Mapping[str, Tensor], weight: str) -> Tensor:
    computed = metrics["tokens"] - metrics["tokens_skipped"]
    return computed if weight == "computed" else computed - metrics["tokens_guided"]


def _combine(values: Tensor, metric: Metric, weights: Mapping[str, Tensor]) -> Tensor:
    if metric.weight is None:
        return values.amax() if metric.combine == "max" else values.sum()
    weight = weights[metric.weight]
    return (values.double() * weight).sum().div(weight.sum().clamp(min=1)).to(values.dtype)


def masked_mean(
    values: Tensor,  # [T]
    mask: Tensor,  # [T] bool
) -> Tensor:
    """Mean where the mask is set; 0 if it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_max(
    values: Tensor,  # [T], not negative
    mask: Tensor,  # [T] bool
) -> Tensor:
    """Largest value where the mask is set; 0 if it is nowhere."""
    return torch.cat([torch.where(mask, values, 0), values.new_zeros(1)]).amax()
