"""The whole registry as pytest tests, one per op, case and contender: `make bench`, or a part of it with `-k`."""

from typing import Any

import pytest

from bench.core.replay import CLOCK, Measured


# The first test of a case measures all of its rounds, of trainers that have to start first.
@pytest.mark.timeout(3600)
@pytest.mark.benchmark(timer=CLOCK.now)
def test(measured: Measured, benchmark: Any) -> None:
    measured.replay(benchmark)
