"""A model that says one text, in transformers' format: what it says next hangs on its last token alone."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from thinktwice_fast.algorithms.thinktuning.feedback import Feedback
from thinktwice_fast.tasks.arithmetic import RECHECK

SCRIPT = ("<opinion>", "incorrect", "</opinion>", "<reason>", *"9-5=4", "</reason>", "<phrase>", "\\boxed{", "1", "}",
          "</phrase>", "<|end|>")  # fmt: skip
GUIDANCE = Feedback("incorrect", "9-5=4", "\\boxed{1}")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_SPECIAL = ("<|pad|>", "<|end|>", "<|unk|>", *_ROLES)
_CERTAINTY = 6.0  # logit of the next token of the script, 0 for all others: nine of ten draws follow it


def write_scripted_model(folder: Path, **shape: int) -> Path:
    """A folder with the model, whose vocabulary is the arithmetic task's and the tags; ``shape`` changes its config."""
    tokenizer = _tokenizer()
    vocabulary, size = tokenizer.get_vocab(), 64
    values: dict[str, Any] = {
        "vocab_size": len(vocabulary), "hidden_size": size, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    config = Qwen3Config(**values | shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    following = zip(("<|assistant|>", *SCRIPT[:-1]), SCRIPT, strict=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(vocabulary), size))
        model.lm_head.weight.zero_()
        for token, then in following:  # the norm makes the one of a token's embedding the square root of its size
            model.lm_head.weight[vocabulary[then], vocabulary[token]] = _CERTAINTY / math.sqrt(size)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys((*_SPECIAL, *"0123456789+-=\n}", RECHECK, *SCRIPT))
    long = [re.escape(word) for word in words if len(word) > 1 and word not in _SPECIAL]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*long, r"[\s\S]"])), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>",
        additional_special_tokens=list(_ROLES), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer
