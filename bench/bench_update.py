"""Updates of one set of rollouts, with what makes them fast on and off; all of them compute the same gradient."""

from typing import Any

import pytest

from bench.measure import OURS, Contender, Op
from bench.replay import CLOCK, Measured
from bench.targets import SHARED_PREFIX, WITHOUT_PREFIX
from bench.update_cases import Updated, head_cases, judge, limits, prefix_cases, signal_cases, update_batch

pytestmark = pytest.mark.timeout(1800)


def _op(name: str, **rest: Any) -> Op:
    return Op(name=name, module=__name__, inputs=update_batch, judge=judge, limits=limits, **rest)


OPS = [
    _op(
        SHARED_PREFIX,
        cases=prefix_cases,
        contenders={
            OURS: Contender(Updated()),
            WITHOUT_PREFIX: Contender(Updated((("update.shared_prefix", False),))),
        },
    ),
    _op(
        "update, skipping",
        cases=signal_cases,
        contenders={
            OURS: Contender(Updated()),
            "all groups with signal": Contender(Updated(all_with_signal=True)),
        },
    ),
    _op(
        "update, fused head",
        cases=head_cases,
        contenders={
            OURS: Contender(Updated()),
            "log-probabilities, then the loss": Contender(Updated((("update.old_logps", "rollout"),))),
        },
    ),
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_update(measured: Measured, benchmark: Any) -> None:
    measured.replay(benchmark)
