"""A run that is killed and resumed ends exactly as one that never was (CPU, one process)."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import LIMIT, ROOT, TRAIN, quick_start, train
from thinktwice_fast.run.metrics import reproducible
from thinktwice_fast.run.metrics_file import read_metrics

WRITING = (2, 4, 7)  # which of ten kills
OPTIONS = (
    *("--problems_per_step", "4", "--samples_per_problem", "4", "--seed", "5", "--resume", "auto"),
    *("--run.checkpoint_every", "1", "--run.transcripts_every", "5", "--eval.every", "7", "--eval.limit", "8"),
)
THINKTWICE = ("--run.steps", "100", "--update.minibatch_sequences", "8")
# Samples of a problem are mostly rewarded alike at first: draws differ from step to step.
DAPO = ("--algorithm", "dapo", "--run.steps", "20", "--update.minibatch_sequences", "8", "--dapo.max_draws", "off")
STAR = (
    *("--algorithm", "star", "--run.steps", "40", "--star.problems_per_iteration", "12"),
    *("--star.finetune_steps", "3", "--star.rationalize", "true", "--star.hint", "={answer}"),
)
# The share of guided members falls from step to step.
THINKTUNING = (
    *("--algorithm", "thinktuning", "--thinktuning.teacher", "examples/arithmetic_teacher.py:teach"),
    *("--run.steps", "20", "--thinktuning.fraction", "0.75", "--thinktuning.decay_steps", "20"),
)


@pytest.mark.parametrize(
    ("options", "kills"),
    [(THINKTWICE, 10), (DAPO, 2), (STAR, 3), (THINKTUNING, 2)],
    ids=["thinktwice", "dapo", "star", "thinktuning"],
)
def test_kills_change_nothing(options: tuple[str, ...], kills: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (*OPTIONS, *options)
    finished = train(*options, "--output", whole, fresh=kills > 5)
    assert finished.returncode == 0, finished.stderr
    moments = random.Random(0)
    for number in range(kills):
        # Of ten two before training has started and three while a checkpoint is written; the others up to a second into
        # training, sooner in a short run.
        of_ten = kills == 10
        into_training = None if of_ten and number in (0, 5) else moments.uniform(0, kills / 10)
        writing = of_ten and number in WRITING
        start_and_kill(killed, options, into_training, moments.uniform(0, 0.8), while_writing=writing)
    finished = train(*options, "--output", killed)
    assert finished.returncode == 0, finished.stderr

    assert reproducible(read_metrics(killed / "metrics.jsonl")) == reproducible(read_metrics(whole / "metrics.jsonl"))
    assert (killed / "transcripts.jsonl").read_bytes() == (whole / "transcripts.jsonl").read_bytes()
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def start_and_kill(
    output: Path, options: tuple[str, ...], into_training: float | None, after_start: float, *, while_writing: bool
) -> None:
    """Start the run and kill it, ``into_training`` seconds after its first new record, or during start-up.

    Or within the first half second of ``while_writing`` a checkpoint, which then takes a whole one.
    """
    python, own = quick_start()
    script = ("-m", "tests.run.slow_writes") if while_writing else (str(TRAIN),)
    process = subprocess.Popen(
        [python, *script, *options, "--output", str(output)],
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
            if while_writing:
                wait_for_a_write(process, output)
            time.sleep(into_training / 2 if while_writing else into_training)
        assert process.poll() is None, "the run ended before it was killed: give it more steps"
    finally:
        process.send_signal(signal.SIGUSR1)  # a fork gets SIGKILL for it; to a run it is the same
        process.wait(LIMIT)
    assert bool(partial_checkpoints(output)) or not while_writing


def partial_checkpoints(output: Path) -> list[Path]:
    return list((output / "checkpoints").glob(".partial-step-*"))


def wait_for_a_write(process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not partial_checkpoints(output):
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint was written"
        time.sleep(0.01)


def wait_for_a_record(process: subprocess.Popen[bytes], metrics: Path) -> None:
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)
    raise AssertionError("no record was written")
