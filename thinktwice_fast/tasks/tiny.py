"""The shipped model before its warm start: its shape, tokenizer and chat template.

``python -m thinktwice_fast.tasks.tiny FOLDER`` writes them without weights; ``make warm-start`` trains from there.
"""

import sys
from pathlib import Path

from transformers import GenerationConfig, Qwen3Config

from thinktwice_fast.tasks.arithmetic import build_tokenizer


def write_tiny(folder: Path) -> None:
    """Write config, tokenizer and chat template of the 0.4 M-parameter Qwen3 model to ``folder``."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=32,  # the tokenizer's 23, rounded up
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_tiny(Path(sys.argv[1]))
