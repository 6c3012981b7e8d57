"""The teacher's part of a step: choose rollouts, ask about them, splice what comes back, grade anew, count."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.thinktuning.feedback import REFUSALS, Refusal, parse, splice
from thinktwice_fast.algorithms.thinktuning.guided import choose_behaviour, choose_guided, guided_fraction
from thinktwice_fast.algorithms.thinktuning.teacher import Answer, FeedbackRequest, Teacher
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Rollout


@dataclass(frozen=True)
class _Outcome:
    """What became of one request."""

    refusal: Refusal | None
    behaviour: str | None  # that was asked for by name
    detail: str  # what failed, in words


@dataclass(frozen=True)
class Guidance:
    """What a step's teacher did, over all processes."""

    asked: int
    accepted: int
    timeouts: int  # answers whose grader was stopped when they were graded anew, on this process
    detail: str  # of the first request that failed
    metrics: dict[str, float]  # by name without their phase


class Guide:
    """Guides some of a step's rollouts.

    Args:
        config: the run's.
        sampler: knows the chat format and the grader.
        teacher: is asked.
        behaviours: names of those that a request may ask for.
    """

    def __init__(self, config: Config, sampler: Sampler, teacher: Teacher, behaviours: Sequence[str]):
        self._config = config
        self._sampler = sampler
        self._teacher = teacher
        self._behaviours = behaviours

    def __call__(self, groups: Sequence[Group], number: int) -> Guidance:
        """Splice feedback into some rollouts of filled groups, and grade these anew. Collective.

        A rollout whose feedback does not come, or can't be used, stays as it is and is counted by reason.

        Args:
            groups: this process's.
            number: of the global step.

        Raises:
            UserError: on every process, when the reward function fails on any, or a teacher that is a model here does.
        """
        started, timeouts = time.perf_counter(), self._sampler.grader.timeouts
        fraction = guided_fraction(self._config.thinktuning, self._config.run.steps, number)
        outcomes: list[_Outcome] = []
        error: UserError | parallel.OtherFailed | None = None
        try:
            outcomes = self._guide(groups, fraction, number)
            self._grade(groups)
        except (UserError, parallel.OtherFailed) as caught:
            error = caught
        parallel.agree(error)
        metrics = {"guided_fraction": fraction, **_member_metrics(groups)}
        metrics["seconds_teacher"] = max(parallel.gather(time.perf_counter() - started))
        return _counted(parallel.gather_flat(outcomes), metrics, self._sampler.grader.timeouts - timeouts)

    def _guide(self, groups: Sequence[Group], fraction: float, number: int) -> list[_Outcome]:
        rollouts: list[Rollout] = []
        asked: list[FeedbackRequest] = []
        seed, stop_ids = self._config.seed, self._sampler.stop_ids
        for group in groups:
            for place, rollout in choose_guided(group, fraction, stop_ids, seed, number):
                behaviour = None
                if self._config.thinktuning.one_behaviour:
                    behaviour = choose_behaviour(len(self._behaviours), seed, number, group.slot, place)
                rollouts.append(rollout)
                asked.append(FeedbackRequest(group.problem.question, rollout.text, behaviour))
        answers = self._teacher.ask(asked)
        refusals = [self._take(rollout, answer) for rollout, answer in zip(rollouts, answers, strict=True)]
        names = [None if one.behaviour is None else self._behaviours[one.behaviour] for one in asked]
        details = [answer.detail for answer in answers]
        return [_Outcome(*columns) for columns in zip(refusals, names, details, strict=True)]

    def _take(self, rollout: Rollout, answer: Answer) -> Refusal | None:
        if answer.refusal is not None:
            return answer.refusal
        feedback = parse(answer.text)
        if feedback is None:
            return "unparsed"
        return splice(rollout, feedback, self._sampler.chat, self._sampler.stop_ids, self._config)

    def _grade(self, groups: Sequence[Group]) -> None:
        grader = self._sampler.grader
        gradings = [
            (guided, grader.submit(group.problem, group.messages, [rollout.text for rollout in guided]))
            for group in groups
            if (guided := [rollout for rollout in group.rollouts if rollout.guide])
        ]
        for guided, grading in gradings:
            for rollout, reward in zip(guided, grading.result(), strict=True):
                rollout.reward = reward


def _member_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Share of the rollouts that are guided, and rewards inside the groups with a guided one. Collective."""
    own = [
        (bool(rollout.guide), rollout.reward, any(other.guide for other in group.rollouts))
        for group in groups
        for rollout in group.rollouts
    ]
    everyone = parallel.gather_flat(own)
    metrics = {"guided_rate": sum(guided for guided, _, _ in everyone) / len(everyone)}
    for name, wanted in (("reward_guided", True), ("reward_unguided", False)):
        rewards = [reward for guided, reward, among in everyone if among and guided is wanted and reward is not None]
        if rewards:
            metrics[name] = sum(rewards) / len(rewards)
    return metrics


def _counted(outcomes: Sequence[_Outcome], metrics: dict[str, float], timeouts: int) -> Guidance:
    accepted = sum(outcome.refusal is None for outcome in outcomes)
    refusals = Counter(outcome.refusal for outcome in outcomes)
    metrics |= {f"refused/{reason}": float(refusals[reason]) for reason in REFUSALS}
    if outcomes:
        metrics["teacher_acceptance"] = accepted / len(outcomes)
    behaviours = Counter(outcome.behaviour for outcome in outcomes if outcome.refusal is None)
    metrics |= {f"behaviour/{name}": float(count) for name, count in behaviours.items() if name is not None}
    detail = next((outcome.detail for outcome in outcomes if outcome.detail), "")
    return Guidance(len(outcomes), accepted, timeouts, detail, metrics)
