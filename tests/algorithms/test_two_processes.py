"""A step's samples, advantages, bases and metrics do not depend on how many processes share the work."""

from pathlib import Path

import pytest

from tests.algorithms.joint_world import joint_step
from tests.algorithms.stubs import bases_and_advantages
from tests.update.worlds import run_in_two


@pytest.mark.usefixtures("one_process")
def test_two_processes_choose_and_count_as_one(tmp_path: Path) -> None:
    one = bases_and_advantages()
    two = run_in_two("tests.algorithms.two_processes", tmp_path)
    assert two["step"]["state"] == one["state"]
    assert two["states"] == [one["state"]] * 2
    assert two["step"]["advantages"] == pytest.approx(one["advantages"])
    assert two["step"]["metrics"] == pytest.approx(one["metrics"])
    assert any(one["advantages"].values())

    one = joint_step()
    assert two["joint"]["outcome"] == one["outcome"] and two["joint"]["state"] == one["state"]
    for found, expected in zip(two["joint"]["metrics"], one["metrics"], strict=True):
        assert found == pytest.approx(expected)
