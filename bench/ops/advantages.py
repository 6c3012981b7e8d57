"""`group_advantages`: groups of any size and order, against plain torch that knows its groups to lie in rows.

Letters: S samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.core.contender import OURS, PLAIN, Contender, Outputs, compiled
from bench.core.op import Op
from bench.ops.inputs import RowsCase, normals, number_cases
from thinktwice_kernels import group_advantages, reference

_GROUP_SIZE = 8


@dataclass(frozen=True)
class RewardsBatch:
    rewards: Tensor  # [S]
    group_ids: Tensor  # [S]


def rewards_batch(case: RowsCase, device: torch.device) -> RewardsBatch:
    """As many rewards as the case has tokens."""
    normal, _ = normals(device)
    group_ids = torch.arange(case.shape.tokens, device=device) // _GROUP_SIZE
    return RewardsBatch((normal(case.shape.tokens) > 0).float(), group_ids)


def of_groups(op: Callable[..., Tensor]) -> Callable[[RewardsBatch], Outputs]:
    return lambda batch: {"advantages": op(batch.rewards, batch.group_ids, scale_rewards="group")}


def of_rows(rewards: Tensor) -> Tensor:
    rows = rewards.view(-1, _GROUP_SIZE)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)).flatten()


def truth(batch: RewardsBatch) -> Outputs:
    return of_groups(reference.group_advantages)(RewardsBatch(batch.rewards.double(), batch.group_ids))


OPS = [
    Op(
        name="group_advantages",
        cases=number_cases(),
        inputs=rewards_batch,
        truth=truth,
        contenders={
            OURS: Contender(of_groups(group_advantages)),
            PLAIN: Contender(lambda batch: {"advantages": of_rows(batch.rewards)}),
            "torch.compile": Contender(lambda batch: {"advantages": compiled(of_rows)(batch.rewards)}, compiled=True),
            "torch, any groups": Contender(of_groups(reference.group_advantages)),
        },
        short=True,
    )
]
