"""Whether a way through a ``Transformer`` gives the logits of transformers' own module with the same weights.

Shows what a version of transformers that came later does differently, before anything trains.

Letters: T tokens, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from thinktwice_fast.model.attention import NAME, causal_attention
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.transformer import Transformer

# How far the logits may lie from those of the other module, as a share of the largest.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
_TOKENS = 24


@torch.no_grad()
def agrees(logits: Callable[[Tensor], Tensor], model: Transformer, positions: int = _TOKENS) -> bool:
    """Compare ``logits``, which gives those [T, V] of a sequence's tokens [T], at most ``positions`` of them."""
    ids = torch.arange(min(_TOKENS, positions), device=model.device) * 7919 % model.config.vocab_size
    theirs = packed_logits(as_transformers(model), ids)
    return bool((logits(ids) - theirs).abs().max() <= TOLERANCE[model.dtype] * theirs.abs().max())


def packed_logits(model: Transformer | PreTrainedModel, ids: Tensor) -> Tensor:  # int64 [T] -> float32 [T, V]
    """What updates compute, of one sequence."""
    rows = torch.arange(len(ids), device=ids.device)
    return Policy(model)(ids, rows, causal_attention([len(ids)], ids.device), rows, linear_head)


def as_transformers(model: Transformer, attention: str = NAME) -> Any:
    """Transformers' module over views of the model's weights."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        theirs: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    theirs.load_state_dict(dict(model.split(model.state_dict().items())), strict=False, assign=True)
    theirs.tie_weights()
    with torch.device(model.device):  # its frequencies are no weights
        theirs.base_model.rotary_emb = type(theirs.base_model.rotary_emb)(config)
    assert not any(tensor.is_meta for tensor in theirs.state_dict().values())
    return theirs.eval()
