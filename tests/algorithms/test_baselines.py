"""GRPO, DAPO and STaR: which samples they learn from, and that a resumed run goes on as if never stopped."""

import json
import math
from typing import Any

import pytest

from tests.algorithms.stubs import END, Grader, World, problem
from tests.small_models import bpe_tokenizer
from thinktwice_fast.algorithms.dapo import has_signal, overlong_share
from thinktwice_fast.algorithms.policy_step import raw_reward
from thinktwice_fast.algorithms.star import finetune_steps, shuffled_batch
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import DapoOptions, StarOptions, UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.update.batches import Example

pytestmark = pytest.mark.usefixtures("one_process")


def asked(world: World) -> list[str]:
    """The question of each group that was sampled."""
    return [str(bpe_tokenizer().decode(request.prompt)) for request, _ in world.engine.asked]


def responses(step: Step) -> list[Any]:
    return [(group.slot, group.prompt, [rollout.response for rollout in group.rollouts]) for group in step.groups]


def test_grpo_solves_the_next_problems_as_a_solve_step_does() -> None:
    world = World(algorithm="grpo")
    first, second = world.algorithm.step(1), world.algorithm.step(2)
    assert responses(first) == responses(World().algorithm.step(1))
    assert (first.phase, second.phase) == ("solve", "solve")
    assert [group.problem.index for group in second.groups] == [4, 5, 6, 7]
    assert first.generations == 24


# DAPO: of two samples of a problem, one in two on average is rewarded: half of the groups have a signal.


def dapo(grader: Grader | None = None, **options: Any) -> World:
    return World(
        grader, algorithm="dapo", samples_per_problem=2, update=UpdateOptions(minibatch_sequences=4),
        dapo=DapoOptions(**({"overlong_buffer_tokens": 0} | options)),
    )  # fmt: skip


def test_dapo_draws_until_the_batch_is_full_of_groups_with_signal() -> None:
    world = dapo()
    steps = [world.algorithm.step(number) for number in range(1, 6)]
    draws = [int(step.metrics["draws"]) for step in steps]
    assert max(draws) > 2
    position, short = 0, False
    for number, step in enumerate(steps):
        drawn = range(position, position + step.generations // 2)
        graded = {solved.index: texts for solved, _, texts in world.grader.submitted}
        rewards = {index: [Grader()._reward(text) or 0.0 for text in texts] for index, texts in graded.items()}
        signal = [index for index in drawn if sum(rewards[index]) == 1]
        assert [group.problem.index for group in step.groups] == signal[:4]
        size, found, sizes = 0, 0, []
        while found < 4:  # each draw but the first of what the ones before leave missing, by their share of signal
            sizes.append(4 if not found else min(4, math.ceil((4 - found) / (found / size))))
            size += sizes[-1]
            found = len([index for index in signal if index < position + size])
        assert (len(sizes), size) == (draws[number], len(drawn))
        short = short or sizes[-1] < 4
        assert all(map(has_signal, step.groups))
        assert step.metrics["samples_discarded"] == step.generations - 8
        assert step.metrics["reward"] == pytest.approx(sum(sum(rewards[n]) for n in drawn) / (2 * len(drawn)))
        assert step.metrics["group_signal_rate"] == len(signal) / len(drawn)
        # Mini-batches hold the groups in that order, two each.
        minibatches = [[rollout.sample_id for rollout in part] for part in world.updater.updates[number]]
        ids = [[rollout.sample_id for rollout in group.rollouts] for group in step.groups]
        assert minibatches == [ids[0] + ids[1], ids[2] + ids[3]]
        position = drawn.stop
    assert short, "some draws are smaller than a batch"
    ids = [sample for request, _ in world.engine.asked for sample in request.sample_ids]
    assert len(ids) == len(set(ids)) == sum(step.generations for step in steps)


def test_dapo_stops_at_its_bound_with_nothing_changed() -> None:
    world = dapo(max_draws=1)
    with pytest.raises(UserError, match=r"--dapo\.max_draws 1: of 4 problems drawn \d have .*, and a batch takes 4"):
        for number in range(1, 9):
            state = world.algorithm.state()
            world.algorithm.step(number)
    assert world.algorithm.state() == state
    world.config.dapo.max_draws = "off"
    assert world.algorithm.step(number).metrics["draws"] > 1


def test_overlong_answers_are_rewarded_less_in_the_advantage_alone() -> None:
    plain, shaped = dapo().algorithm.step(1), dapo(overlong_buffer_tokens=40, overlong_penalty=0.5).algorithm.step(1)
    assert shaped.metrics["reward"] == plain.metrics["reward"]
    shares = []
    for before, after in zip(plain.groups, shaped.groups, strict=True):
        share = [overlong_share(len(rollout.response), 64, 40) for rollout in before.rollouts]
        assert all(0 < value < 1 for value in share)
        shares += share
        for rollouts, penalty in ((before.rollouts, 0.0), (after.rollouts, 0.5)):
            rewards = [raw_reward(r) - penalty * value for r, value in zip(rollouts, share, strict=True)]
            assert [r.advantage for r in rollouts] == pytest.approx([r - sum(rewards) / 2 for r in rewards])
    assert plain.metrics["overlong_penalty"] == 0
    assert shaped.metrics["overlong_penalty"] == pytest.approx(0.5 * sum(shares) / len(shares))
    # The published form: 0 up to 16384 of 20480 tokens, -1 at the end.
    assert [overlong_share(tokens, 20480, 4096) for tokens in (1, 16384, 18432, 20480)] == [0, 0, 0.5, 1]
    assert overlong_share(64, 64, 0) == 0


# STaR: two sampling steps of four problems, then three fine-tuning steps, then four, ...


def star(grader: Grader | None = None, **options: Any) -> World:
    given: dict[str, Any] = {"problems_per_iteration": 8, "finetune_steps": 3, "finetune_growth": 1.34} | options
    return World(grader, algorithm="star", samples_per_problem=2, star=StarOptions(**given))


def right(step: Step) -> list[Example]:
    return [
        Example(group.prompt, rollout.response)
        for group in step.groups
        for rollout in group.rollouts
        if rollout.reward == 1 and rollout.finished
    ]


def test_star_fine_tunes_the_start_model_on_what_is_right() -> None:
    world = star()
    steps = [world.algorithm.step(number) for number in range(1, 12)]
    assert [step.phase for step in steps] == ["solve"] * 2 + ["sft"] * 3 + ["solve"] * 2 + ["sft"] * 4
    assert [step.metrics["iteration"] for step in steps] == [1] * 5 + [2] * 6
    assert [step.generations for step in steps] == [8, 8, 0, 0, 0, 8, 8, 0, 0, 0, 0]
    for first, batches in ((0, world.updater.learned[:4]), (5, world.updater.learned[4:])):
        kept = [right(step) for step in steps[first : first + 2]]
        assert [step.metrics["kept"] for step in steps[first : first + 2]] == [len(part) for part in kept]
        together = [example for part in kept for example in part]
        restart, *batches = batches
        assert restart == "restart" and "restart" not in batches
        flat = [example for batch in batches for example in batch]
        # Whole epochs of the kept answers and no others, each in an order of its own.
        for start in range(0, len(flat) - len(together) + 1, len(together)):
            epoch = flat[start : start + len(together)]
            assert sorted(epoch, key=repr) == sorted(together, key=repr) and epoch != together
    # The second iteration goes on with other problems, and is sampled by what was fine-tuned.
    assert [group.problem.index for step in steps[5:7] for group in step.groups] == list(range(8, 16))
    assert [version for _, version in world.engine.asked] == [0] * 8 + [4] * 8


def test_star_rationalizes_what_it_did_not_solve() -> None:
    world = star(rationalize=True, hint="Hint: {answer}.")
    step = world.algorithm.step(1)
    solved = {group.slot for group in step.groups if any(r.reward == 1 and r.finished for r in group.rollouts)}
    assert 0 < len(solved) < 4
    questions = asked(world)
    hinted = [index for index in range(4) if index not in solved]
    assert ["Hint" in question for question in questions] == [False] * 4 + [True] * len(hinted)
    for index, question in zip(hinted, questions[4:], strict=True):
        assert f"What is {index} + 12? Hint: {problem(index).answer}." in question
    assert step.generations == 8 + 2 * len(hinted)
    kept = {tuple(prompt): answers for prompt, answers in world.algorithm.state()["kept"]}
    assert step.metrics["kept"] == sum(map(len, kept.values()))
    assert step.metrics["rationalized"] == step.metrics["kept"] - len(right(step)) > 0
    assert set(kept) <= {group.prompt for group in step.groups}, "the hint is there to be learned from"
    assert all(answer[-1] == END for answers in kept.values() for answer in answers)


def test_star_keeps_equal_answers_once_unless_told_otherwise() -> None:
    for dedupe, count in ((True, 1), (False, 2)):
        world = star(dedupe=dedupe)
        step = world.algorithm.step(1)
        group = next(group for group in step.groups if any(r.reward == 1 and r.finished for r in group.rollouts))
        one = next(rollout for rollout in group.rollouts if rollout.reward == 1 and rollout.finished)
        group.rollouts = [one, one]
        algorithm: Any = world.algorithm
        assert len(algorithm._right(group)) == count


def test_star_with_nothing_right_says_what_to_do() -> None:
    class Wrong(Grader):
        def _reward(self, text: str) -> float:
            return 0.0

    world = star(Wrong())
    world.algorithm.step(1), world.algorithm.step(2)
    with pytest.raises(UserError, match=r"^none of the answers sampled in iteration 1 is right.*--star\.rationalize"):
        world.algorithm.step(3)
    assert world.algorithm.state()["tuned"] == 0 and not world.updater.learned
    more = star(problems_per_iteration=12)  # what the line says to do
    more.algorithm.load_state(world.algorithm.state())
    assert [more.algorithm.step(number).phase for number in (3, 4)] == ["solve", "sft"]


def test_batches_visit_every_kept_answer_in_each_epoch() -> None:
    places = [shuffled_batch(5, first, 3, "x") for first in range(0, 30, 3)]
    flat = [place for batch in places for place in batch]
    epochs = [flat[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len({tuple(e) for e in epochs}) > 3
    assert shuffled_batch(1, 7, 4, "x") == [0] * 4
    assert [finetune_steps(StarOptions(), n) for n in range(4)] == [40, 48, 58, 69]  # 20 % more each


@pytest.mark.parametrize(("make", "last"), [(dapo, 3), (star, 8)], ids=["dapo", "star"])
def test_a_resumed_run_goes_on_as_if_never_stopped(make: Any, last: int) -> None:
    whole = make()
    states, versions, steps = [whole.algorithm.state()], [0], []
    for number in range(1, last + 1):
        steps.append(whole.algorithm.step(number))
        states.append(json.loads(json.dumps(whole.algorithm.state())))
        versions.append(whole.updater.version)
    for done in range(last):
        resumed = make()
        resumed.algorithm.load_state(states[done])
        resumed.updater.version = versions[done]
        for number in range(done + 1, last + 1):
            step = resumed.algorithm.step(number)
            assert responses(step) == responses(steps[number - 1])
            assert json.loads(json.dumps(resumed.algorithm.state())) == states[number]
        learned = whole.updater.learned
        assert resumed.updater.learned == learned[len(learned) - len(resumed.updater.learned) :]
