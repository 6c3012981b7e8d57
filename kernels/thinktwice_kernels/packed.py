"""Sequences that lie one after another in one row of tokens.

Letters: T tokens, S sequences.
"""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU may read pageable memory after it is freed, so the copy is from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` [S+1] partitions `tokens`.

    The values are looked at on the CPU only, and not while compiling: on a GPU that would wait for the device.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and type {cu_seqlens.dtype}: pass the int32 offsets [S+1], "
            "from 0 to the number of tokens"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}: it starts with {int(cu_seqlens[0])}, ends "
            f"with {int(cu_seqlens[-1])}" + (" and falls in between" if bool((cu_seqlens.diff() < 0).any()) else "")
        )


class Sequences:
    """Which token belongs to which sequence, and sums over sequences."""

    def __init__(
        self,
        cu_seqlens: Tensor,  # [S+1], int32 or int64
        tokens: int,
    ):
        positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        self.count = cu_seqlens.numel() - 1
        self.offsets = cu_seqlens  # [S+1]
        self.of_token = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)  # [T]

    def sum(self, values: Tensor) -> Tensor:
        """[T] -> [S]: the sum over each sequence's tokens; 0 for an empty one."""
        return values.new_zeros(self.count).index_add(0, self.of_token, values)

    def spread(self, values: Tensor) -> Tensor:
        """[S] -> [T]: each token gets its sequence's value."""
        return values.index_select(0, self.of_token)

    def any(self, flags: Tensor) -> Tensor:
        """[T] bool -> [T] bool: whether any token of the same sequence has the flag."""
        return self.spread(self.sum(flags.to(torch.int32)) > 0)
