"""What a source of problems is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

from thinktwice_fast.records import Problem


class Source(Sequence[Problem], ABC):
    """Problems by number, from 0; `size` of them, or without end where that is None (then `len` is a TypeError)."""

    size: int | None
    notes: tuple[str, ...] = ()  # for the user: what was done otherwise than asked

    @abstractmethod
    def problem(self, index: int) -> Problem:
        """The problem number ``index``, which is within the source."""

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError("this source of problems is endless")
        return self.size

    def __bool__(self) -> bool:
        return self.size != 0

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self.problem(number) for number in range(*index.indices(len(self)))]
        if index < 0 and self.size is not None:
            index += self.size
        if index < 0 or (self.size is not None and index >= self.size):
            raise IndexError(index)
        return self.problem(index)
