"""`linear_logprobs`, forward and backward: log-probabilities from the last hidden state."""

from typing import Any

import pytest

from bench import truth
from bench.inputs import LinearBatch, linear_batch
from bench.measure import OURS, Contender, Op, Outputs
from bench.peers import head_gradients, logps_contenders
from bench.products import MATMUL, flop
from bench.replay import CLOCK, Measured
from bench.shapes import logprobs_cases
from thinktwice_kernels import linear_logprobs


def ours(batch: LinearBatch) -> Outputs:
    logps = linear_logprobs(batch.hidden, batch.weight, batch.targets)
    return {"logps": logps.detach(), **head_gradients(logps, batch, batch.d_logps)}


OPS = [
    Op(
        name="linear_logprobs",
        module=__name__,
        cases=logprobs_cases,
        inputs=linear_batch,
        truth=truth.linear_logprobs,
        contenders={OURS: Contender(ours), **logps_contenders()},
        work=flop,  # the floor of forward and backward; all of these compute the logits a second time
        unit="TFLOP/s",
        ceiling=MATMUL,
    )
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_linear_logprobs(benchmark: Any, measured: Measured) -> None:
    measured.replay(benchmark)
