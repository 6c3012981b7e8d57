"""Small random models of the supported families, written in the real transformers format."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Olmo3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from thinktwice_fast.model.transformer import Transformer

FAMILIES = ("qwen3", "olmo3", "llama")
VOCABULARY = 512
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,  # logits of some size, so that argmax is not a coin toss
}
_TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether? The answer is \\boxed{72}. Recheck every step of 12 + 7 - 3 = 16."
)


def family_config(family: str) -> PreTrainedConfig:
    """Qwen3 (QK-norm, wide heads), OLMo-3 (sliding window in 2 of 3 layers) or Llama 3.2 (scaled rotary)."""
    if family == "qwen3":
        return Qwen3Config(**_SHAPE, head_dim=32, tie_word_embeddings=True)
    if family == "olmo3":
        return Olmo3Config(
            **_SHAPE, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
        )
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 256, "rope_theta": 500000.0}  # fmt: skip
    return LlamaConfig(**_SHAPE, rope_parameters=scaling, tie_word_embeddings=True)


@cache
def bpe_tokenizer(text: str = _TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``text``, with ChatML roles."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def random_model(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A float32 model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(family_config(family), attn_implementation=attention).eval()


def own(theirs: Any) -> Transformer:
    """The trainer's own model, with the weights of transformers'."""
    model = Transformer(theirs.config, theirs.dtype)
    saved = theirs.state_dict()
    model.load_state_dict(
        {name: torch.cat([saved[part.name] for part in parts]) for name, parts in model.parts().items()}
    )
    return model.eval()


def own_model(family: str, seed: int = 0) -> Transformer:
    """``random_model`` as the trainer runs it."""
    return own(random_model(family, seed=seed))


def foreign_model(attention: str = "sdpa", seed: int = 0) -> Any:
    """One that the trainer's own decoder does not know."""
    config: Any = family_config("llama")
    config.hidden_act = "gelu"
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def write_model(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Save a random model with its tokenizer, as users have them."""
    model = random_model(family)
    tokenizer = tokenizer or bpe_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
