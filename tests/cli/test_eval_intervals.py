"""Figures of an evaluation and how sure they are, against a policy whose chances are set."""

from collections import Counter

import numpy as np
import pytest

from thinktwice_fast.cli.evaluation import intervals
from thinktwice_fast.cli.evaluation.summary import Cell, summarise
from thinktwice_fast.run.figures import Response, Solved, figures, values

REPETITIONS, PROBLEMS, SAMPLES = 200, 50, 4
KS = (1, 2, 4)
NAMES = (
    *(f"{phase}_{figure}" for phase in ("solve", "refine") for figure in ("accuracy", "majority", "tokens")),
    *(f"{phase}_pass@{k}" for phase in ("solve", "refine") for k in KS),
    *("boxed_rate", "refine_boxed_rate", "truncation_rate", "refine_truncation_rate", "fix_wrong", "damage_correct"),
)


def scripted(numbers: np.random.Generator, accuracies: np.ndarray, gain: float = 0.0) -> list[list[Solved]]:
    """Problems of given accuracies, plus ``gain``; 25 % of the wrong are fixed, 20 % of the right damaged."""
    problems, chances = len(accuracies), np.minimum(accuracies + gain, 1)[:, None]
    shape = (problems, SAMPLES)
    right = numbers.random(shape) < chances
    refined = np.where(right, numbers.random(shape) >= 0.2, numbers.random(shape) < 0.25)
    boxed, cut, tokens = numbers.random((2, *shape)) < 0.8, numbers.random((2, *shape)) < 0.2, numbers.poisson(9, shape)
    wrong = numbers.integers(3, size=(2, *shape))

    def response(phase: int, place: tuple[int, int]) -> Response:
        verdict = bool((right, refined)[phase][place])
        vote = "right" if verdict else f"wrong {wrong[phase][place]}"
        return Response(verdict, bool(boxed[phase][place]), int(tokens[place]), not cut[phase][place], vote)

    return [[Solved(response(0, (p, s)), (response(1, (p, s)),)) for s in range(SAMPLES)] for p in range(problems)]


def test_the_intervals_of_every_figure_cover_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "TIMES", 300)
    numbers = np.random.default_rng(5)
    gains = {"base": 0.0, "ours": 0.1}
    truths = {
        model: values(figures(scripted(numbers, numbers.beta(2, 2, 20_000), gain), KS)) for model, gain in gains.items()
    }
    assert truths["base"]["solve_accuracy"] == pytest.approx(0.5, abs=0.01)
    assert truths["base"]["fix_wrong"] == pytest.approx(0.25, abs=0.01)
    assert truths["base"]["damage_correct"] == pytest.approx(0.2, abs=0.01)
    assert truths["base"]["solve_pass@2"] == pytest.approx(0.7, abs=0.01)  # 1 - E(1-p)^2 of Beta(2, 2)
    covered: Counter[str] = Counter()
    for repetition in range(REPETITIONS):
        sets = {name: numbers.beta(2, 2, PROBLEMS) for name in ("one", "two")}
        cells = [
            Cell(model, model, name, scripted(numbers, accuracies, gain))
            for model, gain in gains.items()
            for name, accuracies in sets.items()
        ]
        summary = summarise(cells, KS, seed=repetition)
        shown = {
            "set": summary.models["base"]["one"],
            "average": summary.models["base"]["average"],
            "difference": summary.differences["ours"]["one"],
        }
        for place, found in shown.items():
            assert set(found) == set(NAMES)
            for name, estimate in found.items():
                truth = truths["base"][name] if place != "difference" else truths["ours"][name] - truths["base"][name]
                covered[f"{place} {name}"] += estimate.low <= truth <= estimate.high
    outside = {name: count for name, count in covered.items() if not 0.90 <= count / REPETITIONS <= 0.99}
    assert not outside, sorted(covered.values())
