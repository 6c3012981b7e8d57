"""The one exception for what a user can cause and mend.

An error is data: what is wrong, and what there is to do about it. Its text is made where it is shown, and made once;
no one takes a finished text apart.

- Code that several commands share (``model/``, ``rollout/``, ``tasks/``) gives each remedy by itself and names options
  as ``Option``: every command has names of its own for them, and leaves out a remedy that takes an option which it
  lacks. tests/test_house.py looks for options in its texts.
- What only one command can meet may say everything in one text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option in the text of an error, for each command to show under its own name."""

    key: str  # its name in training: "model.path"
    value: Any = None  # that it has or should get

    def shown(self, names: Mapping[str, str] | None) -> str:
        """``--name value``; ``names`` as in ``UserError.line``."""
        name = self.key if names is None else names.get(self.key, self.key)
        return f"--{name}" if self.value is None else f"--{name} {self.value}"


Text = str | tuple[str | Option, ...]  # of several parts, put together without anything between them


class UserError(ValueError):
    """Bad input. As a string it is one line for ``train.py``, which prints it and exits with status 2.

    Args:
        what: is wrong.
        remedies: to choose from.
    """

    def __init__(self, what: Text, *remedies: Text):
        super().__init__(what, *remedies)  # what it is pickled from, on its way from another process
        self.what = _parts(what)
        self.remedies = tuple(map(_parts, remedies))

    def __str__(self) -> str:
        return self.line()

    def line(self, names: Mapping[str, str] | None = None) -> str:
        """``what: remedy, or remedy`` in one line.

        Args:
            names: of a command's options, by their key in training; remedies with others are left out. None = training.
        """
        told = _shown(self.what, names)
        usable = (remedy for remedy in self.remedies if names is None or _keys(remedy) <= names.keys())
        remedies = ", or ".join(_shown(remedy, names) for remedy in usable)
        return f"{told}: {remedies}" if remedies else told

    def within(self, place: str) -> "UserError":
        """The same, said to be of ``place``: a step, a file, a process."""
        return UserError((f"{place}: ", *self.what), *self.remedies)


def _parts(text: Text) -> tuple[str | Option, ...]:
    return (text,) if isinstance(text, str) else text


def _keys(parts: tuple[str | Option, ...]) -> set[str]:
    return {part.key for part in parts if isinstance(part, Option)}


def _shown(parts: tuple[str | Option, ...], names: Mapping[str, str] | None) -> str:
    return "".join(part if isinstance(part, str) else part.shown(names) for part in parts)


def one_line(error: BaseException) -> str:
    """What another library's error says, as part of such a line: white space folded, no full stop at the end.

    The name of its type where it says nothing.
    """
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
