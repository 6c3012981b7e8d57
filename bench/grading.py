"""Answers graded a minute by the clock: ``python -m bench.grading --data_root FOLDER``.

The maths sets of ``eval.sets`` from a folder of theirs, as the evaluation command grades them: two processes, groups
handed in one after another, each with half of its answers right as the gold answer is written and half of them wrong,
the gold answers of other problems of the set. Every verdict on a right answer is checked.
"""

import argparse
import os
import random
import time
from collections.abc import Sequence

from bench.core.report import table
from thinktwice_fast.config import Config, EvalOptions
from thinktwice_fast.records import Problem, is_right
from thinktwice_fast.tasks.evaluation_sets import evaluation_sets
from thinktwice_fast.tasks.graders import gold_answer
from thinktwice_fast.tasks.pool import Grader

SETS = ("aime", "amc", "math500", "minerva_math", "olympiadbench")
GRADERS = ("math", "math_strict")
_TEXT = "First we set up the equation, then we solve it. The final answer is $\\boxed{{{}}}$."


def groups(problems: Sequence[Problem], samples: int, draw: random.Random) -> list[tuple[Problem, list[str]]]:
    """Each problem with its responses, the right ones first."""
    golds = [gold_answer(problem.answer) for problem in problems]
    result = []
    for problem, gold in zip(problems, golds, strict=True):
        answers = [gold] * (samples // 2) + draw.choices(golds, k=samples - samples // 2)
        result.append((problem, [_TEXT.format(answer) for answer in answers]))
    return result


def seconds(reward: str, work: Sequence[tuple[Problem, list[str]]], workers: int) -> float:
    """To grade all, without the start of the processes.

    Raises:
        RuntimeError: a right answer was graded as wrong.
    """
    with Grader(reward, timeout=5.0, workers=workers) as grader:
        warm = Problem(0, (), r"\sqrt{2}+\frac{x}{2}")
        starts = [grader.submit(warm, [], [_TEXT.format(rf"x/2+{n}\sqrt2") for n in range(2, 2 + 2 * workers)])]
        for start in starts:
            start.result()
        begun = time.perf_counter()
        gradings = [grader.submit(problem, [], responses) for problem, responses in work]
        rewards = [grading.result() for grading in gradings]
        took = time.perf_counter() - begun
    wrong = [
        problem.answer
        for (problem, responses), given in zip(work, rewards, strict=True)
        if not all(is_right(reward) for reward in given[: len(responses) // 2])
    ]
    if wrong:
        raise RuntimeError(f"{reward}: {len(wrong)} gold answers graded wrong, the first {wrong[0]!r}")
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.grading", description=__doc__)
    parser.add_argument("--data_root", required=True, help="folder of the ready sets' files")
    parser.add_argument("--samples", type=int, default=8, help="of each problem; default 8")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    options = parser.parse_args(arguments)
    sets = evaluation_sets(Config(eval=EvalOptions(sets=SETS, data_root=options.data_root)))
    rows, answers, minutes = [], 0, [0.0] * len(GRADERS)
    for name, evaluation_set in sets.items():
        work = groups(list(evaluation_set.load()), options.samples, random.Random(0))
        count = sum(len(responses) for _, responses in work)
        taken = [seconds(grader, work, options.workers) / 60 for grader in GRADERS]
        rows.append(_row(name, count, taken))
        answers, minutes = answers + count, [sum(pair) for pair in zip(minutes, taken, strict=True)]
    rows.append(_row("all", answers, minutes))
    print(table([("set", "answers", *(f"{grader}, a minute" for grader in GRADERS)), *rows]))


def _row(name: str, answers: int, minutes: Sequence[float]) -> tuple[str, ...]:
    return name, f"{answers:,}", *(f"{answers / taken:,.0f}" for taken in minutes)


if __name__ == "__main__":
    main()
