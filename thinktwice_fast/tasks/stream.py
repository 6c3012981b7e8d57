"""The order in which a run visits its problems."""

import random
from collections.abc import Sequence

from thinktwice_fast.records import Problem

# Runs with different seeds read different stretches of an endless source.
_SEED_STRIDE = 1 << 24


class ProblemStream:
    """Problems by position, from 0 without end; the position is all there is to save.

    A finite source is visited in a new random order each epoch; an endless one is random already.

    Args:
        source: finite (a sequence) or endless (indexable).
        indices: the source's usable indices; None = the source is endless.
        seed: of the order, 0 to 2^31 - 1. Of an endless source it chooses where to begin: problem seed * 2^24. So the
            first 16.8 million problems of two runs with different seeds have none in common.
        shuffle: False = the source's own order.
    """

    def __init__(self, source: Sequence[Problem], indices: Sequence[int] | None, seed: int, shuffle: bool):
        assert 0 <= seed < 1 << 31, "a negative seed would begin before the source does"
        self._source = source
        self._indices = indices
        self._seed = seed
        self._shuffle = shuffle
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, position: int) -> Problem:
        if self._indices is None:
            return self._source[self._seed * _SEED_STRIDE + position]
        epoch, offset = divmod(position, len(self._indices))
        return self._source[self._order(epoch)[offset]]

    def _order(self, epoch: int) -> list[int]:
        assert self._indices is not None
        if self._epoch[0] != epoch:
            order = list(self._indices)
            if self._shuffle:
                random.Random(f"{self._seed}:{epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1]
