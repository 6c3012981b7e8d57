"""The comparison with another version, but for the other version."""

import pytest

from bench import against
from bench.models import MEDIUM


def test_a_case_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert against.main("HEAD", ["nonsense"]) == 2
    assert "loss head" in capsys.readouterr().err


def test_a_figure_above_the_bound_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(against, "build", lambda ref: against.ROOT)
    monkeypatch.setattr(against, "compare", lambda case, trees: [(case, [1.0, 2.0, 4.0], [1.0, 2.2, 4.4])])
    assert against.main("HEAD", ["loss head"]) == 1
    assert "1.100" in capsys.readouterr().out


def test_steps_of_both_versions_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two take turns in going first, and each makes as many steps as there are pairs."""
    order = []

    def steps(tree: str, run: against.Run) -> list[dict[str, float]]:
        order.append(tree)
        return [{"seconds": {"old": 1.0, "new": 2.0}[tree]}] * run.steps

    monkeypatch.setattr(against, "_steps", steps)
    run = against.Run({}, {"step": lambda record: record["seconds"]}, pairs=4, steps=2, shape=MEDIUM)
    monkeypatch.setitem(against.CASES, "some", run)
    (found,) = against.compare("some", ["old", "new"])  # type: ignore[list-item]
    assert found == ("some: step", [1.0] * 4, [2.0] * 4)
    assert order == ["old", "new", "new", "old"]
