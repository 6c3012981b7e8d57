"""Samples groups and has them graded while later samples still decode."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinktwice_fast import parallel
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Base, Group, Problem, Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine, OnEnd
from thinktwice_fast.tasks.grading import Graders
from thinktwice_fast.tasks.pool import Grading
from thinktwice_fast.tasks.prompts import ChatFormat

Gradings = list[tuple[Group, Grading]]  # complete groups with their rewards on the way


@dataclass(frozen=True)
class SamplingTimes:
    """What calls of ``Sampler.fill`` took on this process."""

    rollout: float  # seconds of sampling
    grading: float  # seconds of waiting for graders after the last sample was drawn
    timeouts: int  # answers whose grader was stopped
    preemptions: int  # times a sequence had to leave a full KV cache and start over

    def __add__(self, other: "SamplingTimes") -> "SamplingTimes":
        """Of two calls, one after the other."""
        return SamplingTimes(
            self.rollout + other.rollout,
            self.grading + other.grading,
            self.timeouts + other.timeouts,
            self.preemptions + other.preemptions,
        )


@dataclass(frozen=True)
class SampleSpec:
    """What one call of ``Sampler.fill`` samples, and how."""

    samples: int  # of each prompt
    sampling: Sampling
    stream: int  # keeps the random numbers of different calls apart (the step's number)
    seed: int  # of the run
    version: int  # of the weights

    def ids(self, slot: int) -> tuple[int, ...]:
        """Ids of a group's samples, in order; no two streams and no two slots share one."""
        first = (self.stream << 32) + slot * self.samples
        return tuple(range(first, first + self.samples))

    def requests(self, groups: Sequence[Group], *, keep: bool = False) -> list[Request]:
        """For the samples of all groups, numbered by their place; with ``keep`` their caches stay for refinements."""
        return [
            Request(number, group.prompt, self.ids(group.slot), self.sampling, keep=keep)
            for number, group in enumerate(groups)
        ]

    def refinements(self, samples: int, sampling: Sampling) -> "SampleSpec":
        """Of prompts that refine what this samples, by the same weights."""
        return replace(self, samples=samples, sampling=sampling, stream=self.stream + 1)


@dataclass(frozen=True)
class Sampler:
    """The rollout engine, the chat format and the grader, together."""

    engine: Engine
    chat: ChatFormat
    grader: Graders
    refine_instruction: str
    stop_ids: frozenset[int]

    def solve_group(self, slot: int, problem: Problem) -> Group:
        """A problem's prompt, without samples yet."""
        return Group(slot, problem, problem.messages, tuple(self.chat.prompt_ids(problem.messages)))

    def refine_group(self, solve: Group, base: Base, slot: int) -> Group:
        """The prompt that asks for a refinement of ``base``, a solution of ``solve``'s problem."""
        refine = self.chat.refine(
            solve.problem.messages, solve.prompt, base.response, base.text, self.refine_instruction, self.stop_ids
        )
        return Group(slot, solve.problem, refine.messages, refine.ids, base)

    def fill(self, groups: Sequence[Group], spec: SampleSpec) -> SamplingTimes:
        """Sample responses to each group's prompt, decode and grade them, into ``group.rollouts``.

        Grading runs beside the sampling of later groups.

        Args:
            groups: prompts, without rollouts yet; ``group.slot`` tells them apart over all processes.
            spec: what and how.

        Raises:
            UserError: on every process, when the reward function fails on any. Collective.
        """
        gradings: Gradings = []

        def ended(rollout: Rollout) -> Sequence[Request]:
            gradings.extend(self.collect(groups[rollout.group], rollout, spec.samples))
            return ()

        return self.run(spec.requests(groups), spec, ended, gradings)

    def fill_pairs(self, groups: Sequence[Group], spec: SampleSpec, refine_sampling: Sampling) -> list[Group]:
        """As ``fill``, and one refinement of each solution by the same weights.

        A refinement is asked for as soon as its solution has ended, and extends its cache where the refine prompt
        continues it token for token; ``engine.counts`` says how often it did.

        Args:
            groups: prompts, without rollouts yet.
            spec: what solutions and how; refinements have the random numbers of the stream after it.
            refine_sampling: how to sample refinements.

        Returns:
            A group of one refinement for each solution, in the order of the solutions.

        Raises:
            UserError: as ``fill``. Collective.
        """
        refined: list[Group] = []
        gradings: Gradings = []
        refine = spec.refinements(1, refine_sampling)

        def refinement(solution: Rollout) -> Request:
            slot = solution.sample_id - spec.ids(0)[0]
            group = self.refine_group(groups[solution.group], Base.of(solution), slot)
            refined.append(group)
            number = len(groups) + len(refined) - 1
            return Request(number, group.prompt, refine.ids(slot), refine_sampling, extends=solution)

        def ended(rollout: Rollout) -> Sequence[Request]:
            if rollout.group >= len(groups):
                gradings.extend(self.collect(refined[rollout.group - len(groups)], rollout, 1))
                return ()
            gradings.extend(self.collect(groups[rollout.group], rollout, spec.samples))
            return (refinement(rollout),)

        self.run(spec.requests(groups, keep=True), spec, ended, gradings)
        return sorted(refined, key=_by_slot)

    def collect(self, group: Group, rollout: Rollout, samples: int) -> Gradings:
        """Put a rollout that ended into its group; once that has ``samples``, have it graded."""
        rollout.text = self.chat.response_text(rollout.response, self.stop_ids, rollout.stop_string)
        group.rollouts.append(rollout)
        if len(group.rollouts) < samples:
            return []
        group.rollouts.sort(key=_by_sample_id)
        texts = [rollout.text for rollout in group.rollouts]
        return [(group, self.grader.submit(group.problem, group.messages, texts))]

    def run(self, requests: Sequence[Request], spec: SampleSpec, on_end: OnEnd, gradings: Gradings) -> SamplingTimes:
        """Sample, wait for the graders and set the rewards.

        Args:
            requests: what to begin with.
            spec: of the weights and random numbers.
            on_end: takes each rollout in as it ends, and gives more requests.
            gradings: where it puts what is being graded.

        Raises:
            UserError: on every process and soon, when sampling or grading fails on any. Collective.
        """
        started = time.perf_counter()
        timeouts, preemptions = self.grader.timeouts, self.engine.counts.preemptions
        error: UserError | parallel.OtherFailed | None = None
        try:
            self.engine.run(requests, on_end, seed=spec.seed, version=spec.version, meanwhile=self.grader.look)
            sampled = time.perf_counter()
            for group, grading in gradings:
                set_rewards(group, grading)
        except (UserError, parallel.OtherFailed) as caught:
            error, sampled = caught, time.perf_counter()
        finally:
            self.engine.release_prefixes()
        parallel.agree(error)
        return SamplingTimes(
            sampled - started,
            time.perf_counter() - sampled,
            self.grader.timeouts - timeouts,
            self.engine.counts.preemptions - preemptions,
        )


def set_rewards(group: Group, grading: Grading) -> None:
    """Wait for a group's rewards and hand them to its rollouts."""
    for rollout, reward in zip(group.rollouts, grading.result(), strict=True):
        rollout.reward = reward


def _by_sample_id(rollout: Rollout) -> int:
    return rollout.sample_id


def _by_slot(group: Group) -> int:
    return group.slot
