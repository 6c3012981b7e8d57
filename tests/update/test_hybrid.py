"""``update.shard_processes``: groups that shard, equal copies between them, make the weights that one process makes."""

from pathlib import Path

import pytest

from tests.small_models import random_model
from tests.update import hybrid
from tests.update.cases import assert_same_step
from tests.update.worlds import run_in_two


@pytest.mark.parametrize("processes", [2, 4])
def test_hybrid_sharding_changes_nothing(processes: int, one_process: None, tmp_path: Path) -> None:
    change, metrics, _ = hybrid.update()
    results = run_in_two("tests.update.hybrid", tmp_path, processes)
    got, got_metrics, elements = results["update"]
    assert_same_step(got, change)
    for name in ("loss", "grad_norm", "kl_ref"):
        assert got_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    # Two groups, whatever the number of processes: a pair of replicas of one process, or of two with half of it each.
    largest = max(parameter.numel() for parameter in random_model("qwen3").parameters())
    assert elements == [largest // (processes // 2)] * processes
    assert_same_step(results["state"], hybrid.round_trip())
