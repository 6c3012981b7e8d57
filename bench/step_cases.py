"""What the step benchmarks train on: models, problems and lengths, and the work that a step of them cannot do without.

Letters: P prompts, G samples of each, L weights of the layers, V vocabulary, H hidden size.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from bench.rollout_cases import FOLDER, folder_of, model_of
from bench.shapes import DEFAULT, LARGE, MEDIUM, SMALL, Case, Size
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.model.loading import load_tokenizer
from thinktwice_fast.model.weights import save_config, write_weights
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.prompts import ChatFormat

Reward = Literal["mixed", "math"]
_STEPS = 64  # whose problems are all different


@dataclass(frozen=True)
class StepWorkload:
    """A solve step: every response gets exactly ``new_tokens``, since nothing stops it; then one optimizer step."""

    model: str  # DEFAULT, or a shape that gets random weights
    prompts: int
    samples: int  # of each prompt
    new_tokens: int
    prompt_tokens: int = 0  # 0: problems of the default task
    # mixed: every other sample is right, so that all have an advantage. math: as they are.
    reward: Reward = "mixed"
    checkpointing: bool = False  # of activations
    batch: int = 0  # sequences at a time in TRL's update; 0: all
    tokens: int = 16_384  # of a micro-batch in ours

    @property
    def name(self) -> str:
        prompt = f" of {self.prompt_tokens} tokens" if self.prompt_tokens else ""
        graded = ", graded as they are" if self.reward == "math" else ""
        return f"{self.model}, {self.prompts} x {self.samples} samples{prompt}, {self.new_tokens} new{graded},"

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples


@dataclass(frozen=True)
class StepBatch:
    """A workload on disk, and the processes that train on it."""

    workload: StepWorkload
    device: torch.device
    folder: Path  # model and tokenizer
    problems: Path  # jsonl
    flop: "Flop"
    kept: dict[object, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Flop:
    """Products of one step: each prompt once for its group, what a token attends to once."""

    rollout: float
    update: float

    @property
    def step(self) -> float:
        return self.rollout + self.update


def flop_of(workload: StepWorkload, config: Any, prompt: int) -> Flop:
    """2 for each weight and token forward, 4 backward; the head for response tokens alone.

    Args:
        config: the model's.
        prompt: tokens of a prompt.
    """
    width, new = config.head_dim, workload.new_tokens
    attention = config.hidden_size * width * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layers = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    tokens = workload.prompts * prompt + workload.sequences * new
    pairs = workload.prompts * prompt**2 / 2 + workload.sequences * new * (prompt + new / 2)
    attended = 4 * config.num_hidden_layers * config.num_attention_heads * width * pairs
    forward = 2 * (layers * tokens + head * workload.sequences * new) + attended
    return Flop(forward, 3 * forward)


def step_case(workload: StepWorkload, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """A case by the workload's name, under which ``workload_of`` finds it again."""
    _WORKLOADS[workload.name] = workload
    return Case(workload.name, 0, 0, workload.sequences * workload.new_tokens, dtype, **options)


_WORKLOADS: dict[str, StepWorkload] = {}


def workload_of(case: Case) -> StepWorkload:
    return _WORKLOADS[case.head]


def step_batch(case: Case, device: torch.device) -> StepBatch:
    workload = workload_of(case)
    folder = _model_folder(workload.model, case.dtype, device)
    return StepBatch(workload, device, folder, _problems(workload), flop_for(case))


@cache
def flop_for(case: Case) -> Flop:
    """Of a case whose model is on disk, which ``step_batch`` sees to."""
    workload = workload_of(case)
    question = _rows(workload, 1)[0]["question"]
    prompt = _chat().prompt_ids([{"role": "user", "content": question}])
    return flop_of(workload, AutoConfig.from_pretrained(folder_of(workload.model, case.dtype)), len(prompt))


def _chat() -> ChatFormat:
    return ChatFormat(load_tokenizer(ModelOptions()))


def _model_folder(name: str, dtype: torch.dtype, device: torch.device) -> Path:
    """With the shipped model's tokenizer, whatever the vocabulary of the shape."""
    folder = folder_of(name, dtype)
    if not (folder / "config.json").exists():
        model = model_of(name, dtype, device)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(model.split(model.state_dict().items()))
        write_weights(folder, state, ((name, weight.cpu()) for name, weight in state.items()), dtype)
        save_config(model, folder, dtype)
    if not (folder / "tokenizer_config.json").exists():
        load_tokenizer(ModelOptions()).save_pretrained(folder)
    return folder.resolve()


def _problems(workload: StepWorkload) -> Path:
    path = FOLDER.parent / f"problems-{workload.prompts}-{workload.prompt_tokens}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(workload, workload.prompts * _STEPS)))
    return path.resolve()


def _rows(workload: StepWorkload, count: int) -> list[dict[str, str]]:
    """Problems of the default task, or sums of one length in tokens, which pad nothing."""
    source, numbers = ArithmeticSource("tm5"), random.Random(0)
    problems = [source.problem(index) for index in range(count)]
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    if workload.prompt_tokens:
        around = len(_chat().prompt_ids([{"role": "user", "content": ""}]))
        for row in rows:
            row["question"] = "".join(numbers.choices("0123456789+-", k=workload.prompt_tokens - around))
    return rows


def set_options(config: Config, options: Mapping[str, Any]) -> None:
    """Set options of the configuration by dotted name."""
    for name, value in options.items():
        owner, _, option = name.rpartition(".")
        assert hasattr(getattr(config, owner), option), name
        setattr(getattr(config, owner), option, value)


def step_cases(size: Size) -> list[Case]:
    return _STEP_CASES[size]


def default_job_cases(size: Size) -> list[Case]:
    """Where some groups have no signal, and need no update."""
    return _DEFAULT_JOB[size]


def variant_cases(size: Size) -> list[Case]:
    return _STEP_CASES[size][:1] if size != "gpu" else []


def process_cases(size: Size) -> list[Case]:
    return {"toy": [_TOY], "cpu": [_MEDIUM], "gpu": []}[size]


_BF16 = torch.bfloat16
_PAPER: dict[str, Any] = {"prompts": 8, "samples": 8, "prompt_tokens": 512, "checkpointing": True, "tokens": 32_768}
_TOY = step_case(StepWorkload("toy", 2, 4, 5, 20))
_MEDIUM = step_case(StepWorkload(MEDIUM, 2, 8, 48, 96))
_STEP_CASES: dict[Size, list[Case]] = {
    "toy": [_TOY],
    "cpu": [step_case(StepWorkload(DEFAULT, 32, 8, 32)), _MEDIUM],
    "gpu": [
        step_case(StepWorkload(LARGE, new_tokens=1024, batch=8, **_PAPER), _BF16, rounds=3),
        step_case(StepWorkload(SMALL, new_tokens=2048, batch=8, **_PAPER), _BF16, rounds=3),
        step_case(StepWorkload("Qwen3-4B shape", new_tokens=1024, batch=4, **_PAPER), _BF16, rounds=2),
    ],
}
_DEFAULT_JOB: dict[Size, list[Case]] = {
    "toy": [],
    "cpu": [step_case(StepWorkload(DEFAULT, 32, 8, 32, reward="math"))],
    "gpu": [],
}
