"""Attention on padded rows by torch's own kernel: what the packed kinds are held against.

Letters: T tokens, S sequences, L longest sequence, Hq / Hkv query / key-value heads, D head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from thinktwice_fast.model.attention import Attention


@dataclass(frozen=True)
class PaddedAttention(Attention):
    """Causal attention of each sequence over itself; differentiable.

    Rows are padded to [S, L] for the attention alone: padding sits at the end of a row, where causality
    keeps it from every real query.
    """

    pad: torch.Tensor  # int64 [S, L], index into the T tokens; any valid index where there is none
    unpad: torch.Tensor  # int64 [T], index into the S*L padded slots

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device) -> "PaddedAttention":
        """Of the S sequences' lengths in tokens, in their order in the row."""
        sizes = torch.tensor(lengths)
        longest = int(sizes.max())
        starts = sizes.cumsum(0) - sizes
        column = torch.arange(longest)
        inside = column < sizes[:, None]  # [S, L]
        pad = torch.where(inside, starts[:, None] + column, 0)
        return cls(pad.to(device), inside.flatten().nonzero().squeeze(1).to(device))

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        rows, longest = self.pad.shape
        q, k, v = (x[self.pad].transpose(1, 2) for x in (q, k, v))  # [S, H, L, D]
        mask = None
        if 0 < window < longest:
            age = torch.arange(longest, device=q.device)[:, None] - torch.arange(longest, device=q.device)
            mask = (age >= 0) & (age < window)  # [L, L]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(rows * longest, *out.shape[1::2])[self.unpad]
