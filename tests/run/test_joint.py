"""`thinktwice.pairing: joint` through the real command: what it writes, resuming, two processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.command import train
from tests.run.refusals import refused
from thinktwice_fast.run.metrics import Record, reproducible
from thinktwice_fast.run.metrics_file import read_metrics

BATCH = ("--problems_per_step", "4", "--samples_per_problem", "4", "--update.warmup_steps", "0")
JOINT = (
    *(*BATCH, "--thinktwice.pairing", "joint", "--update.minibatch_sequences", "16", "--eval.limit", "4"),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "9", "--run.transcripts_every", "3"),
)


def run(output: Path, steps: int, *options: str | Path, processes: int = 0, fresh: bool = False) -> Path:
    command = (*JOINT, "--run.steps", str(steps), "--output", output, *options)
    finished = train(*command, processes=processes, fresh=fresh)
    assert finished.returncode == 0, finished.stderr
    (output / "stdout").write_text(finished.stdout)
    return output


def pairs(output: Path) -> list[Record]:
    return [record for record in read_metrics(output / "metrics.jsonl") if record["phase"] == "pair"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop."""
    return run(tmp_path_factory.mktemp("joint") / "whole", 4, fresh=True)


def test_a_pair_is_one_step_and_one_record(whole: Path) -> None:
    records = pairs(whole)
    assert [(record["step"], record["generations"]) for record in records] == [(n, 32 * n) for n in (1, 2, 3, 4)]
    assert {record["phase"] for record in read_metrics(whole / "metrics.jsonl")} == {"eval", "pair", "checkpoint"}
    for record in records:
        assert record["refine/prompt_tokens"] > record["solve/prompt_tokens"] + 10
        assert record["pair/refine_extended"] == 1
        assert record["pair/tokens"] == 16 * (record["solve/response_tokens"] + record["refine/response_tokens"])
        assert record["pair/mismatch"] < 1e-4
        assert "solve/loss" not in record and "pair/reward" not in record
    # Two mini-batches: the second one's update begins where the first one's ended.
    assert any(record["pair/ratio_max"] > 1 for record in records)
    state = json.loads((whole / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["optimizer_steps"] == state["version"] == 8
    assert state["algorithm_state"] == {"position": 16}
    text = (whole / "stdout").read_text()
    assert "step 4/4 pair | reward solve " in text and "sampled generations  128" in text
    assert (whole / "curves.png").stat().st_size > 10_000


def test_transcripts_show_whole_pairs(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "transcripts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in lines] == [
        (step, phase) for step in (1, 3) for phase in ("solve", "refine") for _ in range(4)
    ]
    for line in lines:
        if line["phase"] == "refine":
            assert f"assistant: {line['base']}" in line["prompt"] and line["base_reward"] in (0, 1)


def test_a_resumed_run_ends_as_one_that_never_stopped(whole: Path, tmp_path: Path) -> None:
    resumed = run(tmp_path / "branch", 4, "--resume", whole / "checkpoints" / "step-000002")

    def later(output: Path) -> list[Record]:
        return [r for r in reproducible(read_metrics(output / "metrics.jsonl")) if r["step"] > 2]

    assert later(resumed) == later(whole)
    weights, expected = (load_file(output / "model" / "model.safetensors") for output in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_processes_do_the_step_of_one(whole: Path, tmp_path: Path) -> None:
    (two,), one = pairs(run(tmp_path / "two", 1, "--eval.sets", "{}", "--eval.limit", "400", processes=2)), pairs(whole)
    shared = {name: value for name, value in reproducible([two])[0].items() if name not in ("step", "phase")}
    assert len(shared) > 30
    for name, value in shared.items():
        assert value == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name


def copied(whole: Path, folder: Path, change: Any) -> Path:
    """A checkpoint of the run with another state."""
    copy = Path(shutil.copytree(whole / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000002"))
    state = json.loads((copy / "state.json").read_text())
    change(state)
    (copy / "state.json").write_text(json.dumps(state))
    return copy


def test_a_checkpoint_is_not_continued_under_the_other_pairing(whole: Path, tmp_path: Path) -> None:
    here = whole / "checkpoints" / "step-000004"
    line = refused(train(*BATCH, "--resume", here, "--output", tmp_path / "sequential"))
    assert "--thinktwice.pairing joint: give the same" in line
    older = copied(whole, tmp_path, lambda state: state.pop("thinktwice.pairing"))  # from before there was a choice
    line = refused(train(*JOINT, "--resume", older, "--output", tmp_path / "joint"))
    assert "--thinktwice.pairing sequential: give the same" in line
