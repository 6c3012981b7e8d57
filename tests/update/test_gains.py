"""Everything that saves work, at once, gives the gradient of the formula on a padded batch."""

from dataclasses import replace
from typing import Any

import pytest

from tests.small_models import FAMILIES, random_model
from tests.update.cases import config, formula, gradients, padded_logps, rollouts, updater, weights
from thinktwice_fast.records import Rollout

pytestmark = pytest.mark.usefixtures("one_process")


def grouped() -> list[Rollout]:
    """Six groups of four with one prompt each; two have no signal, and one member of another."""
    made: list[Rollout] = []
    for rollout in rollouts(24, seed=11, longest=40):
        prompt = made[-1].prompt if rollout.sample_id % 4 else rollout.prompt
        made.append(replace(rollout, prompt=prompt, advantage=0.0 if rollout.group in (1, 4) else rollout.advantage))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_every_gain_on_equal_those_with_every_gain_off(family: str) -> None:
    """On: shared prompts, samples without signal left out, the fused head, micro-batches, no padding, the kernels.

    Off: transformers' own attention on padded rows, all logits, the loss written out. Both in float32.
    """
    batch = grouped()
    made = updater(config(update__microbatch_tokens=120), family)
    rows: list[int] = []
    embedding: Any = made.models.policy.model.embed_tokens
    embedding.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].numel()))
    before = weights(made.models.policy)
    metrics = made.policy_update([batch])
    gradient = before - weights(made.models.policy)

    assert len(rows) > 2 and max(rows) <= 120
    signal = [rollout for rollout in batch if rollout.advantage]
    assert sum(rows) < sum(len(r.prompt) + len(r.response) for r in signal)
    assert metrics["tokens"] == sum(len(r.response) for r in batch)

    model = random_model(family)
    logps = padded_logps(model, batch)
    formula(logps, logps.detach(), batch).backward()
    plain = gradients(model)
    assert (gradient - plain).norm() < 1e-5 * plain.norm()
