"""Small random models of every architecture that the trainer's own decoder knows, and how the C++ one is fed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from tests.small_models import FAMILIES, family_config, own
from thinktwice_fast.model.decoder import Decoder
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import attention_heads
from thinktwice_fast.model.transformer import Transformer

# No width is a multiple of a vector.
_ODD: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
_OTHERS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**_ODD, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "mistral": MistralConfig(**_ODD, sliding_window=8, head_dim=6),
    "olmo2": Olmo2Config(**_ODD),
    "llama with biases": LlamaConfig(**_ODD, attention_bias=True, mlp_bias=True),
    "olmo2 with biases": Olmo2Config(**_ODD, attention_bias=True),
    "olmo3 with yarn": Olmo3Config(
        **_ODD,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=512,
        rope_parameters={"full_attention": _YARN, "sliding_attention": _ROTARY},
    ),
}
MODELS = (*FAMILIES, *_OTHERS)


def made(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A float32 model in evaluation mode; norms and biases are random, where new models have ones and zeros."""
    config = family_config(name) if name in FAMILIES else copy.deepcopy(_OTHERS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def ours(name: str, **changes: Any) -> Transformer:
    """``made`` as the trainer runs it."""
    return own(made(name, **changes))


def paged(model: Transformer, blocks: int) -> PagedKVCache:
    """A cache of blocks of 16 tokens for the model, its memory full of NaN."""
    _, kv_heads, dim = attention_heads(model)
    cache = PagedKVCache(len(model.layers), blocks, kv_heads, dim, dtype=model.dtype)
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    return cache


def feed(
    decoder: Decoder,
    cache: PagedKVCache,
    handles: list[int],
    parts: list[Tensor],  # int64, the new tokens of each sequence
) -> list[Tensor]:  # float32 [tokens, V] of each
    """One forward pass; the logits of all its rows."""
    counts = [len(part) for part in parts]
    plan = cache.extend(handles, counts)
    assert plan is not None
    return list(decoder.forward(torch.cat(parts), plan, torch.arange(sum(counts)), cache).split(counts))


def prompts(model: Any, lengths: list[int]) -> list[Tensor]:
    """Random tokens, int64."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in lengths]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch's own on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
