"""`group_advantages`: groups of any size and order, against plain torch that knows its groups to lie in rows."""

from typing import Any

import pytest
from torch import Tensor

from bench import truth
from bench.inputs import RewardsBatch, rewards_batch
from bench.measure import OURS, PLAIN, Contender, Op, Outputs
from bench.peers import compiled
from bench.replay import CLOCK, Measured
from bench.shapes import token_cases
from thinktwice_kernels import group_advantages, reference


def ours(batch: RewardsBatch) -> Outputs:
    return {"advantages": group_advantages(batch.rewards, batch.group_ids, scale_rewards="group")}


def definition(batch: RewardsBatch) -> Outputs:
    return {"advantages": reference.group_advantages(batch.rewards, batch.group_ids, scale_rewards="group")}


def _of_rows(rewards: Tensor, group_size: int) -> Tensor:
    rows = rewards.view(-1, group_size)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)).flatten()


def plain(batch: RewardsBatch) -> Outputs:
    return {"advantages": _of_rows(batch.rewards, batch.group_size)}


def plain_compiled(batch: RewardsBatch) -> Outputs:
    return {"advantages": compiled(_of_rows)(batch.rewards, batch.group_size)}


OPS = [
    Op(
        name="group_advantages",
        module=__name__,
        cases=token_cases,
        inputs=rewards_batch,
        truth=truth.group_advantages,
        contenders={
            OURS: Contender(ours),
            PLAIN: Contender(plain),
            "torch.compile": Contender(plain_compiled, compiled=True),
            "torch, any groups": Contender(definition),
        },
        short=True,
    )
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_group_advantages(benchmark: Any, measured: Measured) -> None:
    measured.replay(benchmark)
