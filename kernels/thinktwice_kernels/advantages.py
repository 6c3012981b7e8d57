"""Group-relative advantages.

Letters: S sequences.
"""

from typing import get_args

import torch
from torch import Tensor

from thinktwice_kernels.ops import loss as ops
from thinktwice_kernels.options import ScaleRewards
from thinktwice_kernels.packed import accumulation_dtype

ADVANTAGE_EPS = 1e-6


def group_advantages(
    rewards: Tensor,  # [S], any real type
    group_ids: Tensor,  # [S], integers
    *,
    scale_rewards: ScaleRewards = "none",
    eps: float = ADVANTAGE_EPS,
) -> Tensor:
    """Each reward minus its group's mean, optionally divided by a standard deviation.

    With r a reward, m its group's mean and std the unbiased standard deviation (divisor n - 1)::

        none   A = r - m
        group  A = (r - m) / (std of the group + eps)
        batch  A = (r - m) / (std of all S rewards + eps)

    Groups may have any size and lie in any order; the ids are labels, any integers. A group of one, and a
    group whose rewards are all equal, gives exactly 0. A NaN reward makes its group NaN (and with "batch"
    everything): leave out sequences without a reward. "batch" sees only the rewards passed here; a run on
    several ranks gathers them first.

    Sources: DeepSeekMath (arXiv 2402.03300) for "group", Dr.GRPO (2503.20783) for "none", TRL for "batch".

    Args:
        rewards: [S], in the caller's units.
        group_ids: [S], equal for the samples of one prompt.
        scale_rewards: what to divide by.
        eps: added to the standard deviation; without effect for "none".

    Returns:
        [S] float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: shapes differ, ids that are no integers, a negative eps, or an unknown `scale_rewards`.
    """
    check_rewards(rewards, group_ids, scale_rewards, eps)
    return ops.group_advantages(*prepared_rewards(rewards, group_ids), scale_rewards, eps)


def prepared_rewards(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As the ops take them: floating-point and int64, contiguous."""
    return rewards.detach().to(accumulation_dtype(rewards)).contiguous(), group_ids.to(torch.int64).contiguous()


def check_rewards(rewards: Tensor, group_ids: Tensor, scale_rewards: str, eps: float) -> None:
    """Raise ValueError for what `group_advantages` does not take."""
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)} and group_ids {list(group_ids.shape)}: "
            "pass two one-dimensional tensors of the same length"
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise ValueError(f"group_ids has type {group_ids.dtype}: pass integers")
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(f"unknown scale_rewards {scale_rewards!r}: choose one of {', '.join(get_args(ScaleRewards))}")
    if not eps > 0:
        raise ValueError(f"eps is {eps}: choose a positive number")
