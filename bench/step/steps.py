"""Whole training steps: ours against TRL's GRPOTrainer, and ours with other options, phases and processes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.core.ceilings import square_products
from bench.core.contender import OURS, Contender, needs, only_on
from bench.core.op import Ceiling, Op
from bench.core.targets import Row, Target, memory_share, time_share, times_slower
from bench.models import DEFAULT, LARGE, MEDIUM
from bench.step.cases import DEFAULT_JOB, PROCESSES, STEPS, VARIANTS, StepBatch, StepCase, flop_for, step_batch
from bench.step.process import UPDATE_RATE, Trained, details, judge, memory
from bench.step.truth import limits

TRL = "TRL"
_SQUARE = {torch.float32: (1024, 8), torch.bfloat16: (8192, 50)}  # rows, and how many products; on a CPU, on a GPU


def _products(batch: StepBatch) -> Callable[[], None]:
    dtype = torch.bfloat16 if batch.device.type == "cuda" else torch.float32
    size, count = _SQUARE[dtype]
    return square_products(2.0 * count * size**3, size, dtype, batch.device)


def _products_flop(case: StepCase) -> float:
    size, count = _SQUARE[case.dtype]
    return 2.0 * count * size**3


def _update_mfu(rows: Mapping[str, Row]) -> float | None:
    ours = rows[OURS]
    if not ours["details"] or not ours["of_ceiling"]:
        return None
    return ours["details"][UPDATE_RATE] * ours["of_ceiling"] / ours["rate"]


def _op(name: str, **rest: Any) -> Op:
    return Op(name=name, inputs=step_batch, judge=judge, limits=limits, memory=memory, details=details, **rest)


_REFINE, _WHOLE = "refine step", (("update.shared_prefix", False),)
STEP = _op(
    "step",
    cases=STEPS,
    contenders={
        OURS: Contender(Trained()),
        TRL: Contender(Trained("trl"), needs("trl")),
        "TRL with Liger": Contender(Trained("trl", (("use_liger_kernel", True),)), needs("liger_kernel", "cuda")),
    },
    work=lambda case: flop_for(case).step,
    unit="TFLOP/s",
    # Of it, a step's share is the MFU, if a prompt is counted once for its group.
    ceiling=Ceiling("torch.mm", _products, _products_flop),
    targets={
        "cpu": [
            Target("share of TRL's time, default model", time_share(TRL), 0.4, at_most=True, only=DEFAULT),
            Target("share of TRL's time, 100 M", time_share(TRL), 1 / 3, at_most=True, only=MEDIUM),
            Target("share of TRL's memory, 100 M", memory_share(TRL), 1, at_most=True, only=MEDIUM),
        ],
        "cuda": [
            Target("times as fast as TRL", times_slower(TRL), 4, only=LARGE),
            Target("MFU of the update", _update_mfu, 0.4),
        ],
    },
)
OPS = [
    STEP,
    _op(
        "step of the default job",
        cases=DEFAULT_JOB,
        contenders={OURS: Contender(Trained()), TRL: Contender(Trained("trl"), needs("trl"))},
        targets={"cpu": [Target("share of TRL's time, graded as they are", time_share(TRL), 0.4, at_most=True)]},
    ),
    _op(
        "step variants",
        cases=VARIANTS,
        contenders={
            OURS: Contender(Trained()),
            _REFINE: Contender(Trained(phase="refine")),
            "without shared prefix": Contender(Trained(options=_WHOLE)),
            f"{_REFINE} without shared prefix": Contender(Trained(phase="refine", options=_WHOLE)),
            "rollout.exact": Contender(Trained(options=(("rollout.exact", True),)), only_on("cpu")),
        },
    ),
    _op(
        "step processes",
        cases=PROCESSES,
        contenders={
            OURS: Contender(Trained(threads=1)),
            "two processes": Contender(Trained(processes=2, threads=1)),
            "one process, two threads": Contender(Trained(threads=2)),
        },
    ),
]
