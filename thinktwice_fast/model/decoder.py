"""The whole decoder in C++ (``csrc/cpu/decoder.cpp``): what rollouts on the CPU run instead of ``transformer.py``.

It computes what that describes, from packed copies of its weights, which ``refresh`` renews.

Letters: T tokens, N rows whose logits are wanted, V vocabulary, P positions.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thinktwice_fast.model.agreement import TOLERANCE, agrees
from thinktwice_fast.model.csrc import ops
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import Model, attention_heads
from thinktwice_fast.model.products import PANEL
from thinktwice_fast.model.transformer import Layer, Norm, Projection, Transformer


class Decoded(NamedTuple):
    """What N sequences drew in up to S steps; row i holds ``counts[i]`` tokens."""

    tokens: Tensor  # int64 [N, S]
    logps: Tensor  # float32 [N, S], nats, under softmax(logits / temperature), nothing truncated
    entropies: Tensor  # float32 [N, S], nats, of the same distribution
    counts: Tensor  # int64 [N]


class Decoder:
    """A model on the CPU.

    Args:
        model: one that ``supports`` accepts. Products are computed in float32 whatever its type, from weights in that.
        positions: longest sequence.
        group_attention: read keys that sequences share once for all of them.
    """

    def __init__(self, model: Transformer, positions: int, *, group_attention: bool = True):
        self.positions = positions
        self._copies: list[Callable[[], object]] = []
        scale = model.layers[0].self_attn.scale
        self._id: int = ops.decoder_create(
            model.embed_tokens.weight.detach(), self._floats(model.norm.weight), *self._packed(model.head, None),
            *attention_heads(model), scale, model.norm.eps, group_attention,
        )  # fmt: skip
        self._close = weakref.finalize(self, ops.decoder_destroy, self._id)
        every = torch.arange(positions)
        angles = {kind: rotary(every, model.dtype) for kind, rotary in model.rotary.items()}
        for layer in model.layers:
            self._add_layer(layer, *angles[layer.self_attn.rope_type].tables)
        self.refresh()

    @staticmethod
    def supports(model: Model) -> bool:
        """Whether a decoder of this model can be built: on the CPU (or without memory), of a known kind and type."""
        return isinstance(model, Transformer) and model.device.type in ("cpu", "meta") and model.dtype in TOLERANCE

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

    def reproduces(self, model: Transformer) -> bool:
        """Whether its logits are those of transformers' module with the model's weights."""

        def logits(ids: Tensor) -> Tensor:
            _, kv_heads, size = attention_heads(model)
            cache = PagedKVCache(len(model.layers), 2, kv_heads, size, dtype=model.dtype)
            plan = cache.extend([cache.prefill()], [len(ids)])
            assert plan is not None
            return self.forward(ids, plan, torch.arange(len(ids)), cache)

        return agrees(logits, model, self.positions)

    def decode(
        self,
        cache: PagedKVCache,
        handles: Tensor,  # int64 [N], sequences of the cache
        tokens: Tensor,  # int64 [N], the last token of each, its place reserved but not in the cache yet
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
        cache has no blocks for one more step. The last token drawn is not in the cache and has no place in it. Logits
        that are not finite end the call, with -1 as the token of their sequences.

        Raises:
            RuntimeError: a sequence is stale, or arguments do not fit each other.
        """
        return Decoded(
            *ops.decoder_decode(
                self._id, cache.id, cache.k_cache, cache.v_cache, handles, tokens, *sampling, seed, sample_ids,
                positions, left, stop_ids, steps, enough_ended, cache.policy_version,
            )
        )  # fmt: skip

    def _add_layer(self, layer: Layer, cos: Tensor, sin: Tensor) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        ops.decoder_add_layer(
            self._id, *self._norms(layer), *self._linear(attention.qkv_proj), *self._linear(attention.o_proj),
            *self._linear(mlp.gate_up_proj), *self._linear(mlp.down_proj), cos, sin, attention.window,
        )  # fmt: skip

    def _norms(self, layer: Layer) -> list[Tensor | None]:
        """Before and after the attention, before and after the MLP, of queries and keys; None where there is none."""
        around: list[Norm | None] = []
        for norm in (layer.attention_norm, layer.mlp_norm):
            around += [norm, None] if layer.norms == "before" else [None, norm]
        norms = [*around, layer.self_attn.q_norm, layer.self_attn.k_norm]
        return [self._floats(norm.weight) if norm is not None else None for norm in norms]

    def _linear(self, projection: Projection) -> tuple[Tensor, Tensor | None]:
        return self._packed(projection.weight, projection.bias)

    def _packed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Packed weight and padded bias."""
        panels = -(-len(weight) // PANEL)
        packed = weight.new_zeros(panels, weight.shape[1], PANEL, requires_grad=False)
        self._copies.append(partial(ops.pack_weight, weight.detach(), packed, 0))
        if bias is None:
            return packed, None
        padded = torch.zeros(panels * PANEL)
        self._copies.append(partial(padded[: len(bias)].copy_, bias.detach()))
        return packed, padded

    def _floats(self, weight: nn.Parameter) -> Tensor:
        copy = torch.empty(weight.shape, dtype=torch.float32)
        self._copies.append(partial(copy.copy_, weight.detach()))
        return copy
