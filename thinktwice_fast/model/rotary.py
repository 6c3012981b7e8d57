"""Rotary positions as the model's own modules compute them, as tables that kernels read.

Letters: P positions, D head size, Hq / Hkv query / key-value heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_FIXED = {"default", "linear", "llama3", "yarn"}  # others turn by angles that depend on the sequence's length


@dataclass(frozen=True)
class Rotation:
    """What an attention layer does to its queries and keys before they meet; see ``csrc.rotary_write_kv``."""

    cos: Tensor  # float32 [P, D]
    sin: Tensor  # float32 [P, D]
    q_norm: Tensor | None = None  # [D] or [Hq * D]
    k_norm: Tensor | None = None  # [D] or [Hkv * D]
    eps: float = 0.0


def has_fixed_angles(model: PreTrainedModel) -> bool:
    """Whether a token's angles depend on its position alone, so that they can stand in tables."""
    parameters: dict[str, Any] = model.config.rope_parameters
    if "rope_type" in parameters:
        return parameters["rope_type"] in _FIXED
    return {kind["rope_type"] for kind in parameters.values() if kind is not None} <= _FIXED  # per kind of layer


@torch.no_grad()
def rotary_tables(model: PreTrainedModel, positions: int, *layer_type: str) -> tuple[Tensor, Tensor]:
    """cos and sin as the model's modules see them (rounded to its type), float32 [P, D]."""
    base: Any = model.base_model
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    cos, sin = base.rotary_emb(like, torch.arange(positions, device=model.device)[None], *layer_type)
    return cos[0].float().contiguous(), sin[0].float().contiguous()
