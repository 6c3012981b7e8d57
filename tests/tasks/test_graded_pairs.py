"""What both maths graders say to a table of pairs, through their processes."""

import csv
from pathlib import Path

import pytest

from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.pool import Grader

with (Path(__file__).parent.parent / "data" / "graded_pairs.tsv").open(newline="") as file:
    PAIRS = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("reward", ["math", "math_strict"])
def test_verdicts(reward: str) -> None:
    problems = [Problem(number, (), pair["gold"]) for number, pair in enumerate(PAIRS)]
    with Grader(reward, 8.0, 2) as grader:
        gradings = [
            grader.submit(problem, (), [f"It is \\boxed{{{pair['answer']}}}."])
            for problem, pair in zip(problems, PAIRS, strict=True)
        ]
        given = [grading.result() for grading in gradings]
    assert len(PAIRS) >= 300
    assert [pair for pair, grades in zip(PAIRS, given, strict=True) if grades != [float(pair[reward])]] == []
    assert 1 <= grader.timeouts <= 3, "some attacks hang; what stands behind them is graded all the same"


def test_where_the_strict_grader_differs_on_hard_pairs() -> None:
    """Its verdicts on the whole table are those of the code that the papers' figures were made with."""
    hard = [pair for pair in PAIRS if pair["kind"] == "hard"]
    assert len(hard) == 50
    assert {(pair["answer"], pair["gold"]) for pair in hard if pair["math"] != pair["math_strict"]} == {
        (r"\frac24", r"\frac12"),
        (r"50\%", "0.5"),
        (r"\sqrt{16}", "4"),
        ("3,4", "(3,4)"),
        (r"\{2,1\}", r"\{1,2\}"),
        (r"4.5\times10^{33}", "4.5e33"),
        ("10^{3}", "1000"),
        ("x^{10}+1", "1+x^{10}"),
        (r"(2,3)\cup(0,1)", r"(0,1)\cup(2,3)"),
    }
