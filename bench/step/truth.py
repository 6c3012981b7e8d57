"""Whether a step was the one that was asked for, by plain torch in float32 over transformers' own forward pass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.models import Judged, true_loss
from bench.step.desk import BETAS, CLIP, LEARNING_RATE, Ask

Weights = Mapping[str, Tensor]

# Shares. Adam's first step is the gradient's sign times the learning rate, so where a gradient is all rounding, the
# weights differ by twice that: 5 % is few of them. A step of another gradient would be off by more than 100 %.
_LIMITS = {
    torch.float32: {"completions": 0.0, "tokens": 0.0, "loss": 1e-5, "grad_norm": 1e-4, "weights": 0.05},
    torch.bfloat16: {"completions": 0.0, "tokens": 0.0, "loss": 1e-2, "grad_norm": 0.05, "weights": 0.6},
}


@dataclass(frozen=True)
class Sample:
    """What was drawn for a prompt, with its reward."""

    group: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    reward: float


@dataclass(frozen=True)
class Done:
    """What a trainer says of its step, and what it made of the weights."""

    samples: Sequence[Sample]  # those of a group together
    loss: float
    grad_norm: float  # before clipping
    before: Weights
    after: Weights


def limits(dtype: torch.dtype) -> Mapping[str, float]:
    return _LIMITS[dtype]


def errors(ask: Ask, done: Done) -> dict[str, float]:
    """How far off the step is, by what ``limits`` names; 0 is right, inf what cannot be compared.

    completions, tokens: share that is missing, or that nobody asked for.
    loss: difference, in mean absolute advantages. grad_norm: relative difference.
    weights: the step that they made less the one of AdamW, over the latter. 1: they did not move.
    """
    workload = ask.workload
    found = {"completions": abs(len(done.samples) - workload.sequences) / workload.sequences}
    lengths = [len(sample.response) for sample in done.samples]
    found["tokens"] = abs(sum(lengths) / workload.tokens - 1) if lengths else math.inf
    if any(found.values()):
        return found
    model: Any = AutoModelForCausalLM.from_pretrained(ask.folder, dtype=torch.float32, attn_implementation="sdpa")
    device = torch.device("cuda", 0) if ask.cuda else torch.device("cpu")
    model = model.to(device).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(done.before[name])
    groups = _with_advantages(done.samples)
    loss = true_loss(model, groups)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    torch.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0).step()
    scale = sum(abs(sample.advantage) for group in groups for sample in group) / len(done.samples)
    return found | {
        "loss": abs(done.loss - loss) / scale,
        "grad_norm": abs(done.grad_norm - norm) / norm,
        "weights": _step_error(parameters, done),
    }


def _with_advantages(samples: Sequence[Sample]) -> list[list[Judged]]:
    """By group; the advantage is the reward less the group's mean."""
    found = []
    for _, members in groupby(samples, key=lambda sample: sample.group):
        group = list(members)
        mean = sum(sample.reward for sample in group) / len(group)
        found.append([Judged(sample.prompt, sample.response, sample.reward - mean) for sample in group])
    return found


@torch.no_grad()
def _step_error(stepped: Weights, done: Done) -> float:
    difference = wanted = 0.0
    for name, value in stepped.items():
        right = value.cpu() - done.before[name].cpu()
        difference += float((done.after[name].cpu() - done.before[name].cpu() - right).double().square().sum())
        wanted += float(right.double().square().sum())
    return math.sqrt(difference / wanted)
