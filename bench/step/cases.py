"""What the step benchmarks train on: models, problems and lengths, and the work that a step cannot do without."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from bench.core.op import Case, Size
from bench.models import DEFAULT, LARGE, LARGEST, MEDIUM, SMALL, TOY, Workload, folder_of, saved_model
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.model.loading import load_tokenizer
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.prompts import ChatFormat

Reward = Literal["mixed", "math"]
_STEPS = 64  # whose problems are all different


@dataclass(frozen=True)
class StepWorkload(Workload):
    """A solve step, and one optimizer step. ``prompt_tokens`` are of sums, all of one length."""

    # mixed: every other sample is right, so that all have an advantage. math: as they are.
    reward: Reward = "mixed"
    checkpointing: bool = False  # of activations
    batch: int = 0  # sequences at a time in TRL's update; 0: all
    microbatch_tokens: int = 16_384  # in ours

    def manner(self) -> str:
        return ", graded as they are" if self.reward == "math" else ""


StepCase = Case[StepWorkload]


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


def flop_of(workload: Workload, config: Any, prompt: int) -> Flop:
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


def step_batch(case: StepCase, device: torch.device) -> StepBatch:
    folder = saved_model(case.shape.model, case.dtype, device)
    return StepBatch(case.shape, device, folder, _problems(case.shape), flop_for(case))


@cache
def flop_for(case: StepCase) -> Flop:
    """Of a case whose model is on disk, which ``step_batch`` sees to."""
    question = _rows(case.shape, 1)[0]["question"]
    prompt = _chat().prompt_ids([{"role": "user", "content": question}])
    return flop_of(case.shape, AutoConfig.from_pretrained(folder_of(case.shape.model, case.dtype)), len(prompt))


def _chat() -> ChatFormat:
    return ChatFormat(load_tokenizer(ModelOptions()))


def _problems(workload: StepWorkload) -> Path:
    path = Path(f"build/bench/problems-{workload.prompts}-{workload.prompt_tokens}.jsonl").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(workload, workload.prompts * _STEPS)))
    return path


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


def _paper(model: str, new_tokens: int, batch: int, rounds: int) -> StepCase:
    workload = StepWorkload(
        model, 8, 8, new_tokens, prompt_tokens=512, checkpointing=True, batch=batch, microbatch_tokens=32_768
    )
    return Case(workload, "bf16", rounds=rounds)


_TOY: StepCase = Case(StepWorkload(TOY, 2, 4, 5, 20))
_MEDIUM: StepCase = Case(StepWorkload(MEDIUM, 2, 8, 48, 96))
Cases = Mapping[Size, Sequence[StepCase]]
STEPS: Cases = {
    "toy": [_TOY],
    "cpu": [Case(StepWorkload(DEFAULT, 32, 8, 32)), _MEDIUM],
    "gpu": [_paper(LARGE, 1024, 8, 3), _paper(SMALL, 2048, 8, 3), _paper(LARGEST, 1024, 4, 2)],
}
# Where some groups have no signal, and need no update.
DEFAULT_JOB: Cases = {"toy": [], "cpu": [Case(StepWorkload(DEFAULT, 32, 8, 32, reward="math"))], "gpu": []}
VARIANTS: Cases = {"toy": [_TOY], "cpu": STEPS["cpu"][:1], "gpu": []}
PROCESSES: Cases = {"toy": [_TOY], "cpu": [_MEDIUM], "gpu": []}
