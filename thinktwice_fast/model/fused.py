"""Attention modules of known architectures with fewer and larger steps, for forward passes over a paged cache.

    [queries, keys, values] = one product  ->  QK-norm, rotation, cache write  ->  attention  ->  output projection

What is not such a pass, training's above all, runs the module's own forward as before.

Letters: T tokens, H hidden size, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.olmo3.modeling_olmo3 import Olmo3Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from thinktwice_fast.model.agreement import TOLERANCE, agrees
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.elementwise import own_class
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.rotary import Rotation, has_fixed_angles, rotary_tables


@dataclass(frozen=True)
class _Family:
    """What an architecture's attention module has."""

    qk_norm: bool
    window: bool
    tables_by_layer_type: bool


_FAMILIES: dict[type[nn.Module], _Family] = {
    LlamaAttention: _Family(qk_norm=False, window=False, tables_by_layer_type=False),
    Qwen3Attention: _Family(qk_norm=True, window=True, tables_by_layer_type=False),
    Olmo3Attention: _Family(qk_norm=True, window=True, tables_by_layer_type=True),
}


def fuse_attention(model: PreTrainedModel, positions: int) -> bool:
    """Give the model's attention modules their short way over a paged cache.

    Query, key and value weights are put side by side in memory, where they stay, unless they are trained in float32;
    their contents may change. A model whose logits then differ from those of its own modules is left as it was.

    Args:
        model: of float32, bfloat16 or float16, built with the attention ``thinktwice``; on any device.
        positions: longest sequence. cos and sin take 8 * positions * D bytes for each kind of layer.

    Returns:
        Whether it was done; otherwise the architecture, its type or its rotary positions are not known here.
    """
    unfuse_attention(model)
    modules = _attentions(model)
    if len(modules) != model.config.num_hidden_layers or model.dtype not in TOLERANCE or not has_fixed_angles(model):
        return False
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    for module, family in modules:
        kind: Any = [module.attention_type] if family.tables_by_layer_type else []
        key = "".join(kind)
        if key not in tables:
            tables[key] = rotary_tables(model, positions, *kind)
        module.forward = _FusedForward(module, family, *tables[key])
    policy = Policy(model)
    if agrees(
        lambda ids, rows, *cached: policy(ids, rows, PagedAttention(*cached), rows, linear_head), model, positions
    ):
        return True
    unfuse_attention(model)
    return False


def unfuse_attention(model: PreTrainedModel) -> None:
    """Undo ``fuse_attention``; the weights stay where they are."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _FusedForward):
            del module.forward  # the class's own shows again


def _attentions(model: nn.Module) -> list[tuple[Any, _Family]]:
    """The known attention modules and what they have."""
    kinds = ((module, own_class(module)) for module in model.modules())
    return [(module, _FAMILIES[kind]) for module, kind in kinds if kind in _FAMILIES]


class _FusedForward:
    """Stands before an attention module's own ``forward``."""

    def __init__(self, module: Any, family: _Family, cos: Tensor, sin: Tensor):
        self._module = module
        self._own = module.forward
        self._projection = _Projection(module.q_proj, module.k_proj, module.v_proj)
        self._window = (module.sliding_window if family.window else None) or 0
        self._rotation = Rotation(cos, sin)
        if family.qk_norm:
            norms = (module.q_norm.weight, module.k_norm.weight)
            self._rotation = Rotation(cos, sin, *norms, module.q_norm.variance_epsilon)

    def __call__(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:  # [1, T, H]
        module, attention = self._module, rest.get("attention")
        dropout = module.training and module.attention_dropout  # which the module's own forward refuses
        if dropout or not isinstance(attention, PagedAttention):
            return self._own(hidden_states, **rest)
        q, k, v = (x.unflatten(1, (-1, module.head_dim)) for x in self._projection(hidden_states[0]))
        out = attention.rotate_and_attend(module.layer_idx, self._rotation, q, k, v, module.scaling, self._window)
        return module.o_proj(out.flatten(1))[None], None


class _Projection:
    """Queries, keys and values of T tokens: one product where their weights stand side by side, else three."""

    def __init__(self, *modules: Any):
        self._modules: tuple[Any, ...] = modules
        self._widths: list[int] = []
        linears = [module for module in modules if type(module) is nn.Linear]
        # Trained float32 weights may be the optimizer's own; those of another type have their masters elsewhere.
        moved = (part for module in linears for part in module.parameters())
        if len(linears) < len(modules) or any(part.requires_grad and part.dtype == torch.float32 for part in moved):
            return
        self._widths = [module.out_features for module in linears]
        self._weight = _side_by_side([module.weight for module in linears])
        biases = [module.bias for module in linears if module.bias is not None]
        assert len(biases) in (0, len(linears)), "either all three have a bias or none"
        self._bias = _side_by_side(biases) if biases else None

    def __call__(self, hidden: Tensor) -> tuple[Tensor, ...]:  # [T, H] -> 3 of [T, heads * D]
        if not self._widths:
            return tuple(module(hidden) for module in self._modules)
        assert self._modules[0].weight.data_ptr() == self._weight.data_ptr(), "the weights were moved"
        return linear(hidden, self._weight, self._bias).split(self._widths, 1)


@torch.no_grad()
def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Move parameters of one width into one block of memory, unless they lie so already, and give it whole."""
    if all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in pairwise(parts)
    ):
        return parts[0].detach().as_strided((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = place
    return whole
