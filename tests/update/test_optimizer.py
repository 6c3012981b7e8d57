"""AdamW and its schedules."""

from typing import Any

import pytest
import torch

from thinktwice_fast.config import UpdateOptions
from thinktwice_fast.update.optimizer import build_optimizer


def rates(steps: int, total: int = 10, **options: Any) -> list[float]:
    module = torch.nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(module, UpdateOptions(learning_rate=1.0, **options), total)
    found = []
    for _ in range(steps):
        module(torch.ones(2)).sum().backward()
        optimizer.step()
        found.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step()
    return found


def test_warm_up_rises_in_equal_steps_from_above_zero_and_stays() -> None:
    assert rates(8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])
    assert rates(3, warmup_steps=0) == [1.0] * 3


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_reaches_zero_after_the_run_or_the_given_steps(shape: str) -> None:
    for options in ({"total": 10}, {"total": 99, "lr_decay_steps": 10}):
        got = rates(11, warmup_steps=0, lr_schedule=shape, **options)
        assert got[0] == 1.0 and got[5] == pytest.approx(0.5)
        assert 0 < got[9] < 0.15 and got[10] == pytest.approx(0, abs=1e-9)
        assert got == sorted(got, reverse=True)


def test_options_reach_adamw_and_frozen_weights_stay_out() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    options = UpdateOptions(learning_rate=3e-4, adam_betas=(0.8, 0.95), weight_decay=0.01, warmup_steps=0)
    optimizer, _ = build_optimizer(module, options, 10)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 0.01)
    assert [id(parameter) for parameter in group["params"]] == [id(module.weight)]
    assert isinstance(optimizer, torch.optim.AdamW)
