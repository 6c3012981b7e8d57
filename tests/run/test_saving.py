"""Checkpoints are written beside training: what they hold, what stops them, who reads them, which are kept."""

import json
import os
import random
import re
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import everything, same, save, saver
from tests.command import train
from tests.run import resharding
from tests.update.cases import rollouts
from tests.update.worlds import one_process, run_in_two
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.best import rising_metrics
from thinktwice_fast.run.checkpoint import checkpoints, load_checkpoint
from thinktwice_fast.run.memory import Shape, checkpoint_bytes
from thinktwice_fast.run.metrics import find_metric
from thinktwice_fast.run.metrics_file import read_metrics

__all__ = ["one_process"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Nothing reaches the disk until it is set."""
    ready, sync = Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: ready.wait(60) and sync(handle))
    return ready


@pytest.mark.usefixtures("one_process")
def test_the_plan_counts_the_copy() -> None:
    updater = resharding.made("whole")
    updater.policy_update([rollouts(8)])
    copied = sum(value.nbytes for value in everything(updater).values())
    shape = Shape.of(updater.models.rollout, ModelOptions())
    assert checkpoint_bytes(Config(), shape, torch.float32, 1) == pytest.approx(copied, rel=1e-3)


def draws() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("kind", resharding.KINDS)
@pytest.mark.usefixtures("one_process")
def test_later_steps_do_not_leak_into_what_is_being_written(kind: str, disk: Event, tmp_path: Path) -> None:
    updater = resharding.made(kind)
    updater.policy_update([rollouts(8)])
    then, version, bases = everything(updater), updater.version, {"0": [1, 2]}
    writer = saver(tmp_path, updater)
    folder = writer.save(1, {"algorithm_state": bases})
    drawn = draws()
    bases["0"].append(3)
    for seed in range(1, 3):
        updater.policy_update([rollouts(8, seed)])
    assert not same(everything(updater), then) and not folder.exists()
    disk.set()
    writer.wait()
    other = resharding.made(kind)
    state = load_checkpoint(folder, other)
    assert same(everything(other), then)
    assert (state["algorithm_state"], other.version, draws()) == ({"0": [1, 2]}, version, drawn)


@pytest.mark.usefixtures("one_process")
def test_one_write_at_a_time_and_within_the_limit(disk: Event, tmp_path: Path) -> None:
    writer = saver(tmp_path, resharding.made("whole"), limit=0.2)
    writer.save(1, {})
    with pytest.raises(UserError, match=r"step-000001 was not written within --run.distributed_timeout 0\.2"):
        writer.save(2, {})
    disk.set()


@pytest.mark.usefixtures("one_process")
def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    updater = resharding.made("whole")
    updater.policy_update([rollouts(8)])
    folder = save(tmp_path, 1, updater)
    optimizer = folder / "optimizer" / "00000.safetensors"
    for content in (optimizer.read_bytes()[:-1], b"", None):
        optimizer.unlink() if content is None else optimizer.write_bytes(content)
        with pytest.raises(UserError, match=r"not a whole checkpoint \(.*\): take an earlier one"):
            load_checkpoint(folder, updater)


def test_two_processes_save_and_one_and_three_go_on(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    two = run_in_two("tests.run.resharding", tmp_path)
    three = run_in_two("tests.run.resharding", tmp_path, 3)
    request.getfixturevalue("one_process")
    one = resharding.loaded(tmp_path)
    for kind, tensors in two["tensors"].items():
        assert any("/exp_avg" in name for name in tensors)
        assert same(one[kind], tensors) and same(three["tensors"][kind], tensors)
        folder = tmp_path / kind / "checkpoints" / "step-000001" / "model"
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    # A disk that is full for one of the two: one line for both, and what was there before is whole.
    says = r"can't write .*step-000002 \(\[Errno 28\] No space left on device\): earlier checkpoints are whole"
    assert len(two["errors"]) == 2 and all(re.match(rf"process \d: {says}", text) for text in two["errors"])
    assert [folder.name for folder in (tmp_path / "whole" / "checkpoints").iterdir()] == ["step-000001"]
    # No process needs more than a copy of its own shard, not even the one that puts whole weights together.
    assert len(two["rises"]) == 2 and max(two["rises"]) < 1.15, two["rises"]


SMALL = ("--problems_per_step", "4", "--samples_per_problem", "4", "--update.warmup_steps", "0", "--eval.limit", "8")
BEST = (
    *("--run.keep_best", "eval/held_out/solve_accuracy", "--run.keep_checkpoints", "1", "--run.checkpoint_every", "0"),
    *("--eval.every", "1", "--update.learning_rate", "1e-2"),  # which soon unlearns everything
)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for steps in ("3", "5"):
        finished = train(*SMALL, *BEST, "--run.steps", steps, "--resume", "auto", "--output", tmp_path)
        assert finished.returncode == 0, finished.stderr
        records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["phase"] == "eval"]
        values = {record["step"]: record["eval/held_out/solve_accuracy"] for record in records if record["step"]}
        best = max(values, key=lambda step: values[step])  # the first of equals
        assert len(values) == int(steps) and best < int(steps), "the last one is no test: take another seed"
        names = [f"step-{best:06d}", f"step-{int(steps):06d}"]
        assert [folder.name for folder in checkpoints(tmp_path)] == names
        note = {"checkpoint": names[0], "metric": "eval/held_out/solve_accuracy", "value": values[best]}
        assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == note
        assert re.search(rf"best +{tmp_path}/checkpoints/{names[0]}", finished.stdout)
    finished = train(
        *SMALL, "--run.steps", "6", "--resume", "auto", "--run.keep_checkpoints", "1", "--output", tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def test_what_a_best_checkpoint_can_be_named_by_is_a_metric() -> None:
    names = rising_metrics(["a", "b"], 4)
    assert all(find_metric(name) for name in names)
    assert {"eval/average/refine_accuracy", "eval/b/solve_pass@4"} <= {*names} and "eval/a/solve_pass@8" not in names
