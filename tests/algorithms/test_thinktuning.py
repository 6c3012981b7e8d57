"""ThinkTuning's step over stubs: who is asked, what becomes of the answers, what is counted and kept."""

from typing import Any

import pytest

from tests.algorithms.stubs import END, Grader, World
from thinktwice_fast.algorithms.thinktuning.teacher import Answer, FeedbackRequest
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

pytestmark = pytest.mark.usefixtures("one_process")


def world_of(grader: Grader | None = None, **thinktuning: Any) -> World:
    options = ThinkTuningOptions(**thinktuning)
    rollout = RolloutOptions(max_response_tokens=100)
    return World(grader, algorithm="thinktuning", rollout=rollout, thinktuning=options)


def test_answers_that_can_be_used_are_spliced_graded_and_learned_in_their_groups() -> None:
    world, plain = world_of(), World(algorithm="grpo")
    step, as_sampled = world.algorithm.step(1), plain.algorithm.step(1)
    asked, metrics = iter(world.teacher.asked), step.metrics
    accepted = 0
    for group, sampled in zip(step.groups, as_sampled.groups, strict=True):
        assert group.prompt == sampled.prompt and len(group.rollouts) == 6
        for rollout, before in zip(group.rollouts, sampled.rollouts, strict=True):
            if not rollout.guide:
                assert (rollout.response, rollout.reward) == (before.response, before.reward)
                continue
            accepted += 1
            own = len(before.response) - 1
            assert rollout.response[:own] == before.response[:own] and rollout.response[-1] == END
            assert rollout.guide == [False] * own + [True] * (len(rollout.response) - own)
            assert rollout.text.startswith(before.text) and rollout.text.endswith("\\boxed{7}")
            assert rollout.reward == world.grader._reward(rollout.text)
        assert next(asked).question == group.problem.question
        assert sum(rollout.advantage for rollout in group.rollouts) == pytest.approx(0)
    assert {id(r) for part in world.updater.updates[0] for r in part} == {
        id(r) for g in step.groups for r in g.rollouts
    }
    refused = {name: n for name, n in metrics.items() if name.startswith("refused/") and n}
    assert 0 < accepted < 4 and refused.keys() <= {"refused/unparsed", "refused/unanswered"}
    assert metrics["teacher_answers"] == accepted + sum(refused.values()) == 4
    assert (metrics["teacher_acceptance"], metrics["guided_rate"]) == (accepted / 4, accepted / 24)
    members = [r for g in step.groups if any(m.guide for m in g.rollouts) for r in g.rollouts]
    for name, guided in (("reward_guided", True), ("reward_unguided", False)):
        rewards = [r.reward for r in members if bool(r.guide) is guided and r.reward is not None]
        assert metrics[name] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["entropy"] == pytest.approx(0.5) and step.generations == 24
    assert metrics["grading_timeouts"] == 4 + accepted  # one of each time that a group was graded


def test_counts_are_kept_and_the_teacher_is_asked_no_more_after_the_cutoff() -> None:
    world = world_of(decay_steps=4, cutoff=0.05)  # 0.1, 0.0775, 0.055, 0.0325
    answers = [world.algorithm.step(number).metrics["teacher_answers"] for number in range(1, 4)]
    assert answers == [4, 8, 12]
    state = world.algorithm.state()
    resumed = world_of(decay_steps=4, cutoff=0.05)
    resumed.algorithm.load_state(state)
    step = resumed.algorithm.step(4)
    assert step.metrics["teacher_answers"] == 12 and step.metrics["guided_fraction"] == 0 and not resumed.teacher.asked
    assert "teacher_acceptance" not in step.metrics and not any(r.guide for g in step.groups for r in g.rollouts)
    assert step.groups[0].problem.index == 12


def test_requests_may_name_a_behaviour_each() -> None:
    world = world_of(one_behaviour=True, fraction=1.0)
    metrics = world.algorithm.step(1).metrics
    named = {name.removeprefix("behaviour/"): count for name, count in metrics.items() if "behaviour" in name}
    assert {one.behaviour for one in world.teacher.asked} == {0, 1, 2, 3} and len(named) > 1
    assert named.keys() <= {"agreement", "conflict", "consultancy", "critique"}
    assert sum(named.values()) == metrics["teacher_acceptance"] * len(world.teacher.asked)


def test_a_word_now_and_then_while_no_answer_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of()
    nothing = Answer(refusal="unanswered", detail="the server: no reply in time")
    monkeypatch.setattr(world.teacher, "ask", lambda asked: [nothing for _ in asked])
    notes = [world.algorithm.step(number).notes for number in range(1, 6)]
    assert [bool(said) for said in notes] == [True, True, False, True, False]
    assert "none of the teacher's 8 answers" in notes[1][0] and "no reply in time" in notes[1][0]


def test_a_reward_that_fails_on_guidance_ends_the_step() -> None:
    world = world_of()
    asked: list[FeedbackRequest] = []

    def ask(requests: list[FeedbackRequest]) -> list[Answer]:
        asked.extend(requests)
        world.grader.error = UserError("reward mine.py:f raised ValueError")
        return [Answer("<opinion>correct</opinion><reason>a</reason><phrase>b</phrase>") for _ in requests]

    world.teacher.ask = ask  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match="raised ValueError"):
        world.algorithm.step(1)
    assert asked and not world.updater.updates
