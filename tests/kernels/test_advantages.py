"""group_advantages against its definition."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.formulas import slow_advantages
from thinktwice_kernels import group_advantages
from thinktwice_kernels.advantages import ScaleRewards

finite = st.floats(-100, 100, allow_nan=False, width=32)
layouts = st.lists(st.tuples(finite, st.sampled_from([-(2**40), -1, 0, 3, 7, 2**40])), max_size=24)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
@settings(max_examples=60)
@given(rows=layouts, eps=st.sampled_from([1e-6, 1e-4, 0.5]))
def test_equals_the_definition(scale: ScaleRewards, rows: list[tuple[float, int]], eps: float) -> None:
    rewards, ids = [abs(r) if scale == "mean" else r for r, _ in rows], [i for _, i in rows]
    got = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64), scale_rewards=scale, eps=eps
    )
    want = torch.tensor(slow_advantages(rewards, ids, scale, eps), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6 + 0.1, -7e-20])
@pytest.mark.parametrize("size", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(
    scale: ScaleRewards, reward: float, size: int, dtype: torch.dtype
) -> None:
    rewards = torch.tensor([reward] * size + [0.0, 1.0], dtype=dtype)
    ids = torch.tensor([5] * size + [2, 2])
    advantages = group_advantages(rewards, ids, scale_rewards=scale)
    assert advantages[:size].tolist() == [0.0] * size
    assert advantages[size] == -advantages[size + 1] != 0


def test_a_mean_of_zero_gives_zero() -> None:
    rewards, ids = torch.tensor([0.0, 0, 1, 0, 0, 0, -2, 2]), torch.tensor([7, 7, 3, 3, 3, 3, 5, 5])
    advantages = group_advantages(rewards, ids, scale_rewards="mean")
    assert advantages.tolist() == [0.0, 0, 3, -1, -1, -1, 0, 0]


def test_large_rewards_keep_their_differences() -> None:
    rewards = torch.tensor([2.0**24, 2.0**24 + 2], dtype=torch.float32)
    assert group_advantages(rewards, torch.tensor([0, 0])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_result_is_float32(dtype: torch.dtype) -> None:
    advantages = group_advantages(torch.tensor([0, 1, 1, 0]).to(dtype), torch.tensor([0, 0, 1, 1], dtype=torch.int32))
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [-0.5, 0.5, 0.5, -0.5]


def test_a_nan_reward_spoils_its_own_group_only() -> None:
    rewards = torch.tensor([1.0, math.nan, 0.0, 1.0])
    advantages = group_advantages(rewards, torch.tensor([4, 4, 9, 9]), scale_rewards="group")
    assert advantages[:2].isnan().all() and advantages[2:].isfinite().all()
    assert group_advantages(rewards, torch.tensor([4, 4, 9, 9]), scale_rewards="batch").isnan().all()


def test_an_infinite_reward_gives_nan() -> None:
    advantages = group_advantages(torch.tensor([math.inf, 1.0, 0.0]), torch.tensor([1, 1, 2]))
    assert not advantages[:2].isfinite().any()
    assert advantages[2] == 0


def test_no_sequences() -> None:
    for scale in get_args(ScaleRewards):
        assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64), scale_rewards=scale).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rewards": torch.zeros(2, 2)}, "one-dimensional"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, "same length"),
        ({"group_ids": torch.zeros(2)}, "pass integers"),
        ({"scale_rewards": "std"}, "choose one of none, group, batch, mean"),
        ({"eps": 0.0}, "choose a positive number"),
    ],
)
def test_bad_input_is_refused(arguments: dict, match: str) -> None:
    good = {"rewards": torch.zeros(2), "group_ids": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=match):
        group_advantages(**{**good, **arguments})
