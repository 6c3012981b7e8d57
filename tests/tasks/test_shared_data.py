"""The benchmark files that lie beside the repository, where they do."""

from pathlib import Path

import pytest

from thinktwice_fast.config import DataOptions
from thinktwice_fast.tasks.pool import Grader
from thinktwice_fast.tasks.sources import load_source

DATA = Path(__file__).parents[3] / "shared" / "data"
BENCHMARKS = {"aime": 90, "amc": 83, "math500": 500, "minerva_math": 272, "olympiadbench": 581}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside this repository")


@pytest.mark.parametrize(("name", "rows"), BENCHMARKS.items())
def test_benchmarks_load(name: str, rows: int) -> None:
    problems = load_source(DataOptions(source=str(DATA / f"{name}.parquet")))
    assert len(problems) == rows
    assert "\\boxed{}" in problems[0].question
    assert problems[0].answer == problems[0].columns["reward_model"]["ground_truth"]


@pytest.mark.parametrize(("name", "rows"), [("train", 7473), ("test", 1319)])
def test_gsm8k_loads(name: str, rows: int) -> None:
    problems = load_source(DataOptions(source=str(DATA / f"gsm8k_{name}.jsonl"), target_column="answer"))
    assert len(problems) == rows
    assert all("#" not in problem.answer for problem in problems)
    assert "####" in (problems[0].target or "")


@pytest.mark.parametrize("reward", ["math", "math_strict"])
def test_gold_answers_are_right_by_themselves(reward: str) -> None:
    problems = [
        problem for name in BENCHMARKS for problem in load_source(DataOptions(source=str(DATA / f"{name}.parquet")))
    ]
    assert len(problems) == 1526
    with Grader(reward, 5.0, 1) as grader:
        gradings = [grader.submit(p, p.messages, [f"\\boxed{{{p.answer}}}"]) for p in problems]
        wrong = [p.answer for p, grading in zip(problems, gradings, strict=True) if grading.result() != [1.0]]
    assert not wrong
