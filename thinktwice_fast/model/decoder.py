"""The whole decoder in C++ (``csrc/cpu/decoder.cpp``): what rollouts on the CPU run instead of transformers' modules.

It reads the model's weights into packed copies, which ``refresh`` renews, and knows the architectures that are one of
these, with any of its biases and norms missing:

    x += [norm] attention([norm] x)        with QK-norm per head or over all heads, rotary positions, a sliding window
    x += [norm] down(silu(gate(h)) * up(h)),   h = [norm] x

Letters: T tokens, N rows whose logits are wanted, V vocabulary, H hidden size, D head size, P positions.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thinktwice_fast.model.agreement import TOLERANCE, agrees
from thinktwice_fast.model.csrc import ops
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import attention_heads
from thinktwice_fast.model.rotary import has_fixed_angles, rotary_tables

PANEL = 16  # outputs side by side in a packed weight, as in csrc/cpu/matmul.h


@dataclass(frozen=True)
class _Family:
    """Where an architecture keeps what the decoder needs; None = it has no such norm."""

    norm_before_attention: str | None
    norm_after_attention: str | None
    norm_before_mlp: str | None
    norm_after_mlp: str | None
    qk_norm: bool
    window: Literal["of the layer", "of the model", "none"]


_FAMILIES = {
    "llama": _Family("input_layernorm", None, "post_attention_layernorm", None, False, "none"),
    "mistral": _Family("input_layernorm", None, "post_attention_layernorm", None, False, "of the model"),
    "qwen2": _Family("input_layernorm", None, "post_attention_layernorm", None, False, "of the layer"),
    "qwen3": _Family("input_layernorm", None, "post_attention_layernorm", None, True, "of the layer"),
    "olmo2": _Family(None, "post_attention_layernorm", None, "post_feedforward_layernorm", True, "none"),
    "olmo3": _Family(None, "post_attention_layernorm", None, "post_feedforward_layernorm", True, "of the layer"),
}


class Decoded(NamedTuple):
    """What N sequences drew in up to S steps; row i holds ``counts[i]`` tokens."""

    tokens: Tensor  # int64 [N, S]
    logps: Tensor  # float32 [N, S], nats, under softmax(logits / temperature), nothing truncated
    entropies: Tensor  # float32 [N, S], nats, of the same distribution
    counts: Tensor  # int64 [N]


class Decoder:
    """A model on the CPU, run without transformers' modules.

    Args:
        model: float32, bfloat16 or float16, of an architecture that ``supports`` accepts. Products are computed in
            float32 whatever the type, from weights in the model's own.
        positions: longest sequence.
        group_attention: read keys that sequences share once for all of them.
    """

    def __init__(self, model: PreTrainedModel, positions: int, *, group_attention: bool = True):
        base: Any = model.base_model
        family = _FAMILIES[model.config.model_type]
        self.positions = positions
        self._copies: list[Callable[[], object]] = []
        self._id: int = ops.decoder_create(
            base.embed_tokens.weight.detach(), self._floats(base.norm.weight), *self._linear(_head(model)),
            *attention_heads(model), base.layers[0].self_attn.scaling, model.config.rms_norm_eps, group_attention,
        )  # fmt: skip
        self._close = weakref.finalize(self, ops.decoder_destroy, self._id)
        tables: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in base.layers:
            kind = layer.self_attn.attention_type if model.config.model_type == "olmo3" else ""
            if kind not in tables:
                tables[kind] = rotary_tables(model, positions, *filter(None, [kind]))
            self._add_layer(layer, family, *tables[kind])
        self.refresh()

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether a decoder of this model can be built: on the CPU (or without memory), of a known kind and type."""
        config = model.config
        base: Any = model.base_model
        return (
            model.device.type in ("cpu", "meta")
            and model.dtype in TOLERANCE
            and config.model_type in _FAMILIES
            and config.hidden_act == "silu"
            and has_fixed_angles(model)
            and type(model.get_output_embeddings()) is nn.Linear
            and len(_head(model).weight) == config.vocab_size
            and all(type(module) is nn.Linear for layer in base.layers for module in _projections(layer))
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's weights anew; to be called after they changed."""
        for copy in self._copies:
            copy()

    def forward(self, tokens: Tensor, plan: Plan, select: Tensor, cache: PagedKVCache) -> Tensor:
        """Put the plan's tokens (int64 [T]) into the cache and give the logits, float32 [N, V], of rows ``select``.

        Args:
            select: int64 [N], ascending.

        Raises:
            RuntimeError: a token lies outside the vocabulary, or the plan does not fit the tokens or the cache.
        """
        return ops.decoder_forward(
            self._id, tokens, plan.positions, plan.slots, plan.block_tables, plan.context_lens, plan.cu_seqlens_q,
            select, cache.k_cache, cache.v_cache,
        )  # fmt: skip

    def reproduces(self, model: PreTrainedModel) -> bool:
        """Whether its logits are those of the model's own modules."""
        return agrees(lambda ids, rows, cache, plan: self.forward(ids, plan, rows, cache), model, self.positions)

    def decode(
        self,
        cache: PagedKVCache,
        handles: Tensor,  # int64 [N], sequences of the cache
        tokens: Tensor,  # int64 [N], the last token of each, not in the cache yet
        sampling: Sequence[Tensor],  # temperature, top_k, top_p, min_p as in `csrc.sample`
        *,
        seed: int,
        sample_ids: Tensor,  # int64 [N]
        positions: Tensor,  # int64 [N], how many tokens were drawn already
        left: Tensor,  # int64 [N], how many more may be
        stop_ids: Tensor,  # int64, tokens that end a sequence
        steps: int,
        enough_ended: int,
    ) -> Decoded:
        """Draw up to ``steps`` tokens for each of N sequences, without a word from Python between them.

        A sequence stops at a stop token or when it has none left. All stop once ``enough_ended`` have, or when the
        cache has no blocks for the next step. The last token drawn is not in the cache. Logits that are not finite
        end the call, with -1 as the token of their sequences.

        Raises:
            RuntimeError: a sequence is stale, or arguments do not fit each other.
        """
        return Decoded(
            *ops.decoder_decode(
                self._id, cache.id, cache.k_cache, cache.v_cache, handles, tokens, *sampling, seed, sample_ids,
                positions, left, stop_ids, steps, enough_ended, cache.policy_version,
            )
        )  # fmt: skip

    def _add_layer(self, layer: Any, family: _Family, cos: Tensor, sin: Tensor) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        names = (family.norm_before_attention, family.norm_after_attention,
                 family.norm_before_mlp, family.norm_after_mlp)  # fmt: skip
        norms = [name and getattr(layer, name) for name in names]
        norms += [attention.q_norm, attention.k_norm] if family.qk_norm else [None, None]
        window = {"of the layer": attention, "of the model": attention.config, "none": None}[family.window]
        ops.decoder_add_layer(
            self._id,
            *(norm and self._floats(norm.weight) for norm in norms),
            *self._linear(attention.q_proj, attention.k_proj, attention.v_proj),
            *self._linear(attention.o_proj),
            *self._linear(mlp.gate_proj, mlp.up_proj),
            *self._linear(mlp.down_proj),
            cos,
            sin,
            (window and window.sliding_window) or 0,
        )

    def _linear(self, *modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Packed weight and padded bias of linear layers with one input, their outputs one after another."""
        panels = -(-sum(module.out_features for module in modules) // PANEL)
        first_weight = modules[0].weight
        packed = first_weight.new_zeros(panels, modules[0].in_features, PANEL, requires_grad=False)
        bias = torch.zeros(panels * PANEL) if any(module.bias is not None for module in modules) else None
        first = 0
        for module in modules:
            self._copies.append(partial(ops.pack_weight, module.weight.detach(), packed, first))
            if bias is not None and module.bias is not None:
                self._copies.append(partial(bias[first : first + module.out_features].copy_, module.bias.detach()))
            first += module.out_features
        return packed, bias

    def _floats(self, weight: nn.Parameter) -> Tensor:
        copy = torch.empty(weight.shape, dtype=torch.float32)
        self._copies.append(partial(copy.copy_, weight.detach()))
        return copy


def _projections(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj]  # fmt: skip


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head
