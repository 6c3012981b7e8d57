"""Resuming: what is continued, what is refused, and what a signal or a failure leaves behind."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.command import LIMIT, ROOT, TRAIN, environment, quick_start, train
from thinktwice_fast.config import UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.checkpoint import check_room, checkpoints
from thinktwice_fast.run.metrics_file import read_metrics

BATCH = ("--problems_per_step", "4", "--samples_per_problem", "4", "--update.warmup_steps", "0")
SMALL = (
    *(*BATCH, "--eval.limit", "4", "--eval.every", "0"),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "9"),
)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps: it ends in the middle of its second pair."""
    output = tmp_path_factory.mktemp("resume") / "run"
    finished = train(*SMALL, "--run.steps", "3", "--output", output)
    assert finished.returncode == 0, finished.stderr
    return output


@pytest.fixture
def run(three_steps: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    return Path(shutil.copytree(three_steps, tmp_path / "run"))


def steps(output: Path) -> list[tuple[int, str]]:
    return [(r["step"], r["phase"]) for r in read_metrics(output / "metrics.jsonl") if r["phase"] != "checkpoint"]


def refusal(*options: str | Path) -> str:
    finished = train(*SMALL, *options)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    return line


def test_optimizer_options_of_the_resumed_session_count(run: Path) -> None:
    changed = ("--update.learning_rate", "3e-6", "--update.adam_betas", "[0.5, 0.6]")
    finished = train(*SMALL, *changed, "--run.steps", "4", "--resume", "auto", "--output", run)
    assert finished.returncode == 0, finished.stderr
    rates = [r.get("solve/learning_rate", r.get("refine/learning_rate")) for r in read_metrics(run / "metrics.jsonl")]
    assert [rate for rate in rates if rate is not None] == [5e-5, 5e-5, 5e-5, 3e-6]
    assert steps(run) == [
        (0, "eval"),
        (1, "solve"),
        (2, "refine"),
        (3, "solve"),
        (3, "eval"),
        (4, "refine"),
        (4, "eval"),
    ]


def test_an_older_checkpoint_is_not_mixed_with_newer_ones(run: Path, tmp_path: Path) -> None:
    older = run / "checkpoints" / "step-000001"
    line = refusal("--run.steps", "2", "--resume", older, "--output", run)
    assert "step-000003 beside it is newer" in line and "another --output" in line
    finished = train(*SMALL, "--run.steps", "2", "--resume", older, "--output", tmp_path / "branch")
    assert finished.returncode == 0, finished.stderr
    assert steps(tmp_path / "branch")[0] == (2, "refine")
    assert [folder.name for folder in checkpoints(run)] == ["step-000001", "step-000002", "step-000003"]


def test_half_a_pair_is_not_continued_on_other_problems(run: Path) -> None:
    line = refusal("--run.steps", "4", "--resume", "auto", "--seed", "1", "--output", run)
    assert "in the middle of a pair" in line and "--seed" in line


def test_a_copy_beside_the_checkpoints_is_left_alone(run: Path) -> None:
    kept = run / "checkpoints" / "step-000002-good"
    shutil.copytree(run / "checkpoints" / "step-000002", kept)
    finished = train(*SMALL, "--run.steps", "4", "--resume", "auto", "--run.keep_checkpoints", "1", "--output", run)
    assert finished.returncode == 0, finished.stderr
    assert [folder.name for folder in checkpoints(run)] == ["step-000004"]
    assert kept.exists()


def test_a_disk_without_room_for_one_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    class Usage(NamedTuple):
        free: int

    layer = torch.nn.Linear(100, 99)  # 9,999 parameters
    for bias_trained, processes, needed in (
        (True, 1, 12 * 9_999),
        (False, 1, 12 * 9_900 + 4 * 99),
        (True, 2, 16 * 9_999),
    ):
        layer.bias.requires_grad_(bias_trained)
        monkeypatch.setattr("shutil.disk_usage", lambda folder, needed=needed: Usage(needed))
        check_room(tmp_path, layer, UpdateOptions(), processes)
        monkeypatch.setattr("shutil.disk_usage", lambda folder, needed=needed: Usage(needed - 1))
        with pytest.raises(UserError, match="make room"):
            check_room(tmp_path, layer, UpdateOptions(), processes)


def start(*options: str | Path, processes: int, fresh: bool = False) -> subprocess.Popen[str]:
    python, own = (sys.executable, environment()) if fresh else quick_start()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    return subprocess.Popen(
        [python, *launcher, str(TRAIN), *SMALL, *map(str, options)],
        env=own,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [0, 2])
def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, processes: int) -> None:
    output = tmp_path / "run"
    # Far more steps than are made, and not so many that processes whose launcher is killed go on for hours.
    process = start("--run.steps", "1000", "--output", output, processes=processes)
    try:
        wait_for(output / "checkpoints" / "step-000002", process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert "finishing this step, then saving" in errors
    assert processes or (process.returncode == 0 and "Traceback" not in errors)
    saved = int(checkpoints(output)[-1].name.removeprefix("step-"))
    assert steps(output)[-1][0] == saved
    go_on = ("--run.steps", str(saved + 1), "--resume", "auto", "--output", output)
    finished = train(*SMALL, *go_on, processes=processes)
    assert finished.returncode == 0, finished.stderr
    assert [step for step, phase in steps(output) if phase != "eval"] == list(range(1, saved + 2))


def test_ctrl_c_before_training_is_one_line(tmp_path: Path) -> None:
    process = start("--run.steps", "5", "--output", tmp_path / "run", processes=0, fresh=True)
    try:
        wait_for(tmp_path / "run", process)  # made before the model is loaded
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert errors.splitlines() == ["stopped before the first step of this session"]


FAILS_LATE = """
calls = 0
def fails_late(prompts, completions, **columns):
    global calls
    calls += 1
    if calls > 4 and not __import__('os').path.exists('mended'):
        raise ValueError('worn out')
    return [float(len(c[0]['content']) % 2) for c in completions]
"""


def test_a_failure_on_one_of_two_processes_keeps_the_steps_before(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(FAILS_LATE)
    # Two groups a process and step: the fifth call is in step 3.
    rest = ("--run.checkpoint_every", "0", "--eval.sets", "{}", "--run.steps", "4", "--output", tmp_path / "run")
    command = (*BATCH, "--reward", f"{reward}:fails_late", *rest)
    failed = train(*command, processes=2, cwd=tmp_path)
    assert failed.returncode != 0
    (line, *_) = [line for line in failed.stderr.splitlines() if line.startswith("train.py: error:")]
    assert "step 3" in line and "worn out" in line and "everything up to step 2 is kept" in line
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000002"]
    (tmp_path / "mended").touch()
    finished = train(*command, "--resume", "auto", processes=2, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert steps(tmp_path / "run") == [(1, "solve"), (2, "refine"), (3, "solve"), (4, "refine")]


def test_a_run_that_saves_nothing_says_so(tmp_path: Path) -> None:
    reward, output = tmp_path / "reward.py", tmp_path / "run"
    reward.write_text(FAILS_LATE)
    rest = ("--eval.sets", "{}", "--run.steps", "2", "--run.save", "false", "--output", output)
    failed = train(*BATCH, "--reward", f"{reward}:fails_late", *rest)
    assert failed.returncode == 2
    assert "step 2: " in failed.stderr and "nothing was saved (--run.save false)" in failed.stderr
    assert steps(output) == [(1, "solve")] and not (output / "checkpoints").exists()
