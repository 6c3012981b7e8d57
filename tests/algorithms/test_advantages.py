"""Advantages of groups, and the figures of a phase."""

import math

import pytest

from tests.algorithms.stubs import problem
from thinktwice_fast.algorithms.metrics import Sample, rollout_metrics, sample_metrics
from thinktwice_fast.algorithms.policy_step import set_advantages
from thinktwice_fast.algorithms.sampler import SamplingTimes
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Rollout

pytestmark = pytest.mark.usefixtures("one_process")


def group(slot: int, *rewards: float | None) -> Group:
    made = Group(slot, problem(slot), problem(slot).messages, (1, 2, 3))
    made.rollouts = [Rollout(0, n, (1, 2, 3), [4, 5], reward=reward) for n, reward in enumerate(rewards)]
    return made


def advantages(made: Group) -> list[float]:
    return [rollout.advantage for rollout in made.rollouts]


def test_reward_minus_the_mean_of_its_own_group() -> None:
    first, second = group(0, 1, 0, 0, 0), group(7, 1, 1, 0, 1)
    set_advantages([first, second], "none")
    assert advantages(first) == [0.75, -0.25, -0.25, -0.25]
    assert advantages(second) == [0.25, 0.25, -0.75, 0.25]


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
def test_equal_rewards_give_exactly_nothing(scale: str) -> None:
    right, wrong, mixed = group(0, 1, 1, 1), group(1, 0, 0, 0), group(2, 0.1, 0.1, 0.1)
    set_advantages([right, wrong, mixed], scale)  # type: ignore[arg-type]
    assert advantages(right) == advantages(wrong) == advantages(mixed) == [0.0] * 3


def test_scaling_by_the_deviation_of_the_group_or_the_batch() -> None:
    first, second = group(0, 1, 0), group(1, 3, 0)
    set_advantages([first, second], "group")
    assert advantages(first) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5)
    assert advantages(second) == pytest.approx(advantages(first), rel=1e-5)
    set_advantages([first, second], "batch")
    deviation = math.sqrt(2.0)  # of 1, 0, 3, 0: mean 1, squares 0 + 1 + 4 + 1, divided by 3
    assert advantages(first) == pytest.approx([0.5 / deviation, -0.5 / deviation], rel=1e-5)
    assert advantages(second) == pytest.approx([1.5 / deviation, -1.5 / deviation], rel=1e-5)


def test_dividing_by_the_mean_takes_rewards_that_are_not_negative() -> None:
    first, second = group(0, 1, 0, 0, 0), group(1, 0, 0)
    set_advantages([first, second], "mean")
    assert advantages(first) == [3.0, -1.0, -1.0, -1.0] and advantages(second) == [0.0, 0.0]
    with pytest.raises(UserError, match=r"a reward is -0\.5: let the reward function return none below 0"):
        set_advantages([first, group(1, 1, -0.5)], "mean")


def test_samples_without_reward_are_left_out() -> None:
    some, none = group(0, None, 1, 0, None), group(1, None, None)
    set_advantages([some, none], "none")
    assert advantages(some) == [0.0, 0.5, -0.5, 0.0]
    assert advantages(none) == [0.0, 0.0]
    set_advantages([none], "batch")
    set_advantages([], "group")


def test_metrics_by_hand() -> None:
    first, second, third = group(0, 1, 0, 0, None), group(1, 1, 1), group(2, None)
    first.rollouts[0].response = [4, 5, 6, 7]
    first.rollouts[0].text = "so \\boxed{3}"
    second.rollouts[0].guide = [False, True]
    for made in (first, second, third):
        for rollout in made.rollouts:
            rollout.finished = rollout is not third.rollouts[0]
            rollout.entropies = [0.5] * rollout.sampled
    third.prompt = tuple(range(10))
    groups = [first, second, third]
    samples = Sample.of(groups)
    got = sample_metrics(samples) | rollout_metrics(
        samples, SamplingTimes(0.5, 0.25, 1, 0) + SamplingTimes(1.5, 0, 2, 4)
    )
    assert got == pytest.approx(
        {
            "response_tokens": 16 / 7,
            "response_tokens_max": 4,
            "prompt_tokens": (6 * 3 + 10) / 7,
            "truncation_rate": 1 / 7,
            "boxed_rate": 1 / 7,
            "entropy": 0.5,
            "rewards_missing": 2,
            "tokens_per_second": 7.5,
            "seconds_rollout": 2,
            "seconds_grading": 0.25,
            "grading_timeouts": 3,
            "preemptions": 4,
            "reward": 3 / 5,
            "reward_std": math.sqrt(1 / 3) / 2,
            "group_signal_rate": 1 / 2,
        }
    )


def test_metrics_where_nothing_was_graded() -> None:
    got = sample_metrics(Sample.of([group(0, None, None)]))
    assert got["rewards_missing"] == 2
    assert not {"reward", "reward_std", "group_signal_rate"} & got.keys()
