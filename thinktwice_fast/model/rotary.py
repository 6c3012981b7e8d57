"""Rotary positions (Su et al. 2021, arXiv 2104.09864): by which angles a token's queries and keys are turned.

Letters: T tokens, D head size, Hq / Hkv query / key-value heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

EVERY = "every"
# Within the model's context the angles of these depend on the position alone, not on the sequence's length.
_FIXED = {"default", "linear", "dynamic", "llama3", "yarn"}


@dataclass(frozen=True)
class Angles:
    """Of the T tokens of a forward pass, or of all P positions that they may have."""

    cos: Tensor  # float32 [T, D] or [P, D]
    sin: Tensor  # likewise
    rows: Tensor  # int64 [T], where each token's angles stand: 0 to T - 1, or its position

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin."""
        return self.cos, self.sin


@dataclass(frozen=True)
class Rotation:
    """What an attention layer does to its queries and keys before they meet; see ``thinktwice_kernels.rotary``."""

    angles: Angles
    query_heads: int
    kv_heads: int
    q_norm: Tensor | None = None  # [D] or [Hq * D]
    k_norm: Tensor | None = None  # [D] or [Hkv * D]
    eps: float = 0.0


class Rotary(nn.Module):
    """Angles of one kind of layers.

    Args:
        config: of a transformers model.
        layer_type: one of its ``rope_types``.
        rounded: cos and sin are rounded to the type of the hidden states.
    """

    inv_freq: Tensor  # float32 [D / 2]

    def __init__(self, config: PreTrainedConfig, layer_type: str, *, rounded: bool):
        super().__init__()
        frequencies, self._scale = _frequencies(config, layer_type)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self._rounded = rounded
        self._tables: dict[tuple[torch.dtype, torch.device], list[Angles]] = {}

    def forward(
        self,
        positions: Tensor,  # int64 [T]
        dtype: torch.dtype,  # of the hidden states
    ) -> Angles:
        half = positions.float()[:, None] * self.inv_freq
        angles = torch.cat((half, half), 1)
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        if self._rounded:
            cos, sin = cos.to(dtype).float(), sin.to(dtype).float()
        return Angles(cos, sin, torch.arange(len(positions), device=positions.device))

    def at(
        self,
        positions: Tensor,  # int64 [T]
        dtype: torch.dtype,  # of the hidden states
        longest: int,  # P
    ) -> Angles:
        """The same, from tables of P positions or more that are made once.

        None goes: CUDA graphs know where it stands. Each is twice as long as the one before at least.
        """
        made = self._tables.setdefault((dtype, positions.device), [])
        there = len(made[-1].cos) if made else 0
        if there < longest:
            made.append(self(torch.arange(max(longest, 2 * there), device=positions.device), dtype))
        return replace(made[-1], rows=positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:  # a narrow type would turn distant tokens by other angles
            self.inv_freq = exact.to(self.inv_freq.device)
        return self


def rope_types(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary parameters by the type of layer that they are for, ``EVERY`` where all have the same."""
    parameters: dict[str, Any] = cast(Any, config).rope_parameters
    if "rope_type" in parameters:
        return {EVERY: parameters}
    return {kind: own for kind, own in parameters.items() if isinstance(own, dict)}


def has_fixed_angles(config: PreTrainedConfig) -> bool:
    """Whether a token's angles depend on its position alone."""
    return {own["rope_type"] for own in rope_types(config).values()} <= _FIXED


def _frequencies(config: Any, layer_type: str) -> tuple[Tensor, float]:
    """Angle per position of each pair of elements, float32 [D / 2], and the factor of cos and sin."""
    own = rope_types(config)[layer_type]
    if own["rope_type"] != "default":
        of_type = {} if layer_type == EVERY else {"layer_type": layer_type}
        frequencies, scale = ROPE_INIT_FUNCTIONS[own["rope_type"]](config, None, **of_type)
        return frequencies.float(), scale
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / own["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size), 1.0
