"""The speeds that ops are meant to reach, held against the figures of one run.

Only the main comparison counts: no case with rows that could be skipped, none that is there to be compared with.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.core.contender import CEILING, OURS

Row = Mapping[str, Any]  # a record, as results.json has it
Figure = Callable[[Mapping[str, Row]], float | None]  # from the records of one case by contender


@dataclass(frozen=True)
class Target:
    """`figure` of each case has to be at least (or at most) `bound` in all of them; the worst is shown."""

    name: str
    figure: Figure
    bound: float
    at_most: bool = False
    only: str = ""  # cases whose names begin so

    def verdict(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


@dataclass(frozen=True)
class Outcome:
    name: str
    figure: str
    bound: str
    met: bool | None  # None: not measured

    @property
    def words(self) -> str:
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


def times_slower(contender: str) -> Figure:
    return lambda rows: rows[contender]["to_ours"] if contender in rows else None


def fastest_peer(among: Collection[str] = ()) -> Figure:
    """How many times our time the fastest takes; of all where none are named."""

    def figure(rows: Mapping[str, Row]) -> float | None:
        others = [name for name in rows if not name.startswith((OURS, CEILING))]
        peers = [rows[name] for name in (among or others) if name in rows]
        return min((row["to_ours"] for row in peers if row["to_ours"]), default=None)

    return figure


def time_share(of: str) -> Figure:
    return lambda rows: 1 / rows[of]["to_ours"] if of in rows and rows[of]["to_ours"] else None


def memory_share(of: str) -> Figure:
    def share(rows: Mapping[str, Row]) -> float | None:
        ours, other = rows[OURS]["memory"], rows[of]["memory"] if of in rows else None
        return ours / other if ours is not None and other else None

    return share


def own(field: str, scale: float = 1.0) -> Figure:
    """A field of our record, if it was measured."""

    def figure(rows: Mapping[str, Row]) -> float | None:
        value = rows[OURS][field]
        return None if value is None else scale * value

    return figure


def outcome(op: str, target: Target, records: Iterable[Row]) -> Outcome:
    """Whether the records of an op, among others, meet its target."""
    cases: dict[str, dict[str, Row]] = {}
    for row in records:
        if row["op"] == op and row["main"]:
            cases.setdefault(row["case"], {})[row["contender"]] = row
    figures = {
        case: figure
        for case, rows in cases.items()
        if OURS in rows and case.startswith(target.only) and (figure := target.figure(rows)) is not None
    }
    bound = f"{'<=' if target.at_most else '>='} {target.bound:g}"
    name = f"{op}: {target.name}"
    if not figures:
        return Outcome(name, "-", bound, None)
    worst = (max if target.at_most else min)(figures, key=lambda case: figures[case])
    others = f" (worst of {len(figures)}: {worst})" if len(figures) > 1 else f" ({worst})"
    return Outcome(name, f"{figures[worst]:.3g}{others}", bound, target.verdict(figures[worst]))
