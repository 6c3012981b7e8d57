"""What the rollout benchmarks draw: models, prompts and lengths.

Letters: T longest prompt and response.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from bench.core.op import Case, Precision, Size
from bench.models import DEFAULT, LARGE, LARGEST, SIX_LAYERS, SMALL, TOY, Workload, model_of
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.model.agreement import as_transformers
from thinktwice_fast.model.loading import load_tokenizer
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.records import Request, Sampling
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.prompts import ChatFormat


@dataclass(frozen=True)
class RolloutWorkload(Workload):
    instruction: int = 0  # tokens between a response and its second turn's

    def manner(self) -> str:
        return f", twice with {self.instruction} between" if self.instruction else ""


RolloutCase = Case[RolloutWorkload]


@dataclass(frozen=True)
class RolloutBatch:
    """A workload with its model, as transformers runs it and as the engine does; both have the same weights."""

    workload: RolloutWorkload
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

    def requests(self, **options: Any) -> list[Request]:
        """The prompts as the engine takes them."""
        samples = self.workload.samples
        sampling = Sampling(temperature=self.temperature, max_tokens=self.workload.new_tokens)
        return [
            Request(group, prompt, tuple(range(group * samples, (group + 1) * samples)), sampling, **options)
            for group, prompt in enumerate(self.prompts)
        ]


def rollout_case(workload: RolloutWorkload, precision: Precision = "fp32", **options: Any) -> RolloutCase:
    return Case(workload, precision, memory=False, **options)


def rollout_batch(case: RolloutCase, device: torch.device) -> RolloutBatch:
    ours = model_of(case.shape.model, case.dtype, device).requires_grad_(False)
    theirs = as_transformers(ours, "sdpa").requires_grad_(False)
    # Whatever would end a sequence or narrow its sampling is for the contenders to ask for.
    theirs.generation_config = GenerationConfig(pad_token_id=0)
    return RolloutBatch(case.shape, theirs, ours, _prompts(case.shape, theirs.config.vocab_size))


def _prompts(workload: RolloutWorkload, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    if workload.prompt_tokens:
        shape = (workload.prompts, workload.prompt_tokens)
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
        return tuple(map(tuple, ids.tolist()))
    source, chat = ArithmeticSource("tm5"), ChatFormat(load_tokenizer(ModelOptions()))
    return tuple(tuple(chat.prompt_ids(source.problem(index).messages)) for index in range(workload.prompts))


# Without bf16 arithmetic torch takes two minutes for a prompt that takes ten seconds in fp32: nobody would run it so.
_CPU: Precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
# Each sample's prompt is computed by itself there, in fp32 for minutes.
_SLOW = ("transformers generate", "transformers generate_batch") if _CPU == "fp32" else ()
Cases = Mapping[Size, Sequence[RolloutCase]]
ROLLOUTS: Cases = {
    "toy": [rollout_case(RolloutWorkload(TOY, 3, 2, 5, 20)), rollout_case(RolloutWorkload(TOY, 1, 4, 5, 20), "bf16")],
    "cpu": [
        rollout_case(RolloutWorkload(DEFAULT, 32, 8, 32)),
        rollout_case(RolloutWorkload(SMALL, 1, 8, 16, 128), _CPU, left_out=_SLOW[1:]),
        rollout_case(RolloutWorkload(SMALL, 1, 32, 16, 256), _CPU, left_out=_SLOW, counts=False),
    ],
    "gpu": [
        rollout_case(RolloutWorkload(LARGEST, 16, 16, 64, 512), "bf16"),
        rollout_case(RolloutWorkload(LARGE, 8, 8, 64, 1024), "bf16"),
    ],
}
# Refine-like: one long prompt for the whole group.
SWITCHES: Cases = {
    "toy": [rollout_case(RolloutWorkload(TOY, 2, 4, 5, 70))],
    "cpu": [rollout_case(RolloutWorkload(SIX_LAYERS, 1, 8, 32, 1024))],
    "gpu": [rollout_case(RolloutWorkload(LARGEST, 8, 16, 64, 2048), "bf16")],
}
TWO_TURNS: Cases = {
    "toy": [rollout_case(RolloutWorkload(TOY, 2, 2, 5, 20, instruction=3))],
    "cpu": [rollout_case(RolloutWorkload(SIX_LAYERS, 2, 8, 16, 256, instruction=16))],
    "gpu": [rollout_case(RolloutWorkload(LARGEST, 8, 8, 64, 1024, instruction=32), "bf16")],
}
