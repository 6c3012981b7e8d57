"""How rounds that were measured in turn get into pytest-benchmark, which measures one test after another.

The rounds of a case are measured before the first of its tests. Each test then replays its own contender's: its target
moves `CLOCK` on by one measured round, and pytest-benchmark is told to read the time from `CLOCK`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from bench.core.contender import OURS
from bench.core.measure import Record


class ReplayClock:
    """A clock that stands still but for `advance`."""

    def __init__(self) -> None:
        self._time = 0.0

    def now(self) -> float:
        return self._time

    def restart(self) -> None:
        """Small numbers keep differences exact."""
        self._time = 0.0

    def advance(self, seconds: float) -> None:
        self._time += seconds


CLOCK = ReplayClock()


@dataclass(frozen=True)
class Measured:
    """One contender's record, as a fixture of the benchmark tests."""

    record: Record

    def replay(self, benchmark: Any) -> None:
        """Feed the rounds to pytest-benchmark. Fails if ours is not right; skips a peer without a time."""
        record = self.record
        if record.contender == OURS and record.status != "ok":
            pytest.fail(f"{OURS} in {record.op} {record.case}: {record.status}: {record.reason}", pytrace=False)
        if not record.seconds:
            pytest.skip(f"{record.status}: {record.reason}")
        benchmark.group = f"{record.op} {record.case}"
        benchmark.extra_info.update({name: value for name, value in record.as_dict().items() if name != "seconds"})
        rounds = _rounds(record.seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), setup=CLOCK.restart, rounds=len(record.seconds))


def _rounds(seconds: Sequence[float]) -> Iterator[float]:
    yield from seconds
