"""`linear_grpo_loss`, forward and backward: loss and gradients from the last hidden state."""

from typing import Any

import pytest

from bench import truth
from bench.inputs import LinearBatch, linear_batch
from bench.measure import OURS, Contender, Op, Outputs
from bench.peers import loss_contenders, loss_outputs
from bench.products import MATMUL, flop
from bench.replay import CLOCK, Measured
from bench.shapes import linear_loss_cases
from thinktwice_kernels import linear_grpo_loss


def ours(batch: LinearBatch) -> Outputs:
    loss, _ = linear_grpo_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.loss.advantages,
        batch.loss.cu_seqlens,
        **batch.loss.options(),
    )
    return loss_outputs(loss, batch)


OPS = [
    Op(
        name="linear_grpo_loss",
        module=__name__,
        cases=linear_loss_cases,
        inputs=linear_batch,
        truth=truth.linear_grpo_loss,
        contenders={OURS: Contender(ours), **loss_contenders()},
        work=flop,
        unit="TFLOP/s",
        ceiling=MATMUL,
    )
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_linear_grpo_loss(benchmark: Any, measured: Measured) -> None:
    measured.replay(benchmark)
