"""The backend in C++ (csrc/loss/), as ``torch.ops.thinktwice_loss.*``.

Letters: T tokens, S sequences, V vocabulary, t rows of a tile of logits, m of them that have a gradient.
"""

from typing import get_args

import torch
from torch import Tensor

from thinktwice_kernels import native
from thinktwice_kernels.backends import Head, LossInputs
from thinktwice_kernels.options import LossOptions, ScaleRewards
from thinktwice_kernels.packed import accumulation_dtype
from thinktwice_kernels.selection import select_tokens

__all__ = ["group_advantages", "row_gradient", "row_statistics", "scale", "select_tokens", "sequence_loss"]

native.load()
_row_statistics = torch.ops.thinktwice_loss.row_statistics.default
_row_gradient = torch.ops.thinktwice_loss.row_gradient.default
_sequence_loss = torch.ops.thinktwice_loss.sequence_loss.default
_group_advantages = torch.ops.thinktwice_loss.group_advantages.default
_SCALES = get_args(ScaleRewards)


def row_statistics(
    logits: Tensor,  # [t, V]
    targets: Tensor,  # [t] int64
    head: Head,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Backend.row_statistics`."""
    logps, lse, entropy = _row_statistics(logits, targets.contiguous(), *_encoded(head, logits), want_entropy)
    return logps, lse, entropy if want_entropy else None


def row_gradient(
    logits: Tensor,  # [t, V]
    targets: Tensor,  # [t] int64
    head: Head,
    lse: Tensor,  # [t]
    entropy: Tensor | None,  # [t]
    d_logps: Tensor | None,  # [t]
    d_entropy: Tensor | None,  # [t]
    rows: Tensor | None,  # [m] int64
    out: Tensor,  # [m, V], or `logits`
) -> None:
    """`Backend.row_gradient`."""
    numbers = (None if x is None else x.double().contiguous() for x in (lse, entropy, d_logps, d_entropy))
    rows = None if rows is None else rows.contiguous()
    _row_gradient(logits, targets.contiguous(), *_encoded(head, logits), *numbers, rows, out)


def _encoded(head: Head, logits: Tensor) -> tuple[Tensor | None, Tensor, float]:
    bias = None if head.bias is None else head.bias.to(accumulation_dtype(logits)).contiguous()
    temperature = torch.as_tensor(head.temperature, dtype=torch.float64).reshape(-1).contiguous()
    return bias, temperature, head.softcap or 0.0


def sequence_loss(inputs: LossInputs, options: LossOptions, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.sequence_loss`."""
    advantages, group_ids = inputs.advantages, None
    if advantages is None:
        assert inputs.rewards is not None and inputs.group_ids is not None
        advantages, group_ids = inputs.rewards, inputs.group_ids
    return _sequence_loss(
        inputs.logps,
        advantages,
        group_ids,
        _SCALES.index(inputs.scale_rewards),
        inputs.advantage_eps,
        inputs.cu_seqlens.long(),
        inputs.weights.double(),
        inputs.old_logps,
        inputs.ref_logps,
        inputs.rollout_logps,
        inputs.entropy,
        inputs.loss_mask,
        inputs.guide_mask,
        torch.tensor(options.encode(), dtype=torch.float64),
        want_gradient,
    )


def scale(values: Tensor, by: Tensor, out: Tensor) -> None:
    """`Backend.scale`."""
    torch.mul(values, by, out=out)


def group_advantages(
    rewards: Tensor,  # [S]
    group_ids: Tensor,  # [S] int64
    scale_rewards: ScaleRewards,
    eps: float,
) -> Tensor:  # [S]
    """`Backend.group_advantages`."""
    return _group_advantages(rewards.contiguous(), group_ids.contiguous(), _SCALES.index(scale_rewards), eps)
