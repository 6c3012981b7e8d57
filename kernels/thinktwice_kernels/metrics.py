"""The metrics of a loss: what each one is, what adds up to it, and how those of several micro-batches combine.

Metrics are detached tensors without dimensions on the inputs' device; nothing here waits for that device.

Letters: T tokens, S sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weight = Literal["ordinary", "computed", "tokens_shaped_pos", "tokens_shaped_neg"]


@dataclass(frozen=True)
class Metric:
    """What a metric is. A mean over no tokens, and a largest value among none, are 0."""

    definition: str
    combine: Literal["mean", "max", "sum"]
    weight: Weight | None = None  # of a mean: the tokens it is taken over, see METRICS


METRICS: dict[str, Metric] = {
    "tokens": Metric(
        "loss tokens: those that loss_mask selects, or all; with rollout_is_denominator 'kept' less the dropped ones",
        "sum",
    ),
    "tokens_skipped": Metric(
        "loss tokens left uncomputed: advantage exactly 0 while beta and entropy_coef are 0 (where the ratio or the "
        "rollout correction is a sequence's: all of the sequence's advantages)",
        "sum",
    ),
    "tokens_guided": Metric("computed loss tokens that are guided", "sum"),
    "tokens_masked": Metric(
        "those of the guided ones with A < 0 and a probability below shaping_min_probability, which the shaping leaves "
        "to guide_fallback",
        "sum",
    ),
    "tokens_shaped_pos": Metric("those of the guided ones that are shaped and have A > 0", "sum"),
    "tokens_shaped_neg": Metric("those of the guided ones that are shaped and have A < 0", "sum"),
    "tokens_dropped": Metric(
        "loss tokens whose objective a rollout_is '*-mask' drops: of the computed ones, and counted in `tokens` as in "
        "the loss's denominator, with rollout_is_denominator 'all'; of all, and in neither, with 'kept'",
        "sum",
    ),
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
    "rollout_is_mean": Metric(
        "mean of the weight that rollout_is multiplies the objective by; a dropped token has weight 0 with "
        "rollout_is_denominator 'all', and none with 'kept'",
        "mean",
        "ordinary",
    ),
    "shaping_weight_pos": Metric(
        "mean of w = p / (p + gamma), the weight of a guided token, where A > 0", "mean", "tokens_shaped_pos"
    ),
    "shaping_weight_neg": Metric("mean of that weight where A < 0", "mean", "tokens_shaped_neg"),
    "entropy": Metric("mean entropy, in nats", "mean", "computed"),
}
"""Name -> definition. "computed" tokens are ``tokens - tokens_skipped``; the "ordinary" ones among them are those
that are not guided, ``tokens - tokens_skipped - tokens_guided``. ``kl_ref``, ``mismatch`` and ``entropy`` are there
only if ``ref_logps``, ``rollout_logps`` and ``entropy`` were given; ``tokens_masked`` and the shaping's only if
``guide_mask`` was; ``tokens_dropped`` and ``rollout_is_mean`` only if ``rollout_is`` is not "none"."""


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
    wanted = {weight for name in stacked if (weight := METRICS[name].weight) is not None}
    weights: dict[str, Tensor] = {weight: _weight(stacked, weight) for weight in wanted}
    return {name: _combine(values, METRICS[name], weights) for name, values in stacked.items()}


def _weight(metrics: Mapping[str, Tensor], weight: str) -> Tensor:
    if weight in metrics:
        return metrics[weight]
    computed = metrics["tokens"] - metrics["tokens_skipped"]
    return computed if weight == "computed" else computed - metrics["tokens_guided"]


def _combine(values: Tensor, metric: Metric, weights: Mapping[str, Tensor]) -> Tensor:
    if metric.weight is None:
        return values.amax() if metric.combine == "max" else values.sum()
    weight = weights[metric.weight]
    return (values.double() * weight).sum().div(weight.sum().clamp(min=1)).to(values.dtype)


# The columns of what a loss adds up; METRICS says what each counts. The last is a maximum.
PARTIALS = (
    "loss",
    "tokens",
    "computed",
    "guided",
    "masked",
    "shaped_pos",
    "shaped_neg",
    "dropped",
    "with_gradient",
    "clip_low",
    "clip_high",
    "ratio",
    "approx_kl",
    "kl_ref",
    "mismatch",
    "rollout_is",
    "shaping_pos",
    "shaping_neg",
    "entropy",
    "ratio_max",
)
_AT = {name: column for column, name in enumerate(PARTIALS)}
# metric -> column; a mean over the ordinary tokens
_ORDINARY_MEANS = {
    "clip_fraction_low": "clip_low",
    "clip_fraction_high": "clip_high",
    "ratio_mean": "ratio",
    "approx_kl": "approx_kl",
    "kl_ref": "kl_ref",
    "mismatch": "mismatch",
    "rollout_is_mean": "rollout_is",
}


@dataclass(frozen=True)
class Terms:
    """What each computed token adds to the loss, and what else metrics are made of; loss.py says how they come about.

    Flags may be None: then all tokens have them.
    """

    ordinary: Tensor | None  # [T] bool: not guided
    weights: Tensor  # [T]: what the values are multiplied by
    value: Tensor  # [T], differentiable
    slope: Tensor  # [T]: its derivative with respect to the token's own logp
    shared_slope: Tensor | None  # [T]: with respect to the mean log-ratio of the sequence's ordinary tokens
    flows: Tensor | None  # [T] bool: a gradient comes from it
    difference: Tensor  # [T]: logp - old_logp, or 0
    ratio: Tensor  # [T]
    clipped: tuple[Tensor, Tensor]  # [T] bool low, [T] bool high
    kl: Tensor | None  # [T]
    mismatch: Tensor | None  # [T], 0 where guided
    rollout_is: Tensor | None  # [T], 1 where guided
    dropped: Tensor | None  # [T] bool, not where guided
    shaping: "Shaping | None"
    entropy: Tensor | None  # [T]


@dataclass(frozen=True)
class Shaping:
    """What became of the guided tokens."""

    weight: Tensor  # [T]: w of the shaped ones
    pos: Tensor  # [T] bool: shaped, and A > 0
    neg: Tensor  # [T] bool: shaped, and A < 0
    masked: Tensor  # [T] bool: too unlikely to shape


def only(flags: Tensor | None, values: Tensor) -> Tensor:  # [T]
    """The values that have the flag (None: all), 0 in place of the others."""
    return values if flags is None else values.masked_fill(~flags, 0)


def partials_of(terms: Terms) -> Tensor:  # [1, len(PARTIALS)] float64
    """The columns, added up over all tokens."""
    ordinary, (low, high) = terms.ordinary, terms.clipped
    ratios = only(ordinary, terms.ratio)
    count = ratios.new_full((), ratios.numel(), dtype=torch.float64)
    nothing = torch.zeros_like(count)

    def number(flags: Tensor | None) -> Tensor:
        return nothing if flags is None else flags.sum(dtype=torch.float64)

    shaping = terms.shaping
    weight, pos, neg, masked = (
        (None,) * 4 if shaping is None else (shaping.weight, shaping.pos, shaping.neg, shaping.masked)
    )

    def total(values: Tensor | None, of: Tensor | None = ordinary) -> Tensor:
        return nothing if values is None else only(of, values).sum(dtype=torch.float64)

    columns = {
        "loss": (terms.weights * terms.value).sum(dtype=torch.float64),
        "tokens": count,
        "computed": count,
        "guided": nothing if ordinary is None else count - ordinary.sum(),
        "masked": number(masked),
        "shaped_pos": number(pos),
        "shaped_neg": number(neg),
        "dropped": number(terms.dropped),
        "with_gradient": count if terms.flows is None else total(terms.flows, None),
        "clip_low": total(low),
        "clip_high": total(high),
        "ratio": total(ratios, None),
        "approx_kl": total(terms.difference.expm1() - terms.difference),
        "kl_ref": total(terms.kl),
        "mismatch": total(terms.mismatch),
        "rollout_is": total(terms.rollout_is),
        "shaping_pos": total(weight, pos),
        "shaping_neg": total(weight, neg),
        "entropy": total(terms.entropy, None),
        "ratio_max": ratios.amax().double() if ratios.numel() else nothing,
    }
    return torch.stack([columns[name] for name in PARTIALS])[None]


def totals_of(
    partials: Tensor,  # [S, len(PARTIALS)] float64
) -> Tensor:  # [len(PARTIALS)]
    """Sums, and the largest of the last column; 0 without sequences."""
    if partials.shape[0] == 0:
        return partials.new_zeros(len(PARTIALS))
    return torch.cat([partials[:, :-1].sum(0), partials[:, -1:].amax(0)])


def metrics_of(
    totals: Tensor,  # [len(PARTIALS)] float64
    dtype: torch.dtype,
    absent: set[str],
) -> dict[str, Tensor]:
    """The metrics that METRICS defines, without the absent ones: means in `dtype`, counts int64."""
    counts = totals[: _AT["with_gradient"] + 1].long()
    tokens, computed, guided = (counts[_AT[name]] for name in ("tokens", "computed", "guided"))
    ordinary, some = (computed - guided).clamp(min=1), counts.clamp(min=1)
    divisors = {
        "shaping_pos": some[_AT["shaped_pos"]],
        "shaping_neg": some[_AT["shaped_neg"]],
        "entropy": some[_AT["computed"]],
    }
    # All in one go: on a GPU each operation on a single number is a launch.
    means = (totals / torch.stack([divisors.get(name, ordinary) for name in PARTIALS])).to(dtype)
    metrics = {
        "tokens": tokens,
        "tokens_skipped": tokens - computed,
        "tokens_guided": guided,
        "tokens_masked": counts[_AT["masked"]],
        "tokens_shaped_pos": counts[_AT["shaped_pos"]],
        "tokens_shaped_neg": counts[_AT["shaped_neg"]],
        "tokens_dropped": counts[_AT["dropped"]],
        "tokens_with_gradient": counts[_AT["with_gradient"]],
        "ratio_max": totals[_AT["ratio_max"]].to(dtype),
        "shaping_weight_pos": means[_AT["shaping_pos"]],
        "shaping_weight_neg": means[_AT["shaping_neg"]],
        "entropy": means[_AT["entropy"]],
    } | {name: means[_AT[column]] for name, column in _ORDINARY_MEANS.items()}
    return {name: value for name, value in metrics.items() if name not in absent}


_SHAPING = ("tokens_masked", "tokens_shaped_pos", "tokens_shaped_neg", "shaping_weight_pos", "shaping_weight_neg")
_NEEDS: dict[str, tuple[str, ...]] = {
    "ref_logps": ("kl_ref",),
    "rollout_logps": ("mismatch",),
    "entropy": ("entropy",),
    "guide_mask": _SHAPING,
}


def absent_metrics(given: Mapping[str, Tensor | None], corrected: bool) -> set[str]:
    """The metrics that are not there without an optional tensor, or where `rollout_is` is "none" (not `corrected`)."""
    absent = {metric for name, metrics in _NEEDS.items() if given.get(name) is None for metric in metrics}
    return absent if corrected else absent | {"tokens_dropped", "rollout_is_mean"}
