import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.pool import Grader


def problem(answer: str) -> Problem:
    return Problem(0, ({"role": "user", "content": "q"},), answer)


def rewards(grader: Grader, gold: str, *answers: str) -> list[float | None]:
    asked = problem(gold)
    return grader.submit(asked, asked.messages, [f"\\boxed{{{answer}}}" for answer in answers]).result()


def test_plain_numbers_need_no_process() -> None:
    before = set(multiprocessing.active_children())
    with Grader("math", 1.0, 2) as grader:
        asked = problem("42")
        texts = [
            "\\boxed{42}",
            "\\boxed{41}",
            "no box",
            "\\boxed{4",
            "\\boxed{21+21}",
            "\\boxed{recheck}",
            "\\boxed{84/2}",
            "\\boxed{6 \\times 7}",
        ]
        assert grader.submit(asked, asked.messages, texts).result() == [1, 0, 0, 0, 0, 0, 1, 0]
        assert set(multiprocessing.active_children()) <= before


@pytest.fixture(scope="module")
def math():
    with Grader("math", 30.0, 2) as grader:
        yield grader


@pytest.fixture(scope="module")
def hasty():
    """Where answers hang."""
    with Grader("math", 4.0, 2) as grader:
        yield grader


def test_answers_that_need_algebra(math: Grader) -> None:
    assert rewards(math, "2\\sqrt2", "\\sqrt8", "\\sqrt8", "\\sqrt7", "2\\sqrt2", "x") == [1, 1, 0, 1, 0]
    assert math.timeouts == 0


def test_done_tells_when_the_rewards_are_there(hasty: Grader) -> None:
    asked = problem("2\\sqrt2")
    assert hasty.submit(asked, asked.messages, ["\\boxed{2\\sqrt2}", "no box"]).done()  # no process was asked
    grading = hasty.submit(asked, asked.messages, ["no box", "\\boxed{9**9**9}"])
    assert not grading.done()
    deadline = time.monotonic() + 30
    while not grading.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = time.monotonic()
    assert grading.result() == [0, 0] and time.monotonic() < before + 10
    assert grading.done()


def test_equal_forms_of_an_answer(math: Grader) -> None:
    assert rewards(math, "0.5", "1/2", "\\frac{1}{2}", "50\\%") == [1, 1, 1]
    assert rewards(math, "50", "50\\%", "50^\\circ", "(50)", "x = 50", "50\\text{ cm}^2") == [1, 1, 1, 1, 1]
    assert rewards(math, "1000", "1,000", "10^3", "1 \\times 10^{3}", "\\sqrt{1000000}") == [1, 1, 1, 1]
    assert rewards(math, "3.5", "3\\frac{1}{2}", "\\frac72", "7:2") == [1, 1, 1]
    assert rewards(math, "\\frac{\\pi}{3}", "\\pi/3", "\\frac{2\\pi}{6}") == [1, 1]
    assert rewards(math, "48/2+48", "72", "24+48") == [1, 1]


def test_copying_the_question_pays_nothing(math: Grader) -> None:
    assert rewards(math, "60", "5 \\times 12", "5*12", "\\frac{5*12}{1}", "x=5*12", "60") == [0, 0, 0, 0, 1]
    assert rewards(math, "72", "(48+24)", "48/2+48", "\\frac{48}{2}+48") == [0, 0, 0]
    assert rewards(math, "72\\text{ clips}", "48/2+48", "72", "72\\text{ clips}") == [0, 1, 1]


def test_a_hanging_answer_is_stopped_and_later_ones_are_graded(hasty: Grader) -> None:
    before = hasty.timeouts
    asked = problem("3^4")  # for a plain number two of these are refused as calculations
    hanging = hasty.submit(
        asked, asked.messages, [f"\\boxed{{{a}}}" for a in ("9**9**9", "9999999!", "3**100000000", "3^4")]
    )
    later = hasty.submit(asked, asked.messages, ["\\boxed{\\sqrt{6561}}"])
    started = time.monotonic()
    assert later.result() == [1.0]
    result = hanging.result()
    assert result == [0, 0, 0, 1]
    assert hanging.result() == result
    assert 1 <= hasty.timeouts - before <= 3
    assert time.monotonic() - started < 60
    assert rewards(hasty, "2\\sqrt2", "\\sqrt8") == [1]


def test_a_malformed_gold_answer_survives(math: Grader) -> None:
    assert rewards(math, "np.arcsin(10/13)", "0.8776", "\\arcsin{", "np.arcsin(10/13)") == [0, 0, 1]


def test_grading_goes_on_when_a_worker_is_killed(math: Grader) -> None:
    assert rewards(math, "2\\sqrt2", "\\sqrt8") == [1]
    for pid in math.workers.pids():
        os.kill(pid, signal.SIGKILL)
    assert rewards(math, "2\\sqrt2", "\\sqrt{8}", "\\sqrt{7}") == [1, 0]


def test_workers_are_apart_from_the_process_group(math: Grader) -> None:
    assert rewards(math, "2\\sqrt2", "\\sqrt8") == [1]
    deadline = time.monotonic() + 20
    while any(os.getpgid(pid) != pid for pid in math.workers.pids()):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # one that has not begun a call yet may still be starting


def test_a_closed_grader_does_not_hang() -> None:
    before = set(multiprocessing.active_children())
    grader = Grader("math", 30.0, 1)
    asked = problem("81")
    grading = grader.submit(asked, asked.messages, ["\\boxed{9999999!}"])
    started = time.monotonic()
    while not set(multiprocessing.active_children()) - before:
        assert time.monotonic() < started + 15
    grader.close()
    grader.close()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(AssertionError, match="closed"):
        grading.result()
    assert time.monotonic() - started < 15


ABANDON = """
import os, signal, sys, threading
from thinktwice_fast.tasks.pool import Grader
from thinktwice_fast.records import Problem

if __name__ == "__main__":
    problem = Problem(0, ({"role": "user", "content": "q"},), "81")
    grader = Grader(sys.argv[1], 1.0, 1)
    grading = grader.submit(problem, problem.messages, [r"\\boxed{\\sqrt{6561}}"])
    grading.result()
    hanging = grader.submit(problem, problem.messages, [r"\\boxed{9999999!}"])
    waiting = threading.Thread(target=hanging.result, daemon=True)
    waiting.start()
    waiting.join(0.5)
    print("busy" if waiting.is_alive() else "done", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
HANG = """
import time
def reward(completions, **columns):
    while "!" in completions[0][0]["content"]:
        time.sleep(0.1)
    return [1.0]
"""


@pytest.mark.parametrize("reward", ["math", "own"])
def test_workers_end_after_the_process_they_served_was_killed(tmp_path: Path, reward: str) -> None:
    script, own = tmp_path / "abandon.py", tmp_path / "own.py"
    script.write_text(ABANDON)
    own.write_text(HANG)
    name = f"{own}:reward" if reward == "own" else reward
    # Its worker inherits stdout, so this returns only once the worker has ended; by itself that would take minutes.
    ended = subprocess.run([sys.executable, script, name], stdout=subprocess.PIPE, timeout=30)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == b"busy\n"


def test_choice_and_exact_settle_at_once() -> None:
    asked = problem("B")
    before = set(multiprocessing.active_children())
    with Grader("choice", 1.0, 1) as choice, Grader("exact", 1.0, 1) as exact:
        assert choice.submit(asked, asked.messages, ["\\boxed{B}", "The answer is C"]).result() == [1, 0]
        assert exact.submit(asked, asked.messages, ["B ", "C"]).result() == [1, 0]
        assert set(multiprocessing.active_children()) <= before


def test_a_problem_that_choice_cannot_grade_is_found_before_training() -> None:
    with Grader("choice", 1.0, 1) as choice, Grader("exact", 1.0, 1) as exact, Grader("math", 1.0, 1) as math:
        choice.check(problem("(b)"))
        with pytest.raises(UserError, match=r"row 0 \(from 0\): the gold answer '42' is no letter .* an answer column"):
            choice.check(problem("42"))
        exact.check(problem("42"))
        math.check(problem("42"))


@pytest.mark.parametrize(
    ("reward", "timeout", "workers", "message"),
    [
        (
            "maths",
            1.0,
            1,
            "unknown reward 'maths'; use math, math_strict, choice, yes_no, exact, or my",
        ),
        ("math", 0.0, 1, "reward_timeout is 0.0"),
        ("math", 1.0, 0, "reward_workers is 0"),
    ],
)
def test_bad_options(reward: str, timeout: float, workers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grader(reward, timeout, workers)


def test_importing_the_graders_imports_no_heavy_library() -> None:
    code = (
        "import sys, thinktwice_fast.tasks.pool, thinktwice_fast.tasks.sources, thinktwice_fast.tasks.prompts\n"
        "print([name for name in ('torch', 'datasets', 'transformers', 'sympy', 'math_verify') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
