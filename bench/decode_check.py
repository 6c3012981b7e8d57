"""Rollouts with what makes them fast on and off, and the kernels of a whole one.

``python -m bench.decode_check WORK [--cpu]``.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.bench_rollout import OPS
from bench.kernel_tables import profiled
from bench.measure import OURS, SETTINGS
from bench.rollout_cases import RolloutBatch, Workload, rollout_batch, rollout_case
from bench.shapes import SMALL, Case, Size
from bench.stage_notes import Line, Notes, Row
from bench.targets import DECODE_GOALS, ROLLOUT, SWITCHES, WITHOUT_GRAPHS, WITHOUT_GROUPS

_ALL = (OURS, WITHOUT_GRAPHS, WITHOUT_GROUPS)
_ON_GPU = (
    (Workload("Qwen3-4B shape", 8, 8, 128, 1024), _ALL),
    (Workload("Qwen3-4B shape", 32, 8, 128, 512), (OURS,)),
    (Workload(SMALL, 8, 8, 128, 512), (OURS,)),
)
_ON_CPU = ((Workload("toy", 2, 4, 5, 70), _ALL),)
_ROUNDS = 3


def main(work: Path, cpu: bool) -> int:
    size: Size = "toy" if cpu else "gpu"
    setting, notes = SETTINGS[size], Notes(work)
    ops = {op.name: op for op in OPS}
    op = replace(ops[ROLLOUT], contenders={**ops[ROLLOUT].contenders, **ops[SWITCHES].contenders})
    rows: list[Row] = []
    for workload, contenders in _ON_CPU if cpu else _ON_GPU:
        case = rollout_case(workload, torch.float32 if cpu else torch.bfloat16, rounds=_ROUNDS)
        batch = rollout_batch(case, setting.device)
        rows += notes.measure(replace(op, inputs=_given(batch)), case, setting, contenders, own=_ALL)
        if len(contenders) > 1:
            run = profiled(partial(op.contenders[OURS].run, batch), setting.device)
            notes.tell(f"{case.name} {run.seconds:.2f} s under the profiler, all of a generation", run.table)
            notes.add(Line(f"kernels of {workload.new_tokens} steps and the prefill", f"{run.launches:,}"))
    notes.judge(DECODE_GOALS, rows)
    return int(any(line.wrong for line in notes.lines()))


def _given(batch: RolloutBatch) -> Callable[[Case, torch.device], RolloutBatch]:
    """Inputs that are there already, and stay for the profiler."""
    return lambda case, device: batch


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--cpu" in sys.argv))
