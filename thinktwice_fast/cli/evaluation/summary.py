"""The figures of an evaluation with their intervals: by model and set, as differences between models, and crosswise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from thinktwice_fast.cli.evaluation.intervals import (
    Draws,
    Estimate,
    difference,
    estimate,
    mean_draws,
    mean_of_sets,
    redraw,
)
from thinktwice_fast.run.figures import Figure, Solved, figures
from thinktwice_fast.run.metrics import AVERAGE

Estimates = dict[str, Estimate]  # by figure
CROSS = ("refine_accuracy", "refine_pass@", "fix_wrong", "damage_correct")
"""What the matrix of a cross-refinement has, by the beginning of the name."""


@dataclass(frozen=True)
class Cell:
    """What one model made of one model's solutions to a set: mostly of its own."""

    solver: str
    refiner: str
    name: str  # of the set
    solved: Sequence[Sequence[Solved]]  # by problem


@dataclass
class Summary:
    """Every figure, by model, set (the average last) and name."""

    models: dict[str, dict[str, Estimates]] = field(default_factory=dict)
    differences: dict[str, dict[str, Estimates]] = field(default_factory=dict)  # of later models to the first
    cross: dict[str, dict[str, dict[str, Estimates]]] = field(default_factory=dict)  # by refiner, solver, set
    problems: dict[str, int] = field(default_factory=dict)  # by set

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Measured:
    """The figures of one model on one set, or the average."""

    estimates: Estimates
    draws: Draws

    @classmethod
    def of(cls, found: Mapping[str, Figure], seed: int) -> "_Measured":
        draws = redraw(found, seed)
        estimates = {name: estimate(name, figure, draws[name]) for name, figure in found.items()}
        return cls({name: known for name, known in estimates.items() if known is not None}, draws)


def summarise(cells: Sequence[Cell], ks: Sequence[int], seed: int) -> Summary:
    """All figures of the cells.

    Args:
        cells: of every model with its own solutions, and maybe with those of others.
        ks: of pass@k.
        seed: of the draws of problems.
    """
    summary = Summary(problems={cell.name: len(cell.solved) for cell in cells})
    places = {name: place for place, name in enumerate(summary.problems)}
    pairs: dict[tuple[str, str], dict[str, _Measured]] = {}
    crossed = any(cell.solver != cell.refiner for cell in cells)
    for cell in cells:
        # Of a cross-refinement it counts too whether any refinement of a problem is right.
        most = sum(len(pair.refinements) for pair in cell.solved[0]) if crossed else ks[0]
        found = figures(cell.solved, sorted({*ks, most}))
        measured = _Measured.of(found, seed + places[cell.name])
        pairs.setdefault((cell.refiner, cell.solver), {})[cell.name] = measured
    for sets in pairs.values():
        if len(sets) > 1:
            sets[AVERAGE] = _average(list(sets.values()))
    models = list(dict.fromkeys(cell.solver for cell in cells))
    for model in models:
        own = pairs[model, model]
        summary.models[model] = {name: measured.estimates for name, measured in own.items()}
        if model != models[0]:
            first = pairs[models[0], models[0]]
            summary.differences[model] = {name: _less(own[name], first[name]) for name in own}
    if crossed:
        for (refiner, solver), sets in pairs.items():
            summary.cross.setdefault(refiner, {})[solver] = {
                name: _only(measured.estimates, lambda figure: figure.startswith(CROSS))
                for name, measured in sets.items()
            }
    return summary


def _average(sets: Sequence[_Measured]) -> _Measured:
    names = dict.fromkeys(name for measured in sets for name in measured.estimates)
    known = {name: [measured.estimates[name] for measured in sets if name in measured.estimates] for name in names}
    return _Measured(
        {name: mean_of_sets(several) for name, several in known.items()},
        mean_draws([{name: measured.draws[name] for name in measured.estimates} for measured in sets]),
    )


def _less(ours: _Measured, theirs: _Measured) -> Estimates:
    return {
        name: difference(own, theirs.estimates[name], ours.draws[name], theirs.draws[name])
        for name, own in ours.estimates.items()
        if name in theirs.estimates
    }


def _only(estimates: Estimates, wanted: Callable[[str], bool]) -> Estimates:
    return {name: value for name, value in estimates.items() if wanted(name)}
