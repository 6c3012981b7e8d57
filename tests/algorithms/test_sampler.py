"""Sampling groups: ids, texts, grading, errors."""

import pytest

from tests.algorithms.stubs import END, WORDS, World, problem
from thinktwice_fast.algorithms.sampler import SampleSpec
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Sampling

pytestmark = pytest.mark.usefixtures("one_process")


def filled(world: World, stream: int = 1, slots: tuple[int, ...] = (0, 1, 5)) -> list[Group]:
    groups = [world.sampler.solve_group(slot, problem(slot)) for slot in slots]
    world.sampler.fill(groups, SampleSpec(4, Sampling(), stream, seed=3, version=2))
    return groups


def test_each_group_gets_its_own_samples_in_order_with_their_rewards() -> None:
    world = World()
    for group in filled(world):
        ids = [rollout.sample_id for rollout in group.rollouts]
        assert len(ids) == 4 and ids == sorted(ids)
        for rollout in group.rollouts:
            assert rollout.prompt == group.prompt
            assert rollout.text == f"{WORDS} 3 2 {rollout.sample_id}"
            assert rollout.reward == world.grader._reward(rollout.text)
        _, prompt, texts = next(entry for entry in world.grader.submitted if entry[0] is group.problem)
        assert prompt is group.messages
        assert texts == [rollout.text for rollout in group.rollouts]


def test_sample_ids_meet_in_no_two_slots_and_no_two_steps() -> None:
    ids = [
        rollout.sample_id
        for stream in (1, 2, 3)
        for group in filled(World(), stream, tuple(range(6)))
        for rollout in group.rollouts
    ]
    assert len(ids) == len(set(ids)) == 3 * 6 * 4
    assert all(0 <= number < 2**63 for number in ids)


def test_the_weights_version_reaches_the_engine() -> None:
    world = World()
    filled(world)
    assert {version for _, version in world.engine.asked} == {2}


def test_an_error_of_the_reward_is_the_users() -> None:
    world = World()
    world.grader.error = UserError("my_file.py: raised ZeroDivisionError: mend it")
    with pytest.raises(UserError, match=r"^my_file\.py: raised ZeroDivisionError: mend it$"):
        filled(world)


def test_preemptions_are_those_of_the_call() -> None:
    world = World()
    for slots in ((0, 1, 5), (2,)):
        groups = [world.sampler.solve_group(slot, problem(slot)) for slot in slots]
        times = world.sampler.fill(groups, SampleSpec(4, Sampling(), stream=1, seed=3, version=0))
        assert times.preemptions == 4 * len(slots)


def test_texts_hold_no_stop_token() -> None:
    for group in filled(World()):
        for rollout in group.rollouts:
            assert (rollout.response[-1] == END) == rollout.finished
            assert "<|im_end|>" not in rollout.text
