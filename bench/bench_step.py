"""Whole training steps: ours against TRL's GRPOTrainer, and ours with other options, phases and processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.measure import OURS, Ceiling, Contender, Op
from bench.peers import needs
from bench.replay import CLOCK, Measured
from bench.rollout_peers import only_on
from bench.shapes import Case
from bench.step_cases import (
    StepBatch,
    default_job_cases,
    flop_for,
    process_cases,
    step_batch,
    step_cases,
    variant_cases,
)
from bench.step_process import Trained, details, judge, memory
from bench.step_truth import limits
from bench.targets import DEFAULT_JOB, STEP, TRL

# The first test of a case measures all of its rounds, of trainers that have to start first.
pytestmark = pytest.mark.timeout(3600)

_SQUARE = {"cpu": (1024, 8), "cuda": (8192, 50)}  # rows, and how many products


def _products(batch: StepBatch) -> Callable[[], None]:
    size, count = _SQUARE[batch.device.type]
    dtype = torch.bfloat16 if batch.device.type == "cuda" else torch.float32
    left, right, out = (torch.ones(size, size, dtype=dtype, device=batch.device) for _ in range(3))

    def products() -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    return products


def _products_flop(case: Case) -> float:
    size, count = _SQUARE["cuda" if case.dtype == torch.bfloat16 else "cpu"]
    return 2.0 * count * size**3


# Of it, a step's share is the MFU, if a prompt is counted once for its group.
MATMUL = Ceiling("torch.mm", _products, _products_flop)


def _op(name: str, **rest: Any) -> Op:
    return Op(
        name=name,
        module=__name__,
        inputs=step_batch,
        judge=judge,
        limits=limits,
        memory=memory,
        details=details,
        **rest,
    )


def _with_rate(name: str, **rest: Any) -> Op:
    return _op(name, work=lambda case: flop_for(case).step, unit="TFLOP/s", ceiling=MATMUL, **rest)


_LIGER = (("use_liger_kernel", True),)
OPS = [
    _with_rate(
        STEP,
        cases=step_cases,
        contenders={
            OURS: Contender(Trained()),
            TRL: Contender(Trained("trl"), needs("trl")),
            "TRL with Liger": Contender(Trained("trl", _LIGER), needs("liger_kernel", "cuda")),
        },
    ),
    _op(
        DEFAULT_JOB,
        cases=default_job_cases,
        contenders={OURS: Contender(Trained()), TRL: Contender(Trained("trl"), needs("trl"))},
    ),
    _op(
        "step variants",
        cases=variant_cases,
        contenders={
            OURS: Contender(Trained()),
            "refine step": Contender(Trained(phase="refine")),
            "without shared prefix": Contender(Trained(options=(("update.shared_prefix", False),))),
            "refine step without shared prefix": Contender(
                Trained(phase="refine", options=(("update.shared_prefix", False),))
            ),
            "rollout.exact": Contender(Trained(options=(("rollout.exact", True),)), only_on("cpu")),
        },
    ),
    _op(
        "step processes",
        cases=process_cases,
        contenders={
            OURS: Contender(Trained(threads=1)),
            "two processes": Contender(Trained(processes=2, threads=1)),
            "one process, two threads": Contender(Trained(threads=2)),
        },
    ),
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_step(measured: Measured, benchmark: Any) -> None:
    measured.replay(benchmark)
