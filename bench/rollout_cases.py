"""What the rollout benchmarks draw: models, prompts and lengths, and what a step of it moves and multiplies at least.

Letters: N sequences, T longest prompt and response.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, Qwen3Config

from bench.shapes import DEFAULT, LARGE, MEDIUM, SMALL, Case, Size
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.model.agreement import as_transformers
from thinktwice_fast.model.loading import load_tokenizer, model_folder
from thinktwice_fast.model.sharding import cast_parameters
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.model.weights import read_transformer, weight_files
from thinktwice_fast.records import Request, Sampling
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.prompts import ChatFormat

FOLDER = Path("build/bench/models")
_SHAPES: dict[str, dict[str, int]] = {
    SMALL: {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    LARGE: {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    },
    "Qwen3-4B shape": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    MEDIUM: {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 32_000, "head_dim": 64, "num_key_value_heads": 4,
    },
    "6-layer shape": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
        "vocab_size": 8192, "head_dim": 64, "num_key_value_heads": 4,
    },
    "toy": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 200, "head_dim": 16, "num_key_value_heads": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Every sequence gets exactly ``new_tokens``: no token stops it."""

    model: str  # DEFAULT, or a shape that gets random weights
    prompts: int
    samples: int  # of each prompt
    new_tokens: int
    prompt_tokens: int = 0  # random ones; 0: problems of the default task
    instruction: int = 0  # tokens between a response and its second turn's

    @property
    def name(self) -> str:
        prompt = f" of {self.prompt_tokens} tokens" if self.prompt_tokens else ""
        turns = f", twice with {self.instruction} between" if self.instruction else ""
        return f"{self.model}, {self.prompts} x {self.samples} samples{prompt}, {self.new_tokens} new{turns},"

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        return self.sequences * self.new_tokens


@dataclass(frozen=True)
class RolloutBatch:
    """A workload with its model, as transformers runs it and as the engine does; both have the same weights."""

    workload: Workload
    theirs: PreTrainedModel
    ours: Transformer
    prompts: tuple[tuple[int, ...], ...]
    temperature: float = 1.0  # 0: greedy
    kept: dict[object, Any] = field(default_factory=dict)  # engines and processes, which go with the batch

    @property
    def device(self) -> torch.device:
        return self.theirs.device

    @property
    def longest(self) -> int:
        """T."""
        workload = self.workload
        turns = 2 if workload.instruction else 1
        return max(map(len, self.prompts)) + turns * workload.new_tokens + workload.instruction

    @cached_property
    def folder(self) -> Path:
        """The model on disk, for a contender that runs in another process."""
        folder = folder_of(self.workload.model, self.theirs.dtype)
        if not (folder / "config.json").exists():
            self.theirs.save_pretrained(folder)
        return folder.resolve()

    def requests(self, **options: Any) -> list[Request]:
        """The prompts as the engine takes them."""
        samples = self.workload.samples
        sampling = Sampling(temperature=self.temperature, max_tokens=self.workload.new_tokens)
        return [
            Request(group, prompt, tuple(range(group * samples, (group + 1) * samples)), sampling, **options)
            for group, prompt in enumerate(self.prompts)
        ]


def rollout_case(workload: Workload, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """A case by the workload's name, under which ``workload_of`` finds it again."""
    _WORKLOADS[workload.name] = workload
    return Case(workload.name, 0, 0, workload.tokens, dtype, memory=False, **options)


_WORKLOADS: dict[str, Workload] = {}


def workload_of(case: Case) -> Workload:
    return _WORKLOADS[case.head]


def rollout_batch(case: Case, device: torch.device) -> RolloutBatch:
    workload = workload_of(case)
    ours = model_of(workload.model, case.dtype, device).requires_grad_(False)
    theirs = as_transformers(ours, "sdpa").requires_grad_(False)
    # Whatever would end a sequence or narrow its sampling is for the contenders to ask for.
    theirs.generation_config = GenerationConfig(pad_token_id=0)
    return RolloutBatch(workload, theirs, ours, _prompts(workload, theirs.config.vocab_size))


def _prompts(workload: Workload, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    if workload.prompt_tokens:
        shape = (workload.prompts, workload.prompt_tokens)
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
        return tuple(map(tuple, ids.tolist()))
    source, chat = ArithmeticSource("tm5"), ChatFormat(load_tokenizer(ModelOptions()))
    return tuple(tuple(chat.prompt_ids(source.problem(index).messages)) for index in range(workload.prompts))


def folder_of(name: str, dtype: torch.dtype) -> Path:
    """Where the model is on disk, or will be."""
    if name == DEFAULT:
        return Path(model_folder("tiny"))
    return FOLDER / f"{name.replace(' ', '_')}-{str(dtype).removeprefix('torch.')}"


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


def shape_config(name: str) -> Qwen3Config:
    """Of a shape that gets random weights."""
    shape = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8} | _SHAPES[name]
    return Qwen3Config(**shape, tie_word_embeddings=True, max_position_embeddings=8192)  # type: ignore[arg-type]


def untrained_folder(shape: str, folder: Path) -> Path:
    """A shape's config and the shipped model's tokenizer, for ``--model.random_init``; gives the folder back."""
    tokenizer, config = load_tokenizer(ModelOptions()), shape_config(shape)
    tokenizer.save_pretrained(folder)
    config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)
    return folder


def rollout_cases(size: Size) -> list[Case]:
    return _ROLLOUTS[size]


def switch_cases(size: Size) -> list[Case]:
    """Refine-like: one long prompt for the whole group."""
    return _SWITCHES[size]


def extend_cases(size: Size) -> list[Case]:
    return _EXTENSIONS[size]


_BF16 = torch.bfloat16
# Without bf16 arithmetic torch takes two minutes for a prompt that takes ten seconds in fp32: nobody would run it so.
_CPU_DTYPE = _BF16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
# Each sample's prompt is computed by itself there, in fp32 for minutes.
_SLOW = ("transformers generate", "transformers generate_batch") if _CPU_DTYPE != _BF16 else ()
_ROLLOUTS: dict[Size, list[Case]] = {
    "toy": [rollout_case(Workload("toy", 3, 2, 5, 20)), rollout_case(Workload("toy", 1, 4, 5, 20), _BF16)],
    "cpu": [
        rollout_case(Workload(DEFAULT, 32, 8, 32)),
        rollout_case(Workload(SMALL, 1, 8, 16, 128), _CPU_DTYPE, left_out=_SLOW[1:]),
        rollout_case(Workload(SMALL, 1, 32, 16, 256), _CPU_DTYPE, left_out=_SLOW, counts=False),
    ],
    "gpu": [
        rollout_case(Workload("Qwen3-4B shape", 16, 16, 64, 512), _BF16),
        rollout_case(Workload(LARGE, 8, 8, 64, 1024), _BF16),
    ],
}
_SWITCHES: dict[Size, list[Case]] = {
    "toy": [rollout_case(Workload("toy", 2, 4, 5, 70))],
    "cpu": [rollout_case(Workload("6-layer shape", 1, 8, 32, 1024))],
    "gpu": [rollout_case(Workload("Qwen3-4B shape", 8, 16, 64, 2048), _BF16)],
}
_EXTENSIONS: dict[Size, list[Case]] = {
    "toy": [rollout_case(Workload("toy", 2, 2, 5, 20, instruction=3))],
    "cpu": [rollout_case(Workload("6-layer shape", 2, 8, 16, 256, instruction=16))],
    "gpu": [rollout_case(Workload("Qwen3-4B shape", 8, 8, 64, 1024, instruction=32), _BF16)],
}
