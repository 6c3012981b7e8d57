"""A step's samples, advantages, bases and metrics do not depend on how many processes share the work."""

from pathlib import Path

import pytest

from tests.algorithms.joint_world import joint_step
from tests.algorithms.stubs import first_steps
from tests.update.worlds import run_in_two


@pytest.mark.usefixtures("one_process")
def test_two_processes_choose_and_count_as_one(tmp_path: Path) -> None:
    two = run_in_two("tests.algorithms.two_processes", tmp_path)
    for name, one in first_steps().items():
        found = two["steps"][name]
        assert found["states"] == one["states"] * 2, name
        for exact in ("generations", "minibatches", "learned"):
            assert found[exact] == one[exact], (name, exact)
        for close in ("advantages", "metrics"):
            assert found[close] == pytest.approx(one[close]), (name, close)
        assert any(one["advantages"].values()) or one["learned"], name

    one = joint_step()
    assert two["joint"]["outcome"] == one["outcome"] and two["joint"]["state"] == one["state"]
    for found, expected in zip(two["joint"]["metrics"], one["metrics"], strict=True):
        assert found == pytest.approx(expected)
