"""The definition of group-relative advantages, in plain torch.

Letters: S sequences.
"""

import torch
from torch import Tensor

from thinktwice_kernels.options import ScaleRewards
from thinktwice_kernels.packed import accumulation_dtype


@torch.no_grad()
def group_advantages(
    rewards: Tensor,  # [S]
    group_ids: Tensor,  # [S]
    *,
    scale_rewards: ScaleRewards = "none",
    eps: float = 1e-6,
) -> Tensor:
    """`thinktwice_kernels.group_advantages`, arguments and results alike; inputs are not checked."""
    out_dtype = accumulation_dtype(rewards)
    # S is small, and float64 keeps rewards like 1e6 + 0.1 apart from their mean.
    rewards = rewards.double()
    members = _dense_labels(group_ids)
    sizes = _group_sum(torch.ones_like(rewards), members)
    # Rewards that are all equal must give exactly 0, which sum / n does not guarantee: take the group's
    # smallest reward off first.
    lowest = torch.zeros_like(rewards).scatter_reduce(0, members, rewards, "amin", include_self=False)
    shifted = rewards - lowest[members]
    centred = shifted - (_group_sum(shifted, members) / sizes)[members]
    if scale_rewards == "group":
        variance = _group_sum(centred.square(), members) / (sizes - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[members] + eps)
    elif scale_rewards == "batch":
        deviation = rewards - rewards.sum() / max(rewards.numel(), 1)
        variance = deviation.square().sum() / max(rewards.numel() - 1, 1)
        centred = centred / (variance.sqrt() + eps)
    return centred.to(out_dtype)


def _dense_labels(group_ids: Tensor) -> Tensor:
    # torch.unique would do the same, at the price of a device synchronisation.
    ordered, order = group_ids.sort(stable=True)
    starts = torch.zeros_like(ordered, dtype=torch.int64)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0))


def _group_sum(values: Tensor, members: Tensor) -> Tensor:
    return torch.zeros_like(values).index_add_(0, members, values)
