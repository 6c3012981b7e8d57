"""What the tokens of a forward pass attend to, a value that models are called with.

A forward pass is one row of T tokens without padding:

- ``PrefixAttention``: segments one after another that may share a prefix (training);
- ``PagedAttention``: tokens just reserved in a paged KV cache (rollouts).

Transformers' modules run with it too: it is registered as ``thinktwice``, and reaches each layer as the keyword
``attention``.

Letters: T tokens, S segments, Hq / Hkv query / key-value heads, D head size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface

from thinktwice_fast.errors import UserError
from thinktwice_fast.model.flash import Flash, Parts, takes
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.rotary import Angles, Rotary, Rotation
from thinktwice_fast.model.shared_prefix import in_torch, prefix_attention
from thinktwice_kernels import rotary

NAME = "thinktwice"
# What transformers hands to every attention function and these need not know.
_UNUSED = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"}


class Attention(ABC):
    """What the tokens of one forward pass attend to."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: torch.Tensor,  # [T, Hq, D]
        k: torch.Tensor,  # [T, Hkv, D]
        v: torch.Tensor,  # [T, Hkv, D]
        scale: float,
        window: int,  # keys seen by a query, itself included; 0 = all
    ) -> torch.Tensor:  # [T, Hq, D]
        """Of queries and keys that are normed and rotated."""

    def angles(
        self,
        rotary: Rotary,
        positions: torch.Tensor,  # int64 [T]
        dtype: torch.dtype,  # of the hidden states
    ) -> Angles:
        """By which the tokens are turned, for ``rotate_and_attend``."""
        return rotary(positions, dtype)

    def rotate_and_attend(
        self,
        layer: int,
        qkv: torch.Tensor,  # [T, (Hq + 2 * Hkv) * D]; may be overwritten
        rotation: Rotation,
        scale: float,
        window: int,
    ) -> torch.Tensor:  # [T, Hq, D]
        """Of the joint product of queries, keys and values."""
        r = rotation
        q, k, v = rotary(
            qkv, r.angles.cos, r.angles.sin, query_heads=r.query_heads, kv_heads=r.kv_heads, q_norm=r.q_norm,
            k_norm=r.k_norm, eps=r.eps,
        )  # fmt: skip
        return self.attend(layer, q, k, v, scale, window)


@dataclass(frozen=True)
class PrefixAttention(Attention):
    """Causal attention of each segment over itself and all of the prefix that it continues; differentiable.

    On the CPU the extension's own kernel, on CUDA flash attention where it is given; plain torch, a segment at a time,
    for the types and head sizes that these do not take. See ``shared_prefix`` and ``flash``.
    """

    lengths: torch.Tensor  # int64 [S], tokens of each segment; on the CPU
    prefix: torch.Tensor  # int64 [S], the earlier segment that each continues, -1 = none; on the CPU
    parts: Parts | None  # for flash attention

    @classmethod
    def from_segments(
        cls, lengths: list[int], prefix: list[int], device: torch.device, flash: Flash | None = None
    ) -> "PrefixAttention":
        """Of the S segments in their order in the row; a prefix has none itself.

        Args:
            flash: as ``flash_for`` gives it; segments that share a prefix then stand right behind it.
        """
        parts = None if flash is None else Parts.from_segments(flash, lengths, prefix, device)
        return cls(torch.tensor(lengths), torch.tensor(prefix), parts)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return prefix_attention(q, k, v, self.lengths, self.prefix, scale, window)
        if self.parts is not None and takes(q.dtype, q.shape[2]):
            return self.parts.attend(q, k, v, scale, window)
        return in_torch(q, k, v, self.lengths.tolist(), self.prefix.tolist(), scale, window)


def causal_attention(lengths: list[int], device: torch.device, flash: Flash | None = None) -> PrefixAttention:
    """Of sequences of these lengths, in their order in the row, each over itself alone."""
    return PrefixAttention.from_segments(lengths, [-1] * len(lengths), device, flash)


@dataclass(frozen=True)
class PagedAttention(Attention):
    """Attention of newly reserved tokens over a paged KV cache, which it also fills; no gradient."""

    cache: PagedKVCache
    plan: Plan
    longest: int = 0  # sequence, of whose positions the angles are kept: no kernels for a step's own; 0 = not kept

    def angles(self, rotary: Rotary, positions: torch.Tensor, dtype: torch.dtype) -> Angles:
        return rotary.at(positions, dtype, self.longest) if self.longest else rotary(positions, dtype)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        return self.cache.attend(layer, self.plan, q, k, v, scale, window)

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, rotation: Rotation, scale: float, window: int
    ) -> torch.Tensor:
        if qkv.device.type == "cpu":  # the bits of training (`rollout.exact`)
            cos, sin, rows = rotation.angles.cos, rotation.angles.sin, rotation.angles.rows
            rotation = replace(rotation, angles=Angles(cos[rows], sin[rows], rows)) if self.longest else rotation
            return super().rotate_and_attend(layer, qkv, rotation, scale, window)
        return self.cache.rotate_and_attend(layer, self.plan, qkv, rotation, scale, window)


def _attention_forward(
    module: Any,
    query: torch.Tensor,  # [1, Hq, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    attention: Attention | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, Hq, D]
    assert attention is not None and attention_mask is None, "call the model through Policy or the rollout engine"
    asked = sorted(
        name for name, value in rest.items() if value is not None and value is not False and name not in _UNUSED
    )
    if asked or dropout:
        raise UserError(
            f"{type(module).__name__} asks its attention for {', '.join(asked) or 'dropout'}, which is not supported: "
            "use a model without it" + (" or set attention_dropout to 0 in its config.json" if dropout else "")
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention.attend(module.layer_idx, q, k, v, scaling, sliding_window or 0).unsqueeze(0), None


# No mask function is registered under this name, and transformers then builds no T x T mask.
AttentionInterface.register(NAME, _attention_forward)
