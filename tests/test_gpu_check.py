"""The check of a machine with a GPU: a dry run of each stage, and what its closing table makes of what was found."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.core import hardware
from bench.models import LARGE
from bench.stages import closing
from bench.stages.notes import Line, Notes, result
from bench.stages.race import Race, judge
from tests.command import LIMIT, ROOT, quick_start

SCRIPT = ROOT / "bench" / "gpu_check.sh"


def check(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    python, own = quick_start()
    own |= {"PYTHON": python, "PATH": os.environ["PATH"]}
    return subprocess.run([SCRIPT, *arguments], env=own, capture_output=True, text=True, timeout=LIMIT)


def dry_run(stage: str, folder: Path) -> dict[str, Any]:
    """What a stage finds on a CPU with tiny shapes: the verdict of each check, by its name."""
    finished = check(stage, "--cpu", folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document = json.loads((folder / f"{stage}.json").read_text())
    assert document["machine"]["versions"]["torch"]
    table = (folder / f"{stage}.txt").read_text().split("\n\n")[1]
    assert table in finished.stdout
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == [line["check"] for line in document["lines"]]
    return {line["check"]: line["verdict"] for line in document["lines"]}


def test_correct(tmp_path: Path) -> None:
    found = dry_run("correct", tmp_path)
    right = {"tests", "pair", "pair: log-probabilities of rollout and training"}
    assert {name: found[name] for name in right} == dict.fromkeys(right, "met")
    assert found["pair: the whole command"] == "not measured"
    # Saving would take most of the time.
    written = {path.name for path in (ROOT / "build" / "gpu_check" / "correct" / "pair-run").iterdir()}
    assert "metrics.jsonl" in written
    assert not written & {"model", "checkpoints", "transcripts.jsonl", "tensorboard"}


def test_ops(tmp_path: Path) -> None:
    found = dry_run("ops", tmp_path)
    right = [verdict for name, verdict in found.items() if "toy" in name]
    assert right == ["met", "met"]
    assert found["linear_grpo_loss: ms, 4096 rows"] == "not measured"
    details = (tmp_path / "ops.txt").read_text()
    assert "ceiling: torch.matmul, three products" in details and "ceiling: copy of the logits" in details


def test_decode(tmp_path: Path) -> None:
    found = dry_run("decode", tmp_path)
    right = [verdict for name, verdict in found.items() if "toy" in name]
    assert right == ["met", "met"]  # without CUDA graphs there is nothing to compare on a CPU
    assert found["rollout: tokens/s, 4 B, 8 x 8"] == "not measured"
    details = (tmp_path / "decode.txt").read_text()
    assert "calls on the host" in details and "without CUDA graphs: not run: runs on cuda only" in details


def test_step(tmp_path: Path) -> None:
    found = dry_run("step", tmp_path)
    for name in ("update row: loss and gradient norm", "steps of the race", "predicted peak memory"):
        assert found[name] == "met"
    steps = [name for name in found if name.startswith("step ")]
    assert [name.split(",")[0] for name in steps] == ["step 1", "step 2", "step 3", "step 4"]
    # The goals are those of a GPU, for the last step of each phase.
    assert [found[name] for name in steps] == ["", "", "not measured", "not measured"]
    details = (tmp_path / "step.txt").read_text()
    assert details.count("calls on the host") == 4 and "seconds_update" in details and "KV cache" in details


@pytest.mark.parametrize("arguments", [(), ("all",), ("ops", "--gpu"), ("step", "one", "two")])
def test_bad_usage_is_told_in_one_line(arguments: tuple[str, ...]) -> None:
    finished = check(*arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("gpu_check.sh: ") and finished.stderr.count("\n") == 1


def test_a_stage_needs_a_gpu() -> None:
    finished = check("ops")
    assert finished.returncode == 2
    assert finished.stderr.startswith("gpu_check.sh: torch sees no GPU here; a dry run is --cpu")


LARGE_RACE = Race(Path("race.yaml"), LARGE, 32, 8, Path("race-run"))
PLANNED = "predicted peak 100,000 MiB, in the update phase; the GPU has 143,000 MiB: it fits"


def step(number: int, seconds: float, peak: float, mismatch: float = 0.03) -> dict[str, Any]:
    phase = "solve" if number % 2 else "refine"
    measures = {"tokens_per_second": 2e4, "prompt_tokens": 116.0, "response_tokens": 1021.0, "mismatch": mismatch}
    measures |= {"seconds_rollout": 0.4 * seconds, "seconds_update": 0.6 * seconds, "seconds_step": seconds}
    record = {f"{phase}/{name}": value for name, value in measures.items()}
    return {"step": number, "phase": phase, "peak_memory_bytes": peak, **record}


def verdicts(records: list[dict[str, Any]], status: int | None) -> dict[str, tuple[str, bool]]:
    lines = judge(LARGE_RACE, records, PLANNED, status)
    return {line.check.partition(",")[0]: (line.verdict, line.wrong) for line in lines}


def test_the_race_is_judged_by_its_last_steps_and_its_prediction() -> None:
    gib = 2**30
    whole = [step(1, 40, 80 * gib), step(2, 30, 90 * gib), step(3, 15, 90 * gib), step(4, 20, 99 * gib)]
    found = verdicts(whole, 0)
    assert [found[f"step {number}"][0] for number in (1, 2, 3, 4)] == ["", "", "met", "NOT MET"]
    assert found["steps of the race"] == ("met", False)
    assert found["predicted peak memory"] == ("met", False)  # 70 % of what there is
    assert found["peak memory"] == ("NOT MET", False)  # 97.7 GiB were predicted
    # Cut off, the steps that were done count; a run that fails is wrong, and so is one that trains on other numbers.
    found = verdicts(whole[:2], None)
    assert found["steps of the race"] == ("NOT MET", False) and found["step 2"][0] == "NOT MET"
    assert verdicts(whole[:2], 1)["steps of the race"] == ("NOT MET", True)
    assert verdicts([], 1)["steps of the race"] == ("NOT MET", True)
    off = [*whole[:3], step(4, 20, gib, mismatch=0.4)]
    assert verdicts(off, 0)["log-probabilities of rollout and training"] == ("NOT MET", True)


def test_the_share_of_the_peak_counts_what_an_update_cannot_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "peak_flop", lambda: 989e12)
    record = step(1, 31.1 / 0.6, 1.0)
    lines = {line.check: line for line in judge(LARGE_RACE, [record], PLANNED, None)}
    # 6 operations for each weight of the layers and token, of the head and response token, and attention's.
    flop = 6 * (1.409e9 * (32 * 116 + 256 * 1021) + 311e6 * 256 * 1021) + 3 * 3.75e13
    share = float(lines["step 1, MFU of the update"].figure.removesuffix("%")) / 100
    assert share == pytest.approx(flop / 31.1 / 989e12, rel=0.01)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    machine: dict[str, Any] = {"gpu": "NVIDIA H200", "driver": "1", "cpu": "x", "threads": 2, "load": 0.0}
    (tmp_path / closing.MACHINE).write_text(json.dumps(machine | {"python": "3", "versions": {}}))
    (tmp_path / closing.PARTS).write_text("")
    return tmp_path


@pytest.mark.parametrize(("status", "wrong"), [("0", False), ("1", True), ("124", True), ("139", True)])
def test_a_failed_part_fails_the_stage(work: Path, status: str, wrong: bool) -> None:
    (work / closing.PARTS).write_text(f"tests\t{status}\t7\n")
    (work / "tests.log").write_text("...\n1 failed, 3 passed in 7.00s\n")
    assert closing.main("correct", work, work / "out") == int(wrong)
    row = (work / "out" / "correct.txt").read_text().splitlines()[3]
    assert row.split("  ")[0] == "tests" and "7 s, 1 failed, 3 passed" in row
    assert ("cut off" in row) == (status == "124")
    assert row.endswith("NOT MET") == wrong


@pytest.mark.parametrize(
    ("status", "seconds", "gpu", "verdict"),
    [
        ("0", 19, "NVIDIA H200", "met"),
        ("0", 20, "NVIDIA H200", "NOT MET"),
        ("1", 3, "NVIDIA H200", "NOT MET"),
        ("0", 3, None, "not measured"),
    ],
)
def test_the_pair_has_a_goal_for_its_time(work: Path, status: str, seconds: int, gpu: str | None, verdict: str) -> None:
    machine = json.loads((work / closing.MACHINE).read_text())
    (work / closing.MACHINE).write_text(json.dumps(machine | {"gpu": gpu}))
    (work / closing.PARTS).write_text(f"pair\t{status}\t{seconds}\n")
    (work / "pair.log").write_text("")
    # Time alone fails no stage: the rest of what was found stands.
    assert closing.main("correct", work, work / "out") == int(status)
    (line,) = (
        line for line in json.loads((work / "out" / "correct.json").read_text())["lines"] if "whole" in line["check"]
    )
    assert (line["figure"], line["verdict"]) == (f"{seconds} s", verdict)


def test_a_wrong_result_fails_the_stage_and_a_missed_goal_does_not(work: Path) -> None:
    notes = Notes(work)
    notes.add(Line("speed", "5 s", "<= 4 s", met=False), Line("size", "-", "<= 1 GiB"), Line("rate", "3 tok/s"))
    assert closing.main("step", work, work / "out") == 0
    notes.add(result("loss", "off by 1", "<= 0.1", right=False))
    assert closing.main("step", work, work / "out") == 1
    lines = json.loads((work / "out" / "step.json").read_text())["lines"]
    assert [line["verdict"] for line in lines] == ["NOT MET", "not measured", "", "NOT MET"]


def test_results_go_where_the_gpu_and_the_day_say(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "ROOT", work)
    assert closing.main("step", work) == 0
    (folder,) = (work / "bench" / "results").iterdir()
    assert folder.name.startswith("h200-20") and {path.name for path in folder.iterdir()} == {"step.txt", "step.json"}


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell", "rtx-pro-6000"),
    ],
)
def test_short_names_of_gpus(gpu: str, name: str) -> None:
    assert hardware.short_name(gpu) == name
