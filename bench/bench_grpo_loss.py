"""`grpo_loss`, forward and backward, from log-probabilities. It gives metrics too, which plain torch leaves out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import truth
from bench.inputs import TokensBatch, tokens_batch
from bench.measure import OURS, PLAIN, Contender, Op, Outputs
from bench.peers import compiled, plain_loss
from bench.replay import CLOCK, Measured
from bench.shapes import token_cases
from thinktwice_kernels import grpo_loss, reference


def _outputs(loss: Tensor, batch: TokensBatch) -> Outputs:
    return {"loss": loss.detach(), "d_logps": torch.autograd.grad(loss, batch.logps)[0]}


def ours(batch: TokensBatch) -> Outputs:
    loss, _ = grpo_loss(batch.logps, batch.loss.advantages, batch.loss.cu_seqlens, **batch.loss.options())
    return _outputs(loss, batch)


def definition(batch: TokensBatch) -> Outputs:
    """With the metrics."""
    loss, _ = reference.grpo_loss(batch.logps, batch.loss.advantages, batch.loss.cu_seqlens, **batch.loss.options())
    return _outputs(loss, batch)


def plain(batch: TokensBatch) -> Outputs:
    return _outputs(plain_loss(batch.logps, batch.loss), batch)


def plain_compiled(batch: TokensBatch) -> Outputs:
    return _outputs(compiled(plain_loss)(batch.logps, batch.loss), batch)


OPS = [
    Op(
        name="grpo_loss",
        module=__name__,
        cases=token_cases,
        inputs=tokens_batch,
        truth=truth.grpo_loss,
        contenders={
            OURS: Contender(ours),
            PLAIN: Contender(plain),
            "torch.compile": Contender(plain_compiled, compiled=True),
            "torch with metrics": Contender(definition),
        },
        short=True,
    )
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_grpo_loss(benchmark: Any, measured: Measured) -> None:
    measured.replay(benchmark)
