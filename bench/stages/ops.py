"""The loss head and log-probabilities against their peers: ``python -m bench.stages.ops WORK SECONDS [--cpu]``.

The most important cases come first, and no other is begun when the seconds are over. Peers that compile come last.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.core.contender import OURS, PLAIN
from bench.core.measure import SETTINGS
from bench.core.op import Size
from bench.core.targets import Row, Target, fastest_peer, own
from bench.ops.linear_loss import PRODUCT_BY_CUBLAS, PRODUCT_IN_TRITON
from bench.registry import op_named
from bench.stages.notes import Line, Notes

_LINEAR, _LOGPROBS = "linear_grpo_loss", "token_logprobs"
# Op, tokens, contenders.
_ON_GPU = (
    (
        _LINEAR,
        4096,
        (
            OURS,
            PRODUCT_IN_TRITON,
            PRODUCT_BY_CUBLAS,
            PLAIN,
            "liger triton loss",
            "liger scaled CE + loss",
            "trl chunked + loss",
        ),
    ),
    (_LOGPROBS, 8192, (OURS, PLAIN, "trl")),
    (_LOGPROBS, 1024, (OURS, PLAIN, "trl")),
    (_LINEAR, 32768, (OURS, PLAIN, "liger triton loss", "trl chunked + loss")),
    (_LINEAR, 4096, (OURS, PLAIN, "torch.compile", "cce + loss")),
)
_ON_CPU = ((_LINEAR, 64, (OURS, PLAIN)), (_LOGPROBS, 64, (OURS, PLAIN)))
_QWEN = "Qwen3-4B V=151936 H=2560 T="
_GOALS = {  # on an H200
    _LINEAR: (
        Target("ms, 4096 rows", own("median", 1e3), 13.0, at_most=True, only=f"{_QWEN}4096"),
        Target("GB beyond the inputs, 4096 rows", own("memory", 1e-9), 2.1, at_most=True, only=f"{_QWEN}4096"),
        Target("times as fast as the fastest peer", fastest_peer(), 1),
    ),
    _LOGPROBS: (
        Target("ms, 8192 rows", own("median", 1e3), 1.6, at_most=True, only=f"{_QWEN}8192"),
        Target("ms, 1024 rows", own("median", 1e3), 0.5, at_most=True, only=f"{_QWEN}1024"),
    ),
}


def main(work: Path, seconds: float, cpu: bool) -> int:
    deadline = time.monotonic() + seconds
    size: Size = "toy" if cpu else "gpu"
    notes = Notes(work)
    rows: list[Row] = []
    for name, tokens, contenders in _ON_CPU if cpu else _ON_GPU:
        op = op_named(name)
        case = next(case for case in op.cases[size] if case.shape.tokens == tokens)  # the first of the suite's
        if time.monotonic() > deadline:
            notes.add(Line(f"{name}, {case.name}", "no time was left"))
            continue
        # Memory on the CPU would take a process for each contender.
        rows += notes.measure(op, replace(case, memory=not cpu), SETTINGS[size], contenders)
    notes.judge(_GOALS, rows)
    return int(any(line.wrong for line in notes.lines()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), "--cpu" in sys.argv))
