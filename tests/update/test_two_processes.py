"""Two processes make the weights that one makes: sharding, normalisers, uneven work, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.small_models import random_model
from tests.update import two_processes
from tests.update.cases import assert_same_step, weights
from tests.update.worlds import run_in_two
from thinktwice_fast import parallel
from thinktwice_fast.model.lora import is_adapter


@pytest.fixture(scope="module")
def one() -> Any:
    parallel.start(torch.device("cpu"), 60.0)
    results = two_processes.everything()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_in_two("tests.update.two_processes", Path(tmp_path_factory.mktemp("two")))


def assert_same_update(got: tuple[torch.Tensor, dict[str, float]], expected: tuple[torch.Tensor, dict]) -> None:
    assert_same_step(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        if name != "seconds_update":
            assert got[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", two_processes.CASES)
def test_policy_update(case: str, one: Any, two: Any) -> None:
    assert_same_update(two["updates"][case], one["updates"][case])


def test_policy_update_with_a_sliding_window(one: Any, two: Any) -> None:
    assert_same_update(two["windowed"], one["windowed"])


def test_supervised_update(one: Any, two: Any) -> None:
    assert_same_update(two["supervised"], one["supervised"])


def test_activation_checkpointing_changes_nothing(one: Any, two: Any) -> None:
    assert_same_update(one["checkpointed"], one["updates"]["plain"])
    assert_same_update(two["checkpointed"], one["updates"]["plain"])


def test_update_of_adapters(one: Any, two: Any) -> None:
    for got in (two["adapted"]["whole"], two["adapted"]["micro-batches"], two["adapted and checkpointed"]):
        for name, expected in one["adapted"]["whole"].items():
            assert_same_step(got[name], expected)


def test_adapters_in_bfloat16_are_saved_whole_and_come_back(one: Any, two: Any) -> None:
    for world in (one, two):
        got = world["adapters"]
        assert got["saved"] and all(is_adapter(name) and value.any() for name, value in got["saved"].items())
        assert all(torch.equal(value, one["adapters"]["saved"][name]) for name, value in got["saved"].items())
        assert got["merged"].keys() == dict(random_model("llama").named_parameters()).keys()
        assert torch.equal(got["loaded"], got["read"])
        assert torch.equal(got["read"], one["adapters"]["read"])


def test_saved_weights_are_whole_and_come_back(one: Any, two: Any) -> None:
    original = random_model("llama")
    for world in (one, two):
        saved = world["state"]
        assert saved["state"].keys() == dict(original.named_parameters()).keys()
        for name, value in saved["state"].items():
            assert torch.equal(value, original.state_dict()[name]), name
        assert torch.equal(saved["trained"], weights(original))
        assert torch.equal(saved["read"], weights(original))


def test_sync_refreshes_what_rollouts_read(one: Any, two: Any) -> None:
    for world in (one, two):
        pair = world["bfloat16"]
        original = weights(random_model("olmo3"))
        assert torch.equal(pair["trained"], original)
        assert torch.equal(pair["stale"], original.bfloat16().float())
        assert torch.equal(pair["read"], (original * 1.5).bfloat16().float())


def test_a_bad_loss_on_one_process_stops_all(one: Any, two: Any) -> None:
    assert [text.split(" (")[0] for text in two["errors"]] == ["the loss or its gradient is not finite"] * 2
    assert [text.split(" (")[0] for text in one["errors"]] == ["the loss or its gradient is not finite"]
