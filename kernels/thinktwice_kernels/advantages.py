"""Group-relative advantages.

Letters: S sequences.
"""

from typing import Any, cast, get_args

import torch
from torch import Tensor

from thinktwice_kernels.launch import accumulation_dtype, in_triton, op, uses_triton
from thinktwice_kernels.options import ScaleRewards

ADVANTAGE_EPS = 1e-6


def group_advantages(
    rewards: Tensor,  # [S], any real type
    group_ids: Tensor,  # [S], integers
    *,
    scale_rewards: ScaleRewards = "none",
    eps: float = ADVANTAGE_EPS,
) -> Tensor:
    """Each reward minus its group's mean, optionally divided by a standard deviation or by that mean.

    With r a reward, m its group's mean and std the unbiased standard deviation (divisor n - 1)::

        none   A = r - m
        group  A = (r - m) / (std of the group + eps)
        batch  A = (r - m) / (std of all S rewards + eps)
        mean   A = (r - m) / m, and 0 where m is 0; for rewards that are not negative

    Groups may have any size and lie in any order; the ids are labels, any integers. A group of one, and a
    group whose rewards are all equal, gives exactly 0. A NaN reward makes its group NaN (and with "batch"
    everything): leave out sequences without a reward. "batch" sees only the rewards passed here; a run on
    several ranks gathers them first.

    Sources: DeepSeekMath (arXiv 2402.03300) for "group", Dr.GRPO (2503.20783) for "none", TRL for "batch", MaxRL
    (2602.02710) for "mean".

    Args:
        rewards: [S], in the caller's units.
        group_ids: [S], equal for the samples of one prompt.
        scale_rewards: what to divide by.
        eps: added to the standard deviation; without effect for "none" and "mean".

    Returns:
        [S] float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: shapes differ, ids that are no integers, a negative eps, or an unknown `scale_rewards`.
    """
    check_rewards(rewards, group_ids, scale_rewards, eps)
    return _group_advantages(*prepared_rewards(rewards, group_ids), scale_rewards, eps)


@torch.no_grad()
def group_advantages_reference(
    rewards: Tensor,  # [S]
    group_ids: Tensor,  # [S]
    *,
    scale_rewards: ScaleRewards = "none",
    eps: float = ADVANTAGE_EPS,
) -> Tensor:
    """`group_advantages`, arguments and results alike, in plain torch; inputs are not checked. The CPU runs it."""
    out_dtype = accumulation_dtype(rewards)
    # S is small, and float64 keeps rewards like 1e6 + 0.1 apart from their mean.
    rewards = rewards.double()
    members = _dense_labels(group_ids)
    sizes = _group_sum(torch.ones_like(rewards), members)
    # Rewards that are all equal must give exactly 0, which sum / n does not guarantee: take the group's
    # smallest reward off first.
    lowest = torch.zeros_like(rewards).scatter_reduce(0, members, rewards, "amin", include_self=False)
    shifted = rewards - lowest[members]
    mean = (_group_sum(shifted, members) / sizes)[members]
    centred = shifted - mean
    if scale_rewards == "group":
        variance = _group_sum(centred.square(), members) / (sizes - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[members] + eps)
    elif scale_rewards == "batch":
        deviation = rewards - rewards.sum() / max(rewards.numel(), 1)
        variance = deviation.square().sum() / max(rewards.numel() - 1, 1)
        centred = centred / (variance.sqrt() + eps)
    elif scale_rewards == "mean":
        mean = lowest[members] + mean
        centred = torch.where(mean == 0, 0, centred / mean)
    return centred.to(out_dtype)


def _dense_labels(group_ids: Tensor) -> Tensor:
    # torch.unique would do the same, at the price of a device synchronisation.
    ordered, order = group_ids.sort(stable=True)
    starts = torch.zeros_like(ordered, dtype=torch.int64)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0))


def _group_sum(values: Tensor, members: Tensor) -> Tensor:
    return torch.zeros_like(values).index_add_(0, members, values)


@op("group_advantages")
def _group_advantages(
    rewards: Tensor,  # [S] fp32 or float64
    group_ids: Tensor,  # [S] int64
    scale_rewards: str,
    eps: float,
) -> Tensor:
    """[S], in the type of the rewards."""
    scale = cast(ScaleRewards, scale_rewards)
    if uses_triton(rewards):
        return in_triton("advantages").group_advantages_in_triton(rewards, group_ids, scale, eps)
    return group_advantages_reference(rewards, group_ids, scale_rewards=scale, eps=eps)


@_group_advantages.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards)


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


def check_advantages(
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_ids: Tensor | None,
    cu_seqlens: Tensor,
    tokens: int,
    scale_rewards: str,
    eps: float,
) -> None:
    """Raise ValueError unless there are advantages [S] or [T], or rewards [S] and group_ids [S]."""
    count = cu_seqlens.numel() - 1
    if rewards is None and group_ids is None:
        if scale_rewards != "none":
            raise ValueError(f"scale_rewards={scale_rewards!r} has no effect without rewards: leave it at 'none'")
        if eps != ADVANTAGE_EPS:
            raise ValueError(f"advantage_eps={eps} has no effect without rewards: leave it at {ADVANTAGE_EPS}")
        if advantages is None or advantages.dim() != 1 or advantages.numel() not in (count, tokens):
            shape = None if advantages is None else list(advantages.shape)
            raise ValueError(
                f"advantages has shape {shape}: pass one per sequence, [{count}], or one per token, [{tokens}], or "
                "rewards and group_ids in their place"
            )
        return
    if advantages is not None or rewards is None or group_ids is None:
        raise ValueError("pass either advantages, or rewards and group_ids with advantages=None")
    check_rewards(rewards, group_ids, scale_rewards, eps)
    if rewards.numel() != count:
        raise ValueError(f"rewards has shape {list(rewards.shape)}: pass one per sequence, [{count}]")
