"""ThinkTwice's pair of steps, and the traps in it."""

import copy
import dataclasses
import json
from collections import Counter
from typing import Any

import pytest
import torch

from tests.algorithms.stubs import END, INSTRUCTION, Grader, World, problem
from tests.update.cases import config, padded_logps, updater
from thinktwice_fast.algorithms.bases import choose_base
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.algorithms.thinktwice import ThinkTwice
from thinktwice_fast.config import ThinkTwiceOptions, UpdateOptions
from thinktwice_fast.model.agreement import as_transformers
from thinktwice_fast.records import Base, Group, Rollout
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.update.batches import pack

pytestmark = pytest.mark.usefixtures("one_process")


def pair(world: World, first: int = 1) -> tuple[Step, Step]:
    return world.algorithm.step(first), world.algorithm.step(first + 1)


def test_steps_alternate_and_a_pair_shares_its_problems() -> None:
    world = World()
    steps = [world.algorithm.step(number) for number in range(1, 7)]
    assert [step.phase for step in steps] == ["solve", "refine"] * 3
    asked = [[group.problem.index for group in step.groups] for step in steps]
    assert asked == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2 + [[8, 9, 10, 11]] * 2
    assert all("/" not in name for step in steps for name in step.metrics)


def test_several_solve_steps_to_a_refine_step() -> None:
    """Each has its own problems, and the last one's are refined."""
    world = World(thinktwice=ThinkTwiceOptions(refine_every=3))
    steps = [world.algorithm.step(number) for number in range(1, 9)]
    assert [step.phase for step in steps] == ["solve", "solve", "solve", "refine"] * 2
    assert [step.groups[0].problem.index for step in steps] == [0, 4, 8, 8, 12, 16, 20, 20]
    bases = [group.base for group in steps[3].groups]
    assert [
        base and base.response in [tuple(r.response) for r in group.rollouts]
        for base, group in zip(bases, steps[2].groups, strict=True)
    ] == [True] * 4


def test_a_refine_group_refines_one_solution_of_its_own_problem() -> None:
    solve, refine = pair(World())
    for before, after in zip(solve.groups, refine.groups, strict=True):
        assert before.base is None and after.base is not None
        candidates = [(tuple(r.response), r.text, r.reward) for r in before.rollouts]
        assert (after.base.response, after.base.text, after.base.reward) in candidates
        assert len(after.rollouts) == 6
        assert all(rollout.prompt == after.prompt for rollout in after.rollouts)
        question, solution, request = after.messages
        assert (question,) == before.messages
        assert solution == {"role": "assistant", "content": after.base.text}
        assert request == {"role": "user", "content": INSTRUCTION}


def test_the_base_is_older_than_the_update_and_the_refinement_is_not() -> None:
    world = World(update=UpdateOptions(minibatch_sequences=12))
    _, refine = pair(world)
    assert [version for _, version in world.engine.asked] == [0] * 4 + [2] * 4
    for group in refine.groups:
        assert group.base is not None
        assert group.base.text.split()[-2] == "0"
        assert all(rollout.text.split()[-2] == "2" for rollout in group.rollouts)


def test_no_two_steps_draw_with_the_same_random_numbers() -> None:
    world = World()
    for number in range(1, 5):
        world.algorithm.step(number)
    ids = [sample for request, _ in world.engine.asked for sample in request.sample_ids]
    assert len(ids) == len(set(ids)) == 4 * 4 * 6


def test_the_end_of_the_base_stands_in_the_prompt_once() -> None:
    solve, refine = pair(World())
    finished = Counter[bool]()
    for before, after in zip(solve.groups, refine.groups, strict=True):
        assert after.base is not None
        base = [token for token in after.base.response if token != END]
        finished[END in after.base.response] += 1
        assert before.prompt.count(END) == 1
        # The question's, the base's and the instruction's.
        assert after.prompt.count(END) == 3
        assert list(after.prompt[: len(before.prompt) + len(base) + 1]) == [*before.prompt, *base, END]
    assert finished[True] and finished[False], "both kinds of base must be among them"


def test_the_gradient_falls_on_the_refinement_alone() -> None:
    world = World()
    _, refine = pair(world)
    (minibatch,) = world.updater.updates[-1]
    trained = [rollout for group in refine.groups for rollout in group.rollouts]
    assert list(map(id, minibatch)) == list(map(id, trained))
    row = pack(minibatch, torch.device("cpu"))
    assert row.targets.tolist() == [token for rollout in trained for token in rollout.response]
    for group in refine.groups:
        assert group.base is not None
        base = " ".join(map(str, group.base.response))
        for rollout in group.rollouts:
            part = pack([rollout], torch.device("cpu"))
            assert base in " ".join(map(str, part.input_ids.tolist()))
            assert int(part.select[0]) == len(group.prompt) - 1


def test_mini_batches_hold_whole_groups_in_order() -> None:
    world = World(update=UpdateOptions(minibatch_sequences=12))
    step = world.algorithm.step(1)
    slots = [[rollout.sample_id for rollout in minibatch] for minibatch in world.updater.updates[0]]
    groups = [[rollout.sample_id for rollout in group.rollouts] for group in step.groups]
    assert slots == [groups[0] + groups[1], groups[2] + groups[3]]


def test_samples_without_reward_are_not_trained_on() -> None:
    world = World(Grader(missing_one_in=3))
    step = world.algorithm.step(1)
    (minibatch,) = world.updater.updates[0]
    graded = [rollout for group in step.groups for rollout in group.rollouts if rollout.reward is not None]
    assert list(map(id, minibatch)) == list(map(id, graded))
    assert 0 < len(graded) < 24
    assert step.metrics["rewards_missing"] == 24 - len(graded)


def solved(*rewards: float | None, slot: int = 0) -> Group:
    group = Group(slot, problem(slot), problem(slot).messages, (1, 2))
    group.rollouts = [Rollout(0, n, (1, 2), [n, END], text=str(n), reward=r) for n, r in enumerate(rewards)]
    return group


def test_uniform_choice_ignores_correctness() -> None:
    right, mixed = solved(1, 1, 1, 1), solved(0, 1, 0, None)
    chosen = [choose_base(right, "uniform", seed, 1).text for seed in range(400)]
    assert chosen == [choose_base(mixed, "uniform", seed, 1).text for seed in range(400)]
    # 400 draws of 4: each 100 times, with a standard deviation of sqrt(400 * 1/4 * 3/4) = 8.7; five of them.
    assert all(abs(count - 100) < 44 for count in Counter(chosen).values()) and len(set(chosen)) == 4


def test_choice_follows_from_seed_step_and_slot() -> None:
    def chosen(seed: int, step: int) -> list[str]:
        return [choose_base(solved(*[0.0] * 8, slot=slot), "uniform", seed, step).text for slot in range(20)]

    assert chosen(1, 1) == chosen(1, 1)
    assert len({tuple(chosen(seed, step)) for seed in range(3) for step in range(3)}) == 9
    assert len(set(chosen(1, 1))) > 3


def test_wrong_first() -> None:
    texts = {choose_base(solved(1, 0, None, 0.5), "wrong_first", seed, 1).text for seed in range(60)}
    assert texts == {"1", "3"}
    texts = {choose_base(solved(1, 1, None), "wrong_first", seed, 1).text for seed in range(60)}
    assert texts == {"0", "1", "2"}


def test_the_option_reaches_the_choice() -> None:
    def rewards(selection: str) -> set[float | None]:
        refined = [pair(World(selection=selection, seed=seed))[1] for seed in range(5)]
        return {group.base.reward for step in refined for group in step.groups if group.base}

    assert rewards("wrong_first") == {0.0}
    assert rewards("uniform") == {0.0, 1.0}


def test_with_a_real_model_the_weights_move_between_base_and_refinement() -> None:
    """The base's log-probabilities are those of the first weights, the refinements' those of the updated ones."""
    options = config()
    options.problems_per_step, options.samples_per_problem = 2, 4
    options.rollout.max_response_tokens = 12
    made = updater(options, learning_rate=0.5)
    engine = Engine(made.models.rollout, frozenset({END}), options.rollout, 200)
    world = World()
    sampler = dataclasses.replace(world.sampler, engine=engine)
    problems: Any = [problem(0), problem(1)]
    first = copy.deepcopy(made.models.rollout)
    algorithm = ThinkTwice(options, problems, sampler, made)
    solve = algorithm.step(1)
    second = copy.deepcopy(made.models.rollout)
    assert made.version == 1
    refine = algorithm.step(2)
    assert made.version == 2

    def mismatch(model: Any, step: Step) -> float:
        """Largest difference of a log-probability under ``model`` from the engine's."""
        rollouts = [rollout for group in step.groups for rollout in group.rollouts]
        noted = torch.tensor([logp for rollout in rollouts for logp in rollout.logps])
        with torch.no_grad():
            return float((padded_logps(as_transformers(model, "sdpa"), rollouts) - noted).abs().max())

    assert mismatch(first, solve) < 1e-4
    assert mismatch(second, refine) < 1e-4
    assert mismatch(first, refine) > 1e-2
    for before, after in zip(solve.groups, refine.groups, strict=True):
        assert after.base is not None
        assert after.base.response in [tuple(rollout.response) for rollout in before.rollouts]


def outcome(step: Step) -> list[Any]:
    return [(group.prompt, group.base, [rollout.response for rollout in group.rollouts]) for group in step.groups]


@pytest.mark.parametrize("refine_every", [1, 2])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_resumed_run_goes_on_as_if_never_stopped(done: int, refine_every: int) -> None:
    """Also in the middle of a pair: the next step refines, and the same bases."""
    options = ThinkTwiceOptions(refine_every=refine_every)
    whole = World(thinktwice=options)
    steps = [whole.algorithm.step(number) for number in range(1, 6)]
    first = World(thinktwice=options)
    for number in range(1, done + 1):
        first.algorithm.step(number)
    state = json.loads(json.dumps(first.algorithm.state()))
    second = World(thinktwice=options)
    second.updater.version = first.updater.version
    second.algorithm.load_state(state)
    assert second.algorithm.state() == first.algorithm.state()
    for number in range(done + 1, 6):
        step = second.algorithm.step(number)
        assert step.phase == steps[number - 1].phase
        assert outcome(step) == outcome(steps[number - 1])


def test_the_state_in_the_middle_of_a_pair() -> None:
    world = World()
    solve = world.algorithm.step(1)
    state = world.algorithm.state()
    assert state["position"] == 0 and sorted(state["bases"]) == ["0", "1", "2", "3"]
    for slot, saved in state["bases"].items():
        base = Base(tuple(saved["response"]), saved["text"], saved["reward"])
        assert base in [Base(tuple(r.response), r.text, r.reward) for r in solve.groups[int(slot)].rollouts]
    world.algorithm.step(2)
    assert world.algorithm.state() == {"position": 4, "bases": {}, "questions": {}}
