"""A run that is killed and resumed ends exactly as one that never was (CPU, one process)."""

import random
import signal
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.command import LIMIT, ROOT, TRAIN, quick_start, train
from thinktwice_fast.run.metrics import read_metrics, reproducible

KILLS = 10
OPTIONS = (
    *("--problems_per_step", "4", "--samples_per_problem", "4", "--run.steps", "100"),
    *("--run.checkpoint_every", "1", "--run.transcripts_every", "5", "--eval.every", "7", "--eval.limit", "8"),
    *("--update.minibatch_sequences", "8", "--seed", "5", "--resume", "auto"),
)


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = train(*OPTIONS, "--output", whole, fresh=True)
    assert finished.returncode == 0, finished.stderr
    moments = random.Random(0)
    for number in range(KILLS):
        # Two of them before training has started; the others up to a second into it.
        start_and_kill(killed, None if number in (0, 5) else moments.uniform(0, 1), moments.uniform(0, 0.8))
    finished = train(*OPTIONS, "--output", killed)
    assert finished.returncode == 0, finished.stderr

    assert reproducible(read_metrics(killed / "metrics.jsonl")) == reproducible(read_metrics(whole / "metrics.jsonl"))
    assert (killed / "transcripts.jsonl").read_bytes() == (whole / "transcripts.jsonl").read_bytes()
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def start_and_kill(output: Path, into_training: float | None, after_start: float) -> None:
    """Start the run and kill it, ``into_training`` seconds after its first new record, or during start-up."""
    python, own = quick_start()
    process = subprocess.Popen(
        [python, str(TRAIN), *OPTIONS, "--output", str(output)],
        env=own,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if into_training is None:
            time.sleep(after_start)
        else:
            wait_for_a_record(process, output / "metrics.jsonl")
            time.sleep(into_training)
        assert process.poll() is None, "the run ended before it was killed: give it more steps"
    finally:
        process.send_signal(signal.SIGUSR1)  # a fork gets SIGKILL for it; to a run it is the same
        process.wait(LIMIT)


def wait_for_a_record(process: subprocess.Popen[bytes], metrics: Path) -> None:
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)
    raise AssertionError("no record was written")
