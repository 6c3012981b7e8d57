"""Group-relative advantages: `advantages.group_advantages_reference`.

Each program works out one sequence's advantage from all S rewards, which are few, in float64.
"""

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import SHAPES, launch
from thinktwice_kernels.options import ScaleRewards

SCALES = get_args(ScaleRewards)

_GROUP = tl.constexpr(SCALES.index("group"))
_BATCH = tl.constexpr(SCALES.index("batch"))
_MEAN = tl.constexpr(SCALES.index("mean"))


@triton.jit
def _load_rewards(rewards_ptr, group_ids_ptr, start, count, group, BLOCK: tl.constexpr):
    """A block of rewards, where there are any, and which of them belong to the group."""
    sequences = start + tl.arange(0, BLOCK)
    there = sequences < count
    rewards = tl.load(rewards_ptr + sequences, mask=there, other=0.0).to(tl.float64)
    return rewards, there, there & (tl.load(group_ids_ptr + sequences, mask=there, other=0) == group)


@triton.jit
def advantage_of(
    sequence,
    rewards_ptr,  # [S]
    group_ids_ptr,  # [S]
    count,  # S
    eps,
    scale,  # position among the choices of scale_rewards
    BLOCK: tl.constexpr,
):
    """One sequence's advantage, rounded to the type of the rewards."""
    group = tl.load(group_ids_ptr + sequence)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        rewards, there, members = _load_rewards(rewards_ptr, group_ids_ptr, start, count, group, BLOCK)
        lowest = tl.where(members, tl.minimum(lowest, rewards), lowest)
        total += rewards
    # Rewards that are all equal must give exactly 0, which sum / n does not guarantee: off with the smallest first.
    base = tl.min(lowest, 0)
    batch_mean = tl.sum(total, 0) / count

    sizes = tl.zeros((BLOCK,), tl.float64)
    shifted = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        rewards, there, members = _load_rewards(rewards_ptr, group_ids_ptr, start, count, group, BLOCK)
        sizes += tl.where(members, 1.0, 0.0)
        shifted += tl.where(members, rewards - base, 0.0)
    size = tl.sum(sizes, 0)
    mean = tl.sum(shifted, 0) / size
    own = tl.load(rewards_ptr + sequence)
    centred = own.to(tl.float64) - base - mean

    if scale == _MEAN:
        whole_mean = base + mean
        centred = tl.where(whole_mean == 0, 0.0, centred / whole_mean)
    if (scale == _GROUP) | (scale == _BATCH):
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, count, BLOCK):
            rewards, there, members = _load_rewards(rewards_ptr, group_ids_ptr, start, count, group, BLOCK)
            deviation = tl.where(scale == _GROUP, rewards - base - mean, rewards - batch_mean)
            squares += tl.where(members | (there & (scale == _BATCH)), deviation * deviation, 0.0)
        degrees = tl.where(scale == _GROUP, size, count.to(tl.float64)) - 1.0
        centred /= tl.sqrt(tl.sum(squares, 0) / tl.maximum(degrees, 1.0)) + eps
    return centred.to(own.dtype)


@triton.jit(
    do_not_specialize=["count", "scale"],
    do_not_specialize_on_alignment=["rewards_ptr", "group_ids_ptr", "out_ptr"],
)
def group_advantages(
    rewards_ptr,  # [S]
    group_ids_ptr,  # [S]
    out_ptr,  # [S]
    count,  # S
    eps: tl.float64,
    scale,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    tl.store(out_ptr + sequence, advantage_of(sequence, rewards_ptr, group_ids_ptr, count, eps, scale, BLOCK))


def group_advantages_in_triton(
    rewards: Tensor,  # [S] fp32 or float64
    group_ids: Tensor,  # [S] int64
    scale_rewards: ScaleRewards,
    eps: float,
) -> Tensor:
    """[S], in the type of `rewards`."""
    out = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    arguments = {
        "rewards_ptr": rewards.contiguous(),
        "group_ids_ptr": group_ids.contiguous(),
        "out_ptr": out,
        "count": rewards.numel(),
        "eps": eps,
        "scale": SCALES.index(scale_rewards),
        "BLOCK": SHAPES["group_advantages"].block,
    }
    launch(group_advantages, "group_advantages", (rewards.numel(),), rewards.device, arguments)
    return out
