"""A problem: what is asked, and what a grader needs to judge an answer; and a source of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Message = dict[str, str]  # {"role": ..., "content": ...}, as chat templates take it


@dataclass(frozen=True)
class Problem:
    """One row of a problem source."""

    index: int  # its number in the source, from 0
    messages: tuple[Message, ...]  # the question as a chat, without the answer
    answer: str  # the gold answer that the reward compares with
    target: str | None = None  # a full worked response, where the source has one (needed by SFT)
    columns: dict[str, Any] = field(default_factory=dict)  # every column of the row, for user rewards

    @property
    def question(self) -> str:
        """The text of the last user message."""
        return self.messages[-1]["content"]


class Source(Sequence[Problem], ABC):
    """Problems by number, from 0; `size` of them, or without end where that is None (then `len` is a TypeError)."""

    size: int | None

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
