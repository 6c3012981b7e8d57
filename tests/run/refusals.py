"""Commands that are refused: how a table describes them, and what their refusal looks like."""

import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from tests.command import TRAIN

SMALL = ("--problems_per_step", "2", "--samples_per_problem", "2", "--eval.sets", "{}", "--update.warmup_steps", "0")
ROWS = [{"question": f"{n}+2+3-4+5", "answer": str(n + 6)} for n in range(1, 6)]
Finished = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Case:
    """A command that is refused."""

    name: str
    says: tuple[str, ...]  # parts of the one line on stderr
    options: Callable[[Path], list[str | Path]]  # given a folder to prepare things in; "--output FOLDER/run" is added
    processes: int = 0
    fresh: bool = False  # started as a user's is (see `train`): one is enough
    after_a_run: bool = False  # the output folder holds what a run leaves that ended after one solve step


def refused(finished: Finished, *says: str) -> str:
    """The line on stderr, after checking that it is the only one and says what it should."""
    assert finished.returncode == 2, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("train.py: error: ")
    for part in says:
        assert part in lines[0]
    return lines[0]


def refused_by_torchrun(finished: Finished, *says: str) -> None:
    """torchrun has an exit status and a report of its own; the process behind it exits with 2."""
    lines = [line for line in finished.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert lines, finished.stderr
    for part in says:
        assert part in lines[0]
    assert f'{TRAIN}", line' not in finished.stderr, "a traceback through train.py"
    assert finished.returncode != 0
    assert re.search(r"exitcode\s*: 2 ", finished.stderr), finished.stderr


def steps_on_disk(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("*"))


def logged_steps(output: Path) -> list[int]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record["phase"] in ("solve", "refine")]


def jsonl(folder: Path, *lines: object) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def text(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content)
    return path


def problems(folder: Path, *lines: object) -> list[str | Path]:
    """Options for a file of problems, and an instruction that the shipped model can read within its context."""
    return ["--data.source", jsonl(folder, *lines), "--thinktwice.refine_instruction", "recheck"]


def source(*lines: object) -> Callable[[Path], list[str | Path]]:
    return lambda folder: problems(folder, *lines)


def options(*values: str) -> Callable[[Path], list[str | Path]]:
    return lambda folder: list(values)


Outcomes = dict[str, tuple[Path, "Future[Finished]"]]


def named(case: Case) -> str:
    return case.name
