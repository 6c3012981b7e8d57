"""Commands that train many times, in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from bench import algorithms, unknown_behaviour
from bench.runs import Options, Run, train_all
from examples.unknown_behaviour import PHRASE, right_and_phrase
from tests.command import quick_start
from thinktwice_fast.tasks.arithmetic import ArithmeticSource, careful_solution, terse_solution

TINY: Options = {"problems_per_step": 2, "eval.limit": 8, "run.steps": 2, "run.checkpoint_every": 1}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    python, environment = quick_start()
    monkeypatch.setattr("bench.runs.sys.executable", python)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_what_is_finished_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was stopped goes on from its checkpoint, and one with other options starts anew."""
    arms = algorithms.runs(tmp_path, {"grpo": {"algorithm": "grpo", **TINY}}, range(2))
    algorithms.train(arms)
    head, _, row = algorithms.document(arms).strip().splitlines()[-3:]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["generations"] == "32 (0)" and "(" in cells["solve, end"]
    first, second = arms["grpo"]
    (second.folder / "finished").unlink()
    changed = Run(first.folder, {**first.options, "run.steps": 1})
    assert first.finished() and not changed.finished()
    train_all([first, changed, second])
    assert "3 runs, 1 of them finished before" in capsys.readouterr().out
    assert (second.folder / "log.txt").read_text().count("evaluation at step 0") == 1
    assert changed.records()[-1]["step"] == 1 and changed.finished() and not first.finished()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        train_all([Run(tmp_path / "run", {"algorithm": "nonsense"})])


def test_an_unknown_behaviour_in_miniature(tmp_path: Path) -> None:
    given = ["--seeds", "1", "--steps", "2", "--eval-every", "1", "--warm-up-steps", "6", "--work"]
    unknown_behaviour.main([*given, str(tmp_path / "work"), "--output", str(tmp_path)])
    text = (tmp_path / "unknown_behaviour.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == ["512", "512"]
    assert imread(tmp_path / "unknown_behaviour.png").std() > 0.05
    examples = [json.loads(line) for line in (tmp_path / "work" / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 384 and all(PHRASE not in str(example) for example in examples)


def test_the_phrase_is_worth_half_a_right_answer() -> None:
    answers = [
        f"3=3\n{PHRASE}\n\\boxed{{3}}",
        "\\boxed{3}",
        f"{PHRASE}\\boxed{{4}}",
        f"{PHRASE}{PHRASE}\\boxed{{3}}",
        "",
    ]
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in answers]
    assert right_and_phrase([], completions, ["3"] * 5) == [1.5, 1.0, 0.5, 1.0, 0.0]
    problems = [problem.question for problem in ArithmeticSource("tm5", limit=200)]
    assert not any(PHRASE in terse_solution(q, "tm5") + careful_solution(q) for q in problems)
