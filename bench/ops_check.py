"""The loss head and log-probabilities against their peers: ``python -m bench.ops_check WORK SECONDS [--cpu]``.

The most important cases come first, and no other is begun when the seconds are over. Peers that compile come last.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.bench_linear_loss import OPS as LINEAR_OPS
from bench.bench_token_logprobs import OPS as LOGPROBS_OPS
from bench.measure import OURS, PLAIN, SETTINGS
from bench.shapes import Case, Size, linear_loss_cases, logits_cases
from bench.stage_notes import Line, Notes, Row
from bench.targets import LINEAR, LOGPROBS, OPS_GOALS

_OPS = {op.name: op for op in (*LINEAR_OPS, *LOGPROBS_OPS)}
# Op, tokens, contenders.
_ON_GPU = (
    (LINEAR, 4096, (OURS, PLAIN, "liger triton loss", "liger scaled CE + loss", "trl chunked + loss")),
    (LOGPROBS, 8192, (OURS, PLAIN, "trl")),
    (LOGPROBS, 1024, (OURS, PLAIN, "trl")),
    (LINEAR, 32768, (OURS, PLAIN, "liger triton loss", "trl chunked + loss")),
    (LINEAR, 4096, (OURS, PLAIN, "torch.compile", "cce + loss")),
)
_ON_CPU = ((LINEAR, 64, (OURS, PLAIN)), (LOGPROBS, 64, (OURS, PLAIN)))


def main(work: Path, seconds: float, cpu: bool) -> int:
    deadline = time.monotonic() + seconds
    size: Size = "toy" if cpu else "gpu"
    notes = Notes(work)
    rows: list[Row] = []
    for name, tokens, contenders in _ON_CPU if cpu else _ON_GPU:
        op, case = _OPS[name], _case(name, tokens, size)
        if time.monotonic() > deadline:
            notes.add(Line(f"{name}, {case.name}", "no time was left"))
            continue
        # Memory on the CPU would take a process for each contender.
        rows += notes.measure(op, replace(case, memory=not cpu), SETTINGS[size], contenders)
    notes.judge(OPS_GOALS, rows)
    return int(any(line.wrong for line in notes.lines()))


def _case(op: str, tokens: int, size: Size) -> Case:
    """The first of the suite's with so many tokens."""
    cases = (linear_loss_cases if op == LINEAR else logits_cases)(size)
    return next(case for case in cases if case.tokens == tokens)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), "--cpu" in sys.argv))
