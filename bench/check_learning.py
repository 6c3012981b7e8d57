"""Three whole runs of the default job: does it learn what the README says? `make learning`; about six minutes."""

from pathlib import Path

import pytest

from tests.command import train
from thinktwice_fast.run.metrics_file import read_metrics

SOLVE_POINTS, REFINE_POINTS, SECONDS = 25, 15, 300


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracies_rise_within_minutes(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    finished = train("--seed", str(seed), "--output", output, processes=1, threads=2)
    assert finished.returncode == 0, finished.stderr
    records = read_metrics(output / "metrics.jsonl")
    first, *_, last = [record for record in records if record["phase"] == "eval"]
    seconds = [record["elapsed_seconds"] for record in records if "elapsed_seconds" in record][-1]
    gains = {
        name: 100 * (last[f"eval/held_out/{name}_accuracy"] - first[f"eval/held_out/{name}_accuracy"])
        for name in ("solve", "refine")
    }
    with capsys.disabled():
        print(f"\nseed {seed}: solve {gains['solve']:+.1f} points, refine {gains['refine']:+.1f}, {seconds:.0f} s")
    assert gains["solve"] >= SOLVE_POINTS
    assert gains["refine"] >= REFINE_POINTS
    assert seconds < SECONDS
