"""Rollouts with what makes them fast on and off, and the kernels of a whole one.

``python -m bench.stages.decode WORK [--cpu]``.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.core.contender import OURS
from bench.core.measure import SETTINGS
from bench.core.op import Size
from bench.core.targets import Row, Target, own
from bench.models import LARGEST, SMALL, TOY
from bench.rollout.cases import RolloutWorkload, rollout_batch, rollout_case
from bench.rollout.rollouts import ROLLOUT, SWITCHED, WITHOUT_GRAPHS, WITHOUT_GROUPS
from bench.stages.kernels import profiled
from bench.stages.notes import Line, Notes

_ALL = (OURS, WITHOUT_GRAPHS, WITHOUT_GROUPS)
_ON_GPU = (
    (RolloutWorkload(LARGEST, 8, 8, 128, 1024), _ALL),
    (RolloutWorkload(LARGEST, 32, 8, 128, 512), (OURS,)),
    (RolloutWorkload(SMALL, 8, 8, 128, 512), (OURS,)),
)
_ON_CPU = ((RolloutWorkload(TOY, 2, 4, 5, 70), _ALL),)
_ROUNDS = 3
_GOALS = {  # on an H200
    ROLLOUT.name: (
        Target("tokens/s, 4 B, 8 x 8", own("rate"), 12_000, only=f"{LARGEST}, 8 x 8 "),
        Target("tokens/s, 4 B, 32 x 8", own("rate"), 28_000, only=f"{LARGEST}, 32 x 8 "),
        Target("tokens/s, 0.6 B, 8 x 8", own("rate"), 35_000, only=SMALL),
    )
}


def main(work: Path, cpu: bool) -> int:
    size: Size = "toy" if cpu else "gpu"
    setting, notes = SETTINGS[size], Notes(work)
    op = replace(ROLLOUT, contenders={**ROLLOUT.contenders, **SWITCHED.contenders})
    rows: list[Row] = []
    for workload, contenders in _ON_CPU if cpu else _ON_GPU:
        case = rollout_case(workload, "fp32" if cpu else "bf16", rounds=_ROUNDS)
        batch = rollout_batch(case, setting.device)
        given = replace(op, inputs=lambda *_, batch=batch: batch)  # which stay for the profiler
        rows += notes.measure(given, case, setting, contenders, own=_ALL)
        if len(contenders) > 1:
            run = profiled(partial(op.contenders[OURS].run, batch), setting.device)
            notes.tell(f"{case.name} {run.seconds:.2f} s under the profiler, all of a generation", run.table)
            notes.add(Line(f"kernels of {workload.new_tokens} steps and the prefill", f"{run.launches:,}"))
    notes.judge(_GOALS, rows)
    return int(any(line.wrong for line in notes.lines()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--cpu" in sys.argv))
