"""Responses and grades on disk, written as they come: an evaluation that was killed goes on from them.

A folder of one model and set holds JSON lines: ``solutions-0.jsonl``, ``refinements-0.jsonl`` and ``grades-0.jsonl``,
each with the number of the process that writes it, and no other does. Lines are only ever appended, but for one that a
kill cut in half. What was drawn by other settings than now asked for is refused.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from thinktwice_fast.errors import UserError, one_line

SOLUTIONS, REFINEMENTS, GRADES = "solutions", "refinements", "grades"
NONE = -1  # refinement number of a solution
SETTINGS = "settings.json"
"""The file with what the responses are drawn by."""

Line = dict[str, Any]
_encode = json.JSONEncoder(ensure_ascii=False).encode


class Key(NamedTuple):
    """Which response."""

    problem: int  # its number in the set
    sample: int  # of its solutions
    refinement: int = NONE  # of that solution

    @classmethod
    def of(cls, line: Line) -> "Key":
        """That of a line in the store."""
        return cls(line["problem"], line["sample"], line.get("refinement", NONE))

    def line(self) -> Line:
        """As the beginning of a line."""
        return self._asdict() if self.refinement != NONE else {"problem": self.problem, "sample": self.sample}

    @property
    def solution(self) -> "Key":
        """The solution that a refinement is of."""
        return Key(self.problem, self.sample)


class Store:
    """A folder of responses.

    Args:
        folder: made where it is missing.
        writer: number of the process.
    """

    def __init__(self, folder: Path, writer: int):
        self.folder = folder
        self._writer = writer
        self._files: dict[str, IO[bytes]] = {}

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Take down what the responses are drawn by; for one process.

        Raises:
            UserError: those that are there already were drawn by something else.
        """
        path = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _compare(json.loads(path.read_text(encoding="utf-8")), settings, self.folder)
                return
            path.with_suffix(".tmp").write_text(json.dumps(settings, indent=1), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{path}: can't be used ({one_line(error)})", "mend that", "give another --output"
            ) from error

    def append(self, kind: str, *lines: Line) -> None:
        """Hand lines over to the operating system: a kill of the process does not lose them.

        Raises:
            UserError: it can't be written, or another process that runs writes to the same file.
        """
        file = self._files.get(kind) or self._open(kind)
        # A lone surrogate has no UTF-8 form; its backslash form is a JSON escape.
        text = "".join(f"{_encode(line)}\n" for line in lines)
        data = text.encode("utf-8", "backslashreplace")
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"cannot write {file.name}: {error.strerror}: mend that, then repeat the command to go on"
            ) from error

    def lines(self, kind: str) -> Iterator[Line]:
        """Whole lines of all processes, in no order."""
        for path in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            with path.open("rb") as file:
                for number, text in enumerate(file, start=1):
                    if not text.endswith(b"\n"):
                        break
                    try:
                        yield json.loads(text)
                    except ValueError as error:
                        raise UserError(
                            f"{path}: line {number} is malformed ({one_line(error)})", "mend or delete the file"
                        ) from error

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, kind: str) -> IO[bytes]:
        path = self.folder / f"{kind}-{self._writer}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"{path} is being written by another evaluation", "wait for it", "give another --output"
                ) from None
            _cut_torn_line(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}: mend that, or give another --output") from error
        self._files[kind] = file
        return file


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        keep = end
        while keep:
            start = max(0, keep - (1 << 16))
            file.seek(start)
            found = file.read(keep - start).rfind(b"\n")
            if found >= 0:
                keep = start + found + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    new = json.loads(json.dumps(new))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            shown = f" {old.get(name)!r}, not {new.get(name)!r}" if name in old and name in new else ""
            raise UserError(
                f"{folder} holds responses that were drawn by another {name}{shown}",
                "give another --output",
                "change it back",
            )
