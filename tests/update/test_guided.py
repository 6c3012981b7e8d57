"""The update on rollouts that a teacher wrote into."""

from typing import Any

import pytest
import torch

from tests.small_models import random_model
from tests.update.cases import (
    assert_same_step,
    change,
    config,
    descend,
    guide,
    padded_logps,
    rollouts,
    shaped_formula,
    updater,
)
from thinktwice_fast.records import Rollout

pytestmark = pytest.mark.usefixtures("one_process")

# The small model's probabilities lie around 0.002, on both sides of this.
AROUND = {"thinktuning__shaping_min_probability": 0.002, "thinktuning__shaping_clamp": 2e-4}


def guided_minibatches(count: int) -> list[list[Rollout]]:
    """With prompts that four samples share each, log-probabilities near the policy's, and a teacher in every third."""
    minibatches = [rollouts(8, seed) for seed in range(count)]
    for minibatch in minibatches:
        for number, rollout in enumerate(minibatch):
            rollout.prompt = minibatch[number - number % 4].prompt
            with torch.no_grad():
                own = padded_logps(random_model("qwen3"), [rollout])
            rollout.logps = (own + 0.02 * torch.arange(len(own)).cos()).tolist()
        guide(minibatch)
    return minibatches


@pytest.mark.parametrize("rows", [{}, {"update__microbatch_tokens": 50}, {"update__shared_prefix": False}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"thinktuning__guide_fallback": "clip"},
        {"thinktuning__guide_fallback": "clip", "update__old_logps": "rollout"},
        {"thinktuning__guide_fallback": "clip", "rollout__exact": True},
        {"thinktuning__released_code_compat": True},
    ],
    ids=str,
)
def test_guided_rollouts_follow_the_formula(options: dict[str, Any], rows: dict[str, Any]) -> None:
    minibatches = guided_minibatches(2)
    made = config(**options, **rows, **AROUND)
    got, metrics = change(updater(made, learning_rate=2.0), minibatches)
    everything = [rollout for minibatch in minibatches for rollout in minibatch]
    with torch.no_grad():
        old = padded_logps(random_model("qwen3"), everything)
    if "update__old_logps" in options or "rollout__exact" in options:
        noted = torch.tensor([logp for rollout in everything for logp in rollout.logps])
        wrote = torch.tensor([flag for r in everything for flag in r.guide or [False] * len(r.response)])
        old = torch.where(wrote, old, noted)
    sizes = [sum(len(rollout.response) for rollout in minibatch) for minibatch in minibatches]

    def loss_of(logps: torch.Tensor, number: int) -> torch.Tensor:
        return shaped_formula(logps, old.split(sizes)[number], minibatches[number], made.thinktuning).mean()

    assert_same_step(got, descend(random_model("qwen3"), minibatches, 2.0, loss_of))
    assert 0 < metrics["guided_share"] < 1 and 0 < metrics["masked_share"] < 1
    assert metrics["mismatch"] < 0.03, "a token that nobody sampled has no log-probability of a rollout"


def test_metrics_of_guided_tokens() -> None:
    (minibatch,) = guided_minibatches(1)
    longest = max(minibatch[::3], key=lambda rollout: len(rollout.response))
    for rollout in minibatch[::3]:
        rollout.advantage = -1.0 if rollout is longest else 0.5
    _, metrics = change(updater(config(**AROUND)), [minibatch])
    with torch.no_grad():
        probabilities = padded_logps(random_model("qwen3"), minibatch).exp()
    tokens = zip(
        probabilities.tolist(),
        [r.advantage for r in minibatch for _ in r.response],
        [flag for r in minibatch for flag in r.guide or [False] * len(r.response)],
        strict=True,
    )
    computed = [(p, a, wrote) for p, a, wrote in tokens if a]
    guided = [(p, a) for p, a, wrote in computed if wrote]
    weights = [(a, p / (p + max(-2e-4, min(2e-4, 2.5e-4 * a)))) for p, a in guided if a > 0 or p >= 0.002]
    for sign, name in ((1, "pos"), (-1, "neg")):
        own = [w for a, w in weights if a * sign > 0]
        assert metrics[f"shaping_weight_{name}"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert metrics["guided_share"] == pytest.approx(len(guided) / len(computed))
    assert metrics["masked_share"] == pytest.approx(1 - len(weights) / len(guided))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4) and metrics["approx_kl"] < 1e-6
    assert metrics["tokens"] == sum(len(rollout.response) for rollout in minibatch)


def test_a_weight_that_no_token_has_is_no_metric() -> None:
    (minibatch,) = guided_minibatches(1)
    for rollout in minibatch:
        rollout.advantage = abs(rollout.advantage)
    metrics = change(updater(config()), [minibatch])[1]
    assert "shaping_weight_pos" in metrics and "shaping_weight_neg" not in metrics


@pytest.mark.parametrize("options", [{}, {"thinktuning__guide_fallback": "clip"}, {"rollout__exact": True}], ids=str)
def test_guide_masks_without_a_guided_token_change_no_bit(options: dict[str, Any]) -> None:
    minibatches = [rollouts(8, seed) for seed in range(2)]
    want, before = change(updater(config(**options), learning_rate=2.0), minibatches)
    for rollout in (r for minibatch in minibatches for r in minibatch):
        rollout.guide = [False] * len(rollout.response)
    got, metrics = change(updater(config(**options), learning_rate=2.0), minibatches)
    assert torch.equal(got, want)
    assert metrics | {"seconds_update": 0} == before | {"seconds_update": 0}


def test_released_code_has_no_dual_clip_where_nothing_is_guided() -> None:
    minibatches = [rollouts(8, seed) for seed in range(2)]
    compat = {"thinktuning__released_code_compat": True, "thinktuning__guide_fallback": "clip"}
    got, _ = change(updater(config(**compat), learning_rate=20.0), minibatches)
    assert torch.equal(got, change(updater(config(loss__dual_clip=None), learning_rate=20.0), minibatches)[0])
    assert not torch.equal(got, change(updater(config(), learning_rate=20.0), minibatches)[0])
