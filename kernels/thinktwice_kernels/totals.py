"""From what the backends add up per sequence to the loss, the metrics, and the weights of the terms.

Letters: T tokens, S sequences.
"""

import torch
from torch import Tensor

from thinktwice_kernels.backends import PARTIALS
from thinktwice_kernels.options import LossOptions
from thinktwice_kernels.packed import Sequences

_AT = {name: column for column, name in enumerate(PARTIALS)}
# metric -> column; a mean over the ordinary tokens
_ORDINARY_MEANS = {
    "clip_fraction_low": "clip_low",
    "clip_fraction_high": "clip_high",
    "ratio_mean": "ratio",
    "approx_kl": "approx_kl",
    "kl_ref": "kl_ref",
    "mismatch": "mismatch",
}


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
    means = (totals / (computed - guided).clamp(min=1)).to(dtype)
    metrics = {
        "tokens": tokens,
        "tokens_skipped": tokens - computed,
        "tokens_guided": guided,
        "tokens_with_gradient": counts[_AT["with_gradient"]],
        "ratio_max": totals[_AT["ratio_max"]].to(dtype),
        "entropy": (totals[_AT["entropy"]] / computed.clamp(min=1)).to(dtype),
    } | {name: means[_AT[column]] for name, column in _ORDINARY_MEANS.items()}
    return {name: value for name, value in metrics.items() if name not in absent}


def loss_weights(
    cu_seqlens: Tensor,  # [S+1]
    loss_mask: Tensor | None,  # [T] bool
    options: LossOptions,
    normalizer: float | Tensor | None,
    like: Tensor,  # gives the number of tokens T, the type and the device
) -> Tensor:
    """[S]: what the terms of a sequence's tokens are multiplied by, so that the sum of all is the loss."""
    count = cu_seqlens.numel() - 1
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.reshape(())
    ones = like.new_ones(count, dtype=torch.float64)
    if options.loss_agg_mode == "token-mean":
        if normalizer is None:
            normalizer = max(like.shape[0], 1) if loss_mask is None else loss_mask.sum().clamp(min=1).to(like.device)
        weights = ones / normalizer
    else:
        weights = ones / (max(count, 1) if normalizer is None else normalizer)
        if options.loss_agg_mode == "seq-mean-token-mean":
            weights = weights / _loss_tokens(cu_seqlens, loss_mask, like).clamp(min=1)
        elif options.max_response_length is not None:
            weights = weights / options.max_response_length
    return weights.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _loss_tokens(cu_seqlens: Tensor, loss_mask: Tensor | None, like: Tensor) -> Tensor:  # [S]
    if loss_mask is None:
        return cu_seqlens.to(like.device).diff()
    sequences = Sequences(cu_seqlens.to(like.device), like.shape[0])
    return sequences.sum(loss_mask.to(like.device, torch.float64))
