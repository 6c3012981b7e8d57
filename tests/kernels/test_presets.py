"""Each preset against its formula, written out for one batch of two groups."""

import math
from typing import Any

import pytest
import torch

from tests.kernels.formulas import slow_advantages
from thinktwice_kernels import PRESETS, group_advantages, grpo_loss

LENGTHS = [3, 1, 2, 4]
REWARDS, GROUPS = [1.0, 0.0, 0.5, 1.0], [8, 8, 3, 3]
RATIOS = [1.0, 1.25, 3.5, 0.7, 1.1, 6.0, 0.79, 1.22, 0.5, 1.3]
LOGPS = [-0.5, -1.0, -2.0, -0.1, -3.0, -1.5, -0.7, -0.2, -4.0, -1.1]
REF_GAP = 0.3  # ref - logp of every token
LIMIT = 6
GUIDED = 4  # the token that ThinkTuning's batch marks
ROWS = [s for s, length in enumerate(LENGTHS) for _ in range(length)]


def clip(low: float, high: float, ceiling: float = math.inf) -> Any:
    def token(a: float, ratio: float, t: int) -> float:
        return min(-min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a), ceiling * abs(a) if a < 0 else math.inf)

    return token


def sapo(a: float, ratio: float, t: int) -> float:
    tau = 1.0 if a > 0 else 1.05
    return -a * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))


def cispo(a: float, ratio: float, t: int) -> float:
    return -min(ratio, 5.0) * a * LOGPS[t]


def grpo_with_kl(a: float, ratio: float, t: int) -> float:
    return clip(0.2, 0.2)(a, ratio, t) + 0.04 * (math.exp(REF_GAP) - REF_GAP - 1)


def thinktuning(a: float, ratio: float, t: int) -> float:
    if t != GUIDED:
        return clip(0.2, 0.2, 3.0)(a, ratio, t)
    p = math.exp(LOGPS[t])
    return -a * p / (p + max(-1e-3, min(1e-3, 2.5e-4 * a)))


def token_mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def sequence_mean(losses: list[float]) -> float:
    return sum(x / LENGTHS[s] for x, s in zip(losses, ROWS, strict=True)) / len(LENGTHS)


def fixed_length(losses: list[float]) -> float:
    return sum(losses) / (len(LENGTHS) * LIMIT)


EXPECTED: dict[str, tuple[str, Any, Any]] = {
    "grpo": ("group", grpo_with_kl, sequence_mean),
    "dr_grpo": ("none", clip(0.2, 0.2), fixed_length),
    "bnpo": ("group", clip(0.2, 0.2), token_mean),
    "dapo": ("group", clip(0.2, 0.28), token_mean),
    "cispo": ("group", cispo, token_mean),
    "gspo": ("group", clip(3e-4, 4e-4), sequence_mean),
    "sapo": ("group", sapo, sequence_mean),
    "thinktwice": ("none", clip(0.2, 0.28, 3.0), token_mean),
    "thinktuning": ("group", thinktuning, token_mean),
}


def test_every_preset_has_a_formula_here() -> None:
    assert EXPECTED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_formula(name: str) -> None:
    scale, token, aggregate = EXPECTED[name]
    preset = PRESETS[name]
    advantages = group_advantages(
        torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS), **preset["group_advantages"]
    )
    want_advantages = slow_advantages(REWARDS, GROUPS, scale, 1e-6)
    assert advantages.tolist() == pytest.approx(want_advantages)

    logps = torch.tensor(LOGPS, dtype=torch.float64)
    extra: dict[str, Any] = {"max_response_length": LIMIT} if name == "dr_grpo" else {}
    if name == "grpo":
        extra["ref_logps"] = logps + REF_GAP
    if name == "thinktuning":
        extra["guide_mask"] = torch.arange(len(LOGPS)) == GUIDED
    loss, _ = grpo_loss(
        logps,
        advantages,
        torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        old_logps=logps - torch.tensor(RATIOS, dtype=torch.float64).log(),
        **preset["grpo_loss"],
        **extra,
    )

    ratios = RATIOS
    if name == "gspo":
        ratios = [
            math.prod(r for r, row in zip(RATIOS, ROWS, strict=True) if row == s) ** (1 / LENGTHS[s]) for s in ROWS
        ]
    losses = [token(want_advantages[s], ratios[t], t) for t, s in enumerate(ROWS)]
    assert loss.item() == pytest.approx(aggregate(losses), rel=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains(name: str) -> None:
    """One step down the gradient makes the better answer of a group likelier than the worse one."""
    logits = torch.zeros(2, requires_grad=True)
    logps = torch.log_softmax(logits, 0)
    extra: dict[str, Any] = {"max_response_length": 1} if name == "dr_grpo" else {}
    if name == "grpo":
        extra["ref_logps"] = logps.detach()
    advantages = group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), **PRESETS[name]["group_advantages"])
    loss, _ = grpo_loss(logps, advantages, torch.tensor([0, 1, 2]), **PRESETS[name]["grpo_loss"], **extra)
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert gradient[0] < 0 < gradient[1]
