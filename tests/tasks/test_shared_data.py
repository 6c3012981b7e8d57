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


@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_answers_are_right_by_themselves(name: str) -> None:
    problems = load_source(DataOptions(source=str(DATA / f"{name}.parquet")))
    with Grader("math", 5.0, 2) as grader:
        gradings = [grader.submit(p, p.messages, [f"\\boxed{{{p.answer}}}"]) for p in problems]
        rewards = [grading.result()[0] for grading in gradings]
    assert sum(reward == 1.0 for reward in rewards) >= 0.97 * len(rewards)


def test_rewritten_gold_answers_pass_through_math_verify() -> None:
    problems = load_source(DataOptions(source=str(DATA / "math500.parquet"), limit=150))
    with Grader("math", 5.0, 2) as grader:
        # Parentheses change the text but not the value, so that plain equality cannot settle it.
        gradings = [grader.submit(p, p.messages, [f"\\boxed{{({p.answer})}}"]) for p in problems[:60]]
        rewards = [grading.result()[0] for grading in gradings]
    assert sum(reward == 1.0 for reward in rewards) >= 0.8 * len(rewards)
