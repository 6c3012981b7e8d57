"""The models that rollouts, updates and steps are measured with, on disk and in memory, and workloads of them.

Letters: G samples of a prompt, n response tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Qwen3Config

from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.model.loading import load_tokenizer, model_folder
from thinktwice_fast.model.sharding import cast_parameters
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.model.weights import read_transformer, save_config, weight_files, write_weights
from thinktwice_kernels.reference import grpo_loss

DEFAULT, TOY, SIX_LAYERS, MEDIUM = "default model", "toy", "6-layer shape", "100 M shape"
SMALL, LARGE, LARGEST = "Qwen3-0.6B shape", "Qwen3-1.7B shape", "Qwen3-4B shape"
_FOLDER = Path("build/bench/models")
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
)
_SHAPES: dict[str, tuple[int, ...]] = {
    TOY: (32, 48, 2, 4, 2, 16, 200),
    SIX_LAYERS: (512, 1536, 6, 8, 4, 64, 8192),
    MEDIUM: (768, 2048, 12, 12, 4, 64, 32_000),
    SMALL: (1024, 3072, 28, 16, 8, 128, 151_936),
    LARGE: (2048, 6144, 28, 16, 8, 128, 151_936),
    LARGEST: (2560, 9728, 36, 32, 8, 128, 151_936),
}


def shape(name: str) -> tuple[int, ...]:
    """Hidden and inner size, layers, query and key-value heads, head size, vocabulary."""
    return _SHAPES[name]


@dataclass(frozen=True)
class Workload:
    """Every response gets exactly ``new_tokens``: no token stops it."""

    model: str  # DEFAULT, or a shape that gets random weights
    prompts: int
    samples: int  # of each prompt
    new_tokens: int
    prompt_tokens: int = 0  # random ones; 0: problems of the default task

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        return self.sequences * self.new_tokens

    def named(self, precision: str) -> str:
        prompt = f" of {self.prompt_tokens} tokens" if self.prompt_tokens else ""
        lengths = f"{self.prompts} x {self.samples} samples{prompt}, {self.new_tokens} new"
        return f"{self.model}, {lengths}{self.manner()}, T={self.tokens} {precision}"

    def manner(self) -> str:
        """What else there is to say of it."""
        return ""


def shape_config(name: str) -> Qwen3Config:
    """Of a shape that gets random weights."""
    sizes: dict[str, Any] = dict(zip(_SIZES, _SHAPES[name], strict=True))
    return Qwen3Config(**sizes, tie_word_embeddings=True, max_position_embeddings=8192)


def untrained_folder(shape: str, folder: Path) -> Path:
    """A shape's config and the shipped model's tokenizer, for ``--model.random_init``; gives the folder back."""
    tokenizer, config = load_tokenizer(ModelOptions()), shape_config(shape)
    tokenizer.save_pretrained(folder)
    config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)
    return folder


def folder_of(name: str, dtype: torch.dtype) -> Path:
    """Where the model is on disk, or will be."""
    if name == DEFAULT:
        return Path(model_folder("tiny"))
    return (_FOLDER / f"{name.replace(' ', '_')}-{str(dtype).removeprefix('torch.')}").absolute()


def model_of(name: str, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Random weights that are on disk are read again: on a CPU they take long to make."""
    folder = folder_of(name, dtype)
    if (folder / "config.json").exists():
        config = AutoConfig.from_pretrained(folder)
        return cast_parameters(read_transformer(weight_files(str(folder)), config, device), dtype)
    with torch.random.fork_rng(), device:
        model = Transformer(shape_config(name), dtype)
        model.init_weights(0)
        return model


def saved_model(name: str, dtype: torch.dtype, device: torch.device) -> Path:
    """Its folder, with the shipped model's tokenizer, whatever the vocabulary of the shape."""
    folder = folder_of(name, dtype)
    if not (folder / "config.json").exists():
        model = model_of(name, dtype, device)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(model.split(model.state_dict().items()))
        write_weights(folder, state, ((name, weight.cpu()) for name, weight in state.items()), dtype)
        save_config(model, folder, dtype)
    if not (folder / "tokenizer_config.json").exists():
        load_tokenizer(ModelOptions()).save_pretrained(folder)
    return folder


def set_options(config: Config, options: Mapping[str, Any]) -> None:
    """Set options of the configuration by dotted name."""
    for name, value in options.items():
        owner, _, option = name.rpartition(".")
        part: Any = getattr(config, owner) if owner else config
        assert hasattr(part, option), name
        setattr(part, option, value)


@dataclass(frozen=True)
class Judged:
    """A response with its advantage."""

    prompt: Sequence[int]
    response: Sequence[int]
    advantage: float


def true_loss(model: Any, groups: Sequence[Sequence[Judged]]) -> float:
    """Token mean of the clipped objective at ratio 1, by plain torch over transformers' own forward pass.

    The gradient stays with the model's parameters.

    Args:
        model: of transformers.
        groups: each of one prompt, and of responses of one length.
    """
    tokens = sum(len(sample.response) for group in groups for sample in group)
    total = 0.0
    for group in groups:
        ids = torch.tensor([[*sample.prompt, *sample.response] for sample in group], device=model.device)
        count = len(group[0].response)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=count).logits  # [G, n, V]
        logps = logits.log_softmax(2).gather(2, ids[:, -count:, None]).flatten()
        advantages = torch.tensor([sample.advantage for sample in group], device=ids.device)
        ends = torch.arange(len(group) + 1, dtype=torch.int32) * count
        loss, _ = grpo_loss(logps, advantages, ends, normalizer=tokens, epsilon_low=0.2, epsilon_high=0.28)
        loss.backward()
        total += float(loss.detach())
    return total
