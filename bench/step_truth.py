"""Whether a trainer's step was the one it was asked for, by plain torch in float32 over transformers' own forward pass.

Letters: G samples of a prompt, n tokens of a response, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.step_process import BETAS, CLIP, LEARNING_RATE, Ask
from thinktwice_kernels.reference import grpo_loss

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
    found = {"completions": abs(len(done.samples) - ask.sequences) / ask.sequences}
    lengths = [len(sample.response) for sample in done.samples]
    found["tokens"] = abs(sum(lengths) / (ask.sequences * ask.new_tokens) - 1) if lengths else math.inf
    if any(found.values()):
        return found
    model: Any = AutoModelForCausalLM.from_pretrained(ask.folder, dtype=torch.float32, attn_implementation="sdpa")
    device = torch.device("cuda", 0) if ask.cuda else torch.device("cpu")
    model = model.to(device).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(done.before[name])
    loss, norm = _loss_and_gradient(model, done.samples)
    _adamw(parameters)
    scale = sum(abs(advantage) for _, advantage in _with_advantage(done.samples)) / len(done.samples)
    return found | {
        "loss": abs(done.loss - loss) / scale,
        "grad_norm": abs(done.grad_norm - norm) / norm,
        "weights": _step_error(parameters, done),
    }


def _with_advantage(samples: Sequence[Sample]) -> list[tuple[Sample, float]]:
    """Reward less the mean of the group."""
    found = []
    for _, members in groupby(samples, key=lambda sample: sample.group):
        group = list(members)
        mean = sum(sample.reward for sample in group) / len(group)
        found += [(sample, sample.reward - mean) for sample in group]
    return found


def _loss_and_gradient(model: Any, samples: Sequence[Sample]) -> tuple[float, float]:
    """Token mean of the clipped objective at ratio 1, group by group; the gradient stays with the parameters."""
    tokens = sum(len(sample.response) for sample in samples)
    total = 0.0
    for _, members in groupby(_with_advantage(samples), key=lambda pair: pair[0].group):
        group, advantages = zip(*members, strict=True)
        logps = _logps(model, group)
        ends = torch.arange(len(group) + 1, dtype=torch.int32) * len(group[0].response)
        loss, _ = grpo_loss(
            logps, torch.tensor(advantages, device=logps.device), ends, normalizer=tokens,
            epsilon_low=0.2, epsilon_high=0.28,
        )  # fmt: skip
        loss.backward()
        total += float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    return total, float(norm)


def _logps(model: Any, group: Sequence[Sample]) -> Tensor:  # [G * n]
    """All of one prompt and one length."""
    ids = torch.tensor([[*sample.prompt, *sample.response] for sample in group], device=model.device)
    length = len(group[0].response)
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=length).logits  # [G, n, V]
    return logits.log_softmax(2).gather(2, ids[:, -length:, None]).flatten()


def _adamw(parameters: Weights) -> None:
    torch.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0).step()


@torch.no_grad()
def _step_error(stepped: Weights, done: Done) -> float:
    difference = wanted = 0.0
    for name, value in stepped.items():
        right = value.cpu() - done.before[name].cpu()
        difference += float((done.after[name].cpu() - done.before[name].cpu() - right).double().square().sum())
        wanted += float(right.double().square().sum())
    return math.sqrt(difference / wanted)
