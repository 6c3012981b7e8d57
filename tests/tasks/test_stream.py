"""The order of problems."""

from collections.abc import Sequence

import pytest

from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.stream import ProblemStream

LARGEST_SEED = 2**31 - 1


@pytest.mark.parametrize("seed", [0, 1, LARGEST_SEED])
@pytest.mark.parametrize("indices", [None, range(5)])
def test_every_seed_gives_the_same_problems_again(seed: int, indices: Sequence[int] | None) -> None:
    source = ArithmeticSource("tm5", limit=0 if indices is None else 5)
    first, second = (ProblemStream(source, indices, seed, shuffle=True) for _ in range(2))
    assert [first[position] for position in range(12)] == [second[position] for position in range(12)]


def test_seeds_read_an_endless_source_in_stretches_of_their_own() -> None:
    source = ArithmeticSource("tm5")
    positions = (0, 2**24 - 1)
    read = [ProblemStream(source, None, seed, True)[at].index for seed in (0, 1, 2, LARGEST_SEED) for at in positions]
    assert read == sorted(set(read))


def test_an_epoch_visits_each_usable_problem_once() -> None:
    usable = [0, 2, 3, 7]
    stream = ProblemStream(ArithmeticSource("tm5", limit=8), usable, LARGEST_SEED, shuffle=True)
    epochs = [[stream[4 * epoch + offset].index for offset in range(4)] for epoch in range(6)]
    assert all(sorted(epoch) == usable for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert stream[1].index == epochs[0][1]


def test_a_negative_seed_is_refused_before_any_problem_is_read() -> None:
    with pytest.raises(AssertionError, match="negative seed"):
        ProblemStream(ArithmeticSource("tm5"), None, -1, shuffle=True)
