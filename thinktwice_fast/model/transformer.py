"""The decoder of Llama, Mistral, Qwen2, Qwen3, OLMo-2 and OLMo-3: what rollouts and updates run.

    x += [norm] o(attention(rotary(qkv([norm] x))))          QK-norm of each head, of all at once, or none
    x += [norm] down(silu(gate(h)) * up(h)),  h = [norm] x   norms before a part, or after it (OLMo)

Products of one input have one weight: ``qkv_proj`` and ``gate_up_proj``. What transformers calls the weights stands in
one table (``parts``), by which they are read and saved, and LoRA finds its targets.

What the tokens attend to is a value handed in, and so is the matrix product.

Letters: T tokens, H hidden size, Hq / Hkv query / key-value heads, D head size, V vocabulary, I / O inputs / outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import sqrt
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedConfig

from thinktwice_fast.model.attention import Attention
from thinktwice_fast.model.rotary import EVERY, Angles, Rotary, Rotation, has_fixed_angles, rope_types
from thinktwice_kernels import rms_norm, swiglu

# x [T, I], weight [O, I], bias [O] or None -> [T, O]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Family:
    """What tells an architecture from the others."""

    norms: Literal["before", "after"] = "before"
    qk_norm: Literal["none", "each head", "all heads"] = "none"
    window: Literal["none", "every layer", "layer types"] = "none"
    qkv_bias: bool = False
    bias_options: tuple[str, ...] = ()  # of its config
    rounds_early: bool = True  # cos and sin, and a norm's result before its weight is multiplied


_FAMILIES = {
    "llama": _Family(bias_options=("attention_bias", "mlp_bias")),
    "mistral": _Family(window="every layer"),
    "qwen2": _Family(window="layer types", qkv_bias=True),
    "qwen3": _Family(qk_norm="each head", window="layer types", bias_options=("attention_bias",)),
    "olmo2": _Family("after", "all heads", bias_options=("attention_bias",), rounds_early=False),
    "olmo3": _Family("after", "all heads", "layer types", bias_options=("attention_bias",), rounds_early=False),
}
# Transformers' names for what stands here under another, within a layer; the others are the same.
_JOINT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
}


class Part(NamedTuple):
    """One of transformers' weights, as rows of one of this model's."""

    name: str  # transformers'
    first: int
    rows: int

    def of(self, whole: Tensor) -> Tensor:
        """Its rows of the weight, a bias, or anything of as many rows."""
        return whole[self.first : self.first + self.rows]


class Transformer(nn.Module):
    """A decoder whose weights have memory but no values yet, on torch's default device.

    Args:
        config: of a transformers model, one that ``knows`` accepts.
        dtype: of the weights.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        c: Any = config
        family = _FAMILIES[c.model_type]
        self.config = c
        self.generation_config = GenerationConfig.from_model_config(c)
        self._norms = family.norms
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype, c.pad_token_id)
        layers = nn.ModuleList(Layer(c, family, number, dtype) for number in range(c.num_hidden_layers))
        self.layers = cast(Sequence[Layer], layers)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps, family, dtype)
        self.lm_head = None if c.tie_word_embeddings else Embedding(c.vocab_size, c.hidden_size, dtype)
        kinds = sorted({layer.self_attn.rope_type for layer in self.layers})
        rotary = nn.ModuleDict({kind: Rotary(c, kind, rounded=family.rounds_early) for kind in kinds})
        self.rotary = cast(Mapping[str, Rotary], rotary)

    @staticmethod
    def knows(config: PreTrainedConfig) -> bool:
        """Whether it is one of the architectures, with nothing that it does not usually have."""
        c: Any = config
        plain = getattr(c, "quantization_config", None) is None
        return plain and c.model_type in _FAMILIES and c.hidden_act == "silu" and has_fixed_angles(c)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed_tokens.weight.dtype

    @property
    def head(self) -> Tensor:  # [V, H]
        """The weight that logits are made with."""
        return (self.lm_head or self.embed_tokens).weight

    def forward(
        self,
        input_ids: Tensor,  # int64 [T]
        position_ids: Tensor,  # int64 [T]
        attention: Attention,
        product: Product = linear,
    ) -> Tensor:  # [T, H], what the head makes logits of
        x, change = self.embed_tokens(input_ids), None
        angles = {kind: attention.angles(rotary, position_ids, x.dtype) for kind, rotary in self.rotary.items()}
        for layer in self.layers:
            x, change = layer(x, change, angles, attention, product)
        return self.norm.of_sum(change, x)[0]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random ones, of the config's standard deviation; norms of ones, biases and the padding token of zeros."""
        torch.manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        if self.config.pad_token_id is not None:
            self.embed_tokens.weight[self.config.pad_token_id] = 0.0

    def parts(self) -> dict[str, list[Part]]:
        """The border: what each of the weights is in transformers, in its order; without adapters."""
        found: dict[str, list[Part]] = {}
        for path, module in self.named_modules():
            if not isinstance(module, Projection | Norm | Embedding):
                continue
            above, _, own = path.rpartition(".")
            sizes = module.sizes if isinstance(module, Projection) else {own: len(module.weight)}
            places = list(zip(sizes, accumulate(sizes.values(), initial=0), sizes.values(), strict=False))
            for kind, _ in module.named_parameters(recurse=False):
                found[f"{path}.{kind}"] = [
                    Part(f"{self._transformers_path(above, name)}.{kind}", first, rows) for name, first, rows in places
                ]
        return found

    def _transformers_path(self, above: str, name: str) -> str:
        if name == "lm_head":
            return name
        return ".".join(filter(None, ("model", above, _NORMS[self._norms].get(name, name))))

    def split(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Transformers' names and tensors of these, which have this model's: views, but for sharded ones."""
        parts = self.parts()
        return ((part.name, part.of(weight)) for name, weight in weights for part in parts[name])


class Layer(nn.Module):
    """Attention and MLP, each with its norm, added to what comes in.

    What is added last goes along beside the sum up to the next norm, which adds it in its own pass over memory.
    """

    def __init__(self, config: Any, family: _Family, number: int, dtype: torch.dtype):
        super().__init__()
        self.self_attn = SelfAttention(config, family, number, dtype)
        self.mlp = MLP(config, family, dtype)
        self.norms = family.norms
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps, family, dtype)
        self.mlp_norm = Norm(config.hidden_size, config.rms_norm_eps, family, dtype)
        self.recomputed = False  # in the backward pass

    def forward(
        self,
        x: Tensor,  # [T, H]
        change: Tensor | None,  # [T, H], to be added to x; None = nothing
        *rest: Any,
    ) -> tuple[Tensor, Tensor | None]:  # likewise
        if self.recomputed and torch.is_grad_enabled():  # between the layers one tensor is kept, not two
            assert change is None
            return checkpoint(self._summed, x, *rest, use_reentrant=False, preserve_rng_state=False), None
        return self._compute(x, change, *rest)

    def _summed(self, x: Tensor, *rest: Any) -> Tensor:
        x, change = self._compute(x, None, *rest)
        return x if change is None else x + change

    def _compute(
        self, x: Tensor, change: Tensor | None, angles: Mapping[str, Angles], attention: Attention, product: Product
    ) -> tuple[Tensor, Tensor | None]:
        if self.norms == "after":
            assert change is None
            x = x + self.attention_norm(self.self_attn(x, angles, attention, product))
            return x + cast(Tensor, self.mlp_norm(self.mlp(x, product))), None
        normed, x = self.attention_norm.of_sum(change, x)
        normed, x = self.mlp_norm.of_sum(self.self_attn(normed, angles, attention, product), x)
        return x, self.mlp(normed, product)


class SelfAttention(nn.Module):
    """Queries, keys and values in one product, and the output's."""

    def __init__(self, config: Any, family: _Family, number: int, dtype: torch.dtype):
        super().__init__()
        heads, kv_heads, size = heads_of(config)
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        bias = "attention_bias" in family.bias_options and config.attention_bias
        self.qkv_proj = Projection("qkv_proj", config.hidden_size, sizes, family.qkv_bias or bias, dtype)
        self.o_proj = Projection("o_proj", heads * size, [config.hidden_size], bias, dtype)
        self.q_norm = self.k_norm = None
        if family.qk_norm != "none":
            normed = [heads * size, kv_heads * size] if family.qk_norm == "all heads" else [size, size]
            self.q_norm, self.k_norm = (Norm(n, config.rms_norm_eps, family, dtype) for n in normed)
        own_type = config.layer_types[number] if family.window == "layer types" else ""
        windowed = family.window == "every layer" or own_type == "sliding_attention"
        self.number = number
        self.window: int = (config.sliding_window if windowed else None) or 0  # keys seen; 0 = all
        self.scale: float = size**-0.5
        self.rope_type = own_type if own_type in rope_types(config) else EVERY
        self._heads = heads, kv_heads

    def forward(
        self,
        x: Tensor,  # [T, H]
        angles: Mapping[str, Angles],  # by rope type
        attention: Attention,
        product: Product,
    ) -> Tensor:  # [T, H]
        rotation = Rotation(angles[self.rope_type], *self._heads)
        if self.q_norm is not None and self.k_norm is not None:
            rotation = replace(rotation, q_norm=self.q_norm.weight, k_norm=self.k_norm.weight, eps=self.q_norm.eps)
        qkv = self.qkv_proj(x, product)
        out = attention.rotate_and_attend(self.number, qkv, rotation, self.scale, self.window)
        return cast(Tensor, self.o_proj(out.flatten(1), product))


class MLP(nn.Module):
    """Gated by SiLU."""

    def __init__(self, config: Any, family: _Family, dtype: torch.dtype):
        super().__init__()
        bias = "mlp_bias" in family.bias_options and config.mlp_bias
        inner = config.intermediate_size
        self.gate_up_proj = Projection("gate_up_proj", config.hidden_size, [inner, inner], bias, dtype)
        self.down_proj = Projection("down_proj", inner, [config.hidden_size], bias, dtype)

    def forward(self, x: Tensor, product: Product) -> Tensor:  # [T, H] -> [T, H]
        return cast(Tensor, self.down_proj(swiglu(self.gate_up_proj(x, product)), product))


class Projection(nn.Module):
    """A linear layer, or several of one input; each may have an adapter (``lora.py``)."""

    def __init__(self, name: str, inputs: int, outputs: list[int], bias: bool, dtype: torch.dtype):
        super().__init__()
        self.sizes = dict(zip(_JOINT.get(name, (name,)), outputs, strict=True))  # by transformers' names
        self.weight = nn.Parameter(torch.empty(sum(outputs), inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(sum(outputs), dtype=dtype)) if bias else None
        self.lora_A = nn.ParameterDict()  # [R, I] of those in `sizes` that have an adapter, of rank R
        self.lora_B = nn.ParameterDict()  # [O, R]
        self.lora_scale = 0.0

    def add_adapter(self, name: str, rank: int) -> None:
        """Of random A and zeros as B, to one of ``sizes``."""
        device = self.weight.device
        self.lora_A[name] = nn.Parameter(torch.empty(rank, self.weight.shape[1], dtype=torch.float32, device=device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.sizes[name], rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A[name], a=sqrt(5))  # as nn.Linear and peft do

    def forward(self, x: Tensor, product: Product) -> Tensor:  # [T, I] -> [T, O]
        out = product(x, self.weight, self.bias)
        if not self.lora_A:
            return out
        changes = [
            linear(linear(x, self.lora_A[name]), self.lora_B[name])
            if name in self.lora_A
            else x.new_zeros(len(x), size)
            for name, size in self.sizes.items()
        ]
        return out + self.lora_scale * (torch.cat(changes, 1) if len(changes) > 1 else changes[0])


class Norm(nn.Module):
    """RMS norm; of queries and keys the weight alone, for ``Rotation``."""

    def __init__(self, size: int, eps: float, family: _Family, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps
        self._cast_first = family.rounds_early

    def forward(self, x: Tensor) -> Tensor:  # [T, H] -> [T, H]
        return rms_norm(x, self.weight, self.eps, cast_first=self._cast_first)

    def of_sum(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:  # each [T, H]
        """Of x + residual, or the residual where there is no x, and the sum."""
        if x is None:
            return self(residual), residual
        return rms_norm(x, self.weight, self.eps, residual=residual, cast_first=self._cast_first)


class Embedding(nn.Module):
    """Rows of a weight; as ``lm_head`` the weight alone."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, padding: int | None = None):
        super().__init__()
        self._padding = padding  # a token whose row gets no gradient from here, as transformers has it
        self.weight = nn.Parameter(torch.empty(tokens, hidden, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:  # int64 [T] -> [T, H]
        return embedding(ids, self.weight, self._padding)


def heads_of(config: Any) -> tuple[int, int, int]:
    """Hq, Hkv and D of a transformers model."""
    heads: int = config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size
