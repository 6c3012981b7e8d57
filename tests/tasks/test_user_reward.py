import re
from collections.abc import Callable
from pathlib import Path

import pytest

from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.pool import Grader

PROBLEM = Problem(
    12,
    ({"role": "user", "content": "1+1"},),
    "2",
    columns={"question": "1+1", "level": 3, "prompt": "a column that TRL keeps back"},
)

Make = Callable[..., Grader]


@pytest.fixture
def make(tmp_path: Path):
    """Makes a Grader from the source of a reward file; its function is called `reward`."""
    graders = []

    def from_source(source: str, workers: int = 1, timeout: float = 10.0) -> Grader:
        file = tmp_path / "my_reward.py"
        file.write_text(source)
        graders.append(Grader(f"{file}:reward", timeout=timeout, workers=workers))
        return graders[-1]

    yield from_source
    for grader in graders:
        grader.close()


def grade(grader: Grader, *completions: str) -> list[float | None]:
    return grader.submit(PROBLEM, PROBLEM.messages, completions).result()


def error_of(grader: Grader, *completions: str) -> str:
    with pytest.raises(UserError) as raised:
        grade(grader, *completions)
    message = str(raised.value)
    assert "\n" not in message
    assert "my_reward.py:reward" in message
    assert "problem 12" in message
    return message


def test_trl_signature(make: Make) -> None:
    grader = make(
        "def reward(prompts, completions, answer, level, **columns):\n"
        "    assert prompts == [[{'role': 'user', 'content': '1+1'}]] * len(completions), prompts\n"
        "    assert level == [3] * len(completions) and set(columns) == {'question'}, columns\n"
        "    assert all(len(turn) == 1 and turn[0]['role'] == 'assistant' for turn in completions)\n"
        "    return [None if turn[0]['content'] == 'skip' else float(turn[0]['content'] == gold)\n"
        "            for turn, gold in zip(completions, answer)]\n"
    )
    assert grade(grader, "2", "3", "skip") == [1.0, 0.0, None]


def test_state_survives_and_neighbours_can_be_imported(make: Make, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_reward.py").write_text("START = 10\n")
    grader = make(
        "from neighbour_of_reward import START\n"
        "calls = START\n"
        "def reward(completions, **rest):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [calls] * len(completions)\n"
    )
    assert grade(grader, "a") == [11.0]
    assert grade(grader, "a", "b") == [12.0, 12.0]


def test_numpy_numbers_are_numbers(make: Make) -> None:
    grader = make("import numpy\ndef reward(completions, **rest):\n    return numpy.array([0.5, 1.5], numpy.float32)\n")
    assert grade(grader, "a", "b") == [0.5, 1.5]


def test_async_calls_share_a_loop_and_several_processes_share_the_calls(make: Make) -> None:
    grader = make(
        "import asyncio, os\n"
        "loops = set()\n"
        "running = most = 0\n"
        "async def one(text):\n"
        "    global running, most\n"
        "    running += 1\n"
        "    most = max(most, running)\n"
        "    await asyncio.sleep(0.1)\n"
        "    running -= 1\n"
        "    return float(text)\n"
        "async def reward(completions, **rest):\n"
        "    loops.add(id(asyncio.get_running_loop()))\n"
        "    assert len(loops) == 1\n"
        "    rewards = await asyncio.gather(*(one(turn[0]['content']) for turn in completions))\n"
        "    assert most == 5, 'calls wait for each other'\n"
        "    return [*rewards[1:], os.getpid()]\n",
        workers=2,
    )
    gradings = [grader.submit(PROBLEM, PROBLEM.messages, ["1", "2", "3", "4", "5"]) for _ in range(4)]
    results = [grading.result() for grading in gradings]
    assert all(result[:-1] == [2, 3, 4, 5] for result in results)
    assert len({result[-1] for result in results}) == 2


def test_raising_names_the_first_bad_sample(make: Make) -> None:
    grader = make(
        "def reward(completions, **rest):\n"
        "    return [1 / len(turn[0]['content'].replace('bad', '')) for turn in completions]\n"
    )
    message = error_of(grader, "fine", "bad", "bad")
    assert "raised ZeroDivisionError: division by zero" in message
    assert "sample 1 (" in message


def test_raising_only_on_the_whole_group(make: Make) -> None:
    grader = make("def reward(completions, **rest):\n    [one] = completions\n    return [1.0]\n")
    message = error_of(grader, "a", "b")
    assert "raised ValueError" in message and "samples 0 to 1 together" in message


def test_a_signature_without_the_keywords(make: Make) -> None:
    message = error_of(make("def reward(texts):\n    return [1.0]\n"), "a")
    assert "raised TypeError" in message
    assert "sample 0" in message


def test_hanging_names_the_sample_and_does_not_hang(make: Make) -> None:
    grader = make(
        "import time\n"
        "def reward(completions, **rest):\n"
        "    for turn in completions:\n"
        "        while turn[0]['content'] == 'slow':\n"
        "            time.sleep(0.01)\n"
        "    return [1.0] * len(completions)\n",
        timeout=1.0,
    )
    message = error_of(grader, "fine", "slow")
    assert "took longer than 1 s" in message
    assert "sample 1 (" in message
    assert error_of(grader, "fine") == message, "nothing is graded after a failure"


def test_ending_the_process(make: Make) -> None:
    grader = make("import os\ndef reward(completions, **rest):\n    os._exit(3)\n")
    message = error_of(grader, "a")
    assert "ended its process" in message
    assert "sample 0" in message


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ("[1.0, float('nan')]", r"returned nan, on problem 12, sample 1 \("),
        ("[float('inf'), 1.0]", r"returned inf, on problem 12, sample 0 \("),
        ("[1.0, 'good']", r"returned a str instead of a number or None, on problem 12, sample 1 \("),
        ("[1.0]", r"returned 1 rewards for 2 samples"),
        ("0.5", r"returned a float instead of a list of floats"),
        ("'ab'", r"returned a str instead of a list of floats"),
        ("None", r"returned a NoneType instead of a list of floats"),
    ],
)
def test_bad_results(make: Make, returned: str, what: str) -> None:
    assert re.search(what, error_of(make(f"def reward(completions, **rest):\n    return {returned}\n"), "a", "b"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other():\n    pass\n", "there is no such function in the file; define `def reward("),
        ("reward = 3\n", "it is a int; define `def reward("),
        ("def reward(:\n", "cannot be imported: SyntaxError"),
        ("import no_such_module_here\n", "cannot be imported: ModuleNotFoundError: No module named"),
        ("raise SystemExit(1)\n", "cannot be imported: SystemExit: 1"),
    ],
)
def test_unusable_files_are_refused_before_anything_is_graded(make: Make, source: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make(source)


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"no file nowhere/mine\.py"):
        Grader("nowhere/mine.py:reward", 1.0, 1)
