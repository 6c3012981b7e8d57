"""Figures of runs read off their curves, at equal generations, solve updates or time, with intervals over seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.runs import Run
from thinktwice_fast.run.metrics import POLICY, Record

GENERATIONS, SOLVE_UPDATES, SECONDS = "generations", "solve updates", "seconds of training"
AXES = (GENERATIONS, SOLVE_UPDATES, SECONDS)
"""What runs are compared at: samples drawn, steps that learned from solutions, time of steps without evaluations."""

FIGURES = {
    "solve": "eval/held_out/solve_accuracy",
    "after refinement": "eval/held_out/refine_accuracy",
    "fix-wrong": "eval/held_out/fix_wrong",
    "damage-correct": "eval/held_out/damage_correct",
    "pass@4": "eval/held_out/solve_pass@4",
    "pass@4 after refinement": "eval/held_out/refine_pass@4",
}
FALLING = ("damage-correct",)
"""Those of `FIGURES` that are better when lower."""

# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T95) + 1


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval's half width (NaN for one seed), both as shares."""

    mean: float
    half: float

    @property
    def above(self) -> bool:
        """Whether all of it is above 0."""
        return self.mean > self.half

    @property
    def below(self) -> bool:
        """Whether all of it is below 0."""
        return -self.mean > self.half

    def points(self, signed: bool = False) -> str:
        """In percent, or percentage points."""
        mean = f"{100 * self.mean:{'+' if signed else ''}.1f}"
        return mean if math.isnan(self.half) else f"{mean} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Of 1 to `MOST_SEEDS` values, of a seed each."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return Interval(mean, math.nan)
    return Interval(mean, _T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Curves:
    """Where a run stood at each of its evaluations, and what they measured."""

    records: Sequence[Record]
    places: Mapping[str, Sequence[float]]  # by `AXES`
    values: Mapping[str, Sequence[float]]  # by `FIGURES`; NaN where an evaluation has none

    @classmethod
    def of(cls, run: Run) -> "Curves":
        """A finished run's."""
        records = run.records()
        stood = dict.fromkeys(AXES, 0.0)
        places: dict[str, list[float]] = {axis: [] for axis in AXES}
        values: dict[str, list[float]] = {figure: [] for figure in FIGURES}
        for record in records:
            if record["phase"] in POLICY:
                stood[GENERATIONS] = record["generations"]
                stood[SOLVE_UPDATES] += "solve/reward" in record
                stood[SECONDS] += record[f"{record['phase']}/seconds_step"]
            elif record["phase"] == "eval":
                for axis, place in stood.items():
                    places[axis].append(place)
                for figure, metric in FIGURES.items():
                    value = record.get(metric)
                    values[figure].append(math.nan if value is None else value)
        return cls(records, places, values)

    def at(self, axis: str, place: float, figure: str) -> float:
        """A figure at a place of an axis, on the straight line between the evaluations before and after it."""
        places, values = np.array(self.places[axis]), np.array(self.values[figure])
        measured = np.isfinite(values)
        return float(np.interp(place, places[measured], values[measured]))


Arms = Mapping[str, Sequence[Curves]]
"""The runs of each arm, in the order of their seeds."""


def reached(arms: Arms, axis: str) -> float:
    """The farthest place of an axis that every run came to."""
    return min(curves.places[axis][-1] for arm in arms.values() for curves in arm)


def read_off(arm: Sequence[Curves], axis: str, place: float, figure: str) -> Interval:
    """A figure of an arm at a place."""
    return interval([curves.at(axis, place, figure) for curves in arm])


def difference(arm: Sequence[Curves], other: Sequence[Curves], axis: str, place: float, figure: str) -> Interval:
    """An arm's figure less another's at a place, seed by seed."""
    pairs = zip(arm, other, strict=True)
    return interval([one.at(axis, place, figure) - two.at(axis, place, figure) for one, two in pairs])
