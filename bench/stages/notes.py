"""What the parts of a stage of ``gpu_check.sh`` find, written down as it is found: a stage that is cut off keeps it.

Everything lies in the stage's folder of work: lines of its closing table in ``lines.jsonl``, tables to be read beside
it in ``details.txt``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.core.contender import OURS
from bench.core.measure import Setting, measure_case
from bench.core.op import Case, Op
from bench.core.report import case_table
from bench.core.targets import Row, Target, outcome

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

    def measure(
        self, op: Op, case: Case[Any], setting: Setting, contenders: Sequence[str], own: Sequence[str] = (OURS,)
    ) -> list[Row]:
        """Measure some contenders of a case, those that there are; of our ``own`` ones note whether they are right."""
        present = {name: op.contenders[name] for name in contenders if name in op.contenders}
        rows: list[Row] = [record.as_dict() for record in measure_case(replace(op, contenders=present), case, setting)]
        self.tell(f"{op.name}, {case.name}", case_table(rows))
        for row in rows:
            name = row["contender"]
            if name in own and not present[name].unable(setting.device):
                error = f"off by {max(row['errors'].values()):.1e}" if row["errors"] else row["reason"]
                right = row["status"] == "ok"
                self.add(result(f"{op.name}, {case.name}{f', {name}' * (name != OURS)}", error, "right", right))
        return rows

    def judge(self, goals: Mapping[str, Sequence[Target]], rows: Sequence[Row]) -> None:
        """Note whether what was measured meets the goals, which are given by op."""
        for found in (outcome(op, target, rows) for op, targets in goals.items() for target in targets):
            self.add(Line(found.name, found.figure, found.bound, found.met))

    def lines(self) -> list[Line]:
        if not self._lines.exists():
            return []
        return [Line(**json.loads(row)) for row in self._lines.read_text().splitlines()]

    def details(self) -> str:
        return self._details.read_text() if self._details.exists() else ""
