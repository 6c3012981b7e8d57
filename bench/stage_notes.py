"""What the parts of a stage of ``gpu_check.sh`` find, written down as it is found: a stage that is cut off keeps it.

Everything lies in the stage's folder of work: lines of its closing table in ``lines.jsonl``, tables to be read beside
it in ``details.txt``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.targets import Outcome

_LINES, _DETAILS = "lines.jsonl", "details.txt"


@dataclass(frozen=True)
class Line:
    """One of the closing table."""

    check: str
    figure: str
    goal: str = ""
    met: bool | None = None  # None: not measured, or without a goal
    wrong: bool = False  # a result, as opposed to a speed

    @property
    def verdict(self) -> str:
        if not self.goal:
            return ""
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


def result(check: str, figure: str, goal: str, right: bool) -> Line:
    """A line on whether something was computed right."""
    return Line(check, figure, goal, right, wrong=not right)


def goal(outcome: Outcome) -> Line:
    """A line on whether something was fast or small enough."""
    return Line(outcome.name, outcome.figure, outcome.bound, outcome.met)


class Notes:
    """The notes of one stage.

    Args:
        folder: of work, which is there.
    """

    def __init__(self, folder: Path):
        self._lines, self._details = folder / _LINES, folder / _DETAILS

    def add(self, *lines: Line) -> None:
        """Write lines, and show them."""
        with self._lines.open("a") as file:
            for line in lines:
                file.write(json.dumps(asdict(line)) + "\n")
                print(f"{line.check}: {line.figure}" + f" ({line.goal}: {line.verdict})" * bool(line.goal), flush=True)

    def tell(self, title: str, text: str) -> None:
        """Write a table, and show it."""
        block = f"{title}\n{text.rstrip()}\n"
        with self._details.open("a") as file:
            file.write(block + "\n")
        print(block, flush=True)

    def lines(self) -> list[Line]:
        if not self._lines.exists():
            return []
        rows: list[Mapping[str, str]] = [json.loads(row) for row in self._lines.read_text().splitlines()]
        return [Line(**row) for row in rows]  # type: ignore[arg-type]

    def details(self) -> str:
        return self._details.read_text() if self._details.exists() else ""
