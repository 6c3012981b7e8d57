"""Whether a faster way through a model gives the logits of its own modules.

Shows what a changed version of transformers, or modules replaced by the user, do differently.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thinktwice_fast.model.attention import causal_attention
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import Policy, attention_heads, linear_head

# How far the logits may lie from those of the model's modules, as a share of the largest.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
_TOKENS = 24

# token ids [T], their rows (0 to T - 1), the cache and their places in it -> logits [T, V]
PagedLogits = Callable[[Tensor, Tensor, PagedKVCache, Plan], Tensor]


@torch.no_grad()
def agrees(logits: PagedLogits, model: PreTrainedModel, positions: int) -> bool:
    """Compare ``logits`` of a few tokens (at most ``positions``), over a paged cache, with training's.

    Args:
        model: float32, bfloat16 or float16.
    """
    config, device = model.config, model.device
    rows = torch.arange(min(_TOKENS, positions), device=device)
    ids = rows * 7919 % config.vocab_size
    _, kv_heads, head_dim = attention_heads(model)
    cache = PagedKVCache(config.num_hidden_layers, 2, kv_heads, head_dim, dtype=model.dtype, device=device)
    plan = cache.extend([cache.prefill()], [len(rows)])
    assert plan is not None
    ours = logits(ids, rows, cache, plan)
    theirs = Policy(model)(ids, rows, causal_attention([len(rows)], device), rows, linear_head)
    return bool((ours - theirs).abs().max() <= TOLERANCE[model.dtype] * theirs.abs().max())
