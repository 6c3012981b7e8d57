"""Samples groups and has them graded while later samples still decode."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.groups import Base, Group, as_base
from thinktwice_fast.errors import UserError
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.rollout.records import Request, Rollout, Sampling
from thinktwice_fast.tasks.pool import Grader, Grading
from thinktwice_fast.tasks.problem import Problem
from thinktwice_fast.tasks.prompts import ChatFormat

Gradings = list[tuple[Group, Grading]]  # complete groups with their rewards on the way


@dataclass(frozen=True)
class SamplingTimes:
    """What one call of ``Sampler.fill`` took on this process."""

    rollout: float  # seconds of drawing samples
    grading: float  # seconds of waiting for graders after the last sample was drawn
    timeouts: int  # answers whose grader was stopped
    preemptions: int  # times a sequence had to leave a full KV cache and start over


@dataclass(frozen=True)
class Sampler:
    """The rollout engine, the chat format and the grader, together."""

    engine: Engine
    chat: ChatFormat
    grader: Grader
    refine_instruction: str
    stop_ids: frozenset[int]

    def solve_group(self, slot: int, problem: Problem) -> Group:
        """A problem's prompt, without samples yet."""
        return Group(slot, problem, problem.messages, tuple(self.chat.prompt_ids(problem.messages)))

    def refine_group(self, solve: Group, base: Base, slot: int) -> Group:
        """The prompt that asks for a refinement of ``base``, a solution of ``solve``'s problem."""
        messages = solve.problem.messages
        chat = self.chat.refine_chat(messages, base.text, self.refine_instruction)
        prompt = self.chat.refine_ids(
            messages, solve.prompt, base.response, base.text, self.refine_instruction, self.stop_ids
        )
        return Group(slot, solve.problem, chat.messages, tuple(prompt), base)

    def fill(
        self, groups: Sequence[Group], *, samples: int, sampling: Sampling, stream: int, seed: int, version: int
    ) -> SamplingTimes:
        """Draw ``samples`` rollouts of each group's prompt, decode and grade them, into ``group.rollouts``.

        Grading runs beside the sampling of later groups.

        Args:
            groups: prompts, without rollouts yet; ``group.slot`` tells them apart over all processes.
            samples: per prompt.
            sampling: how to draw.
            stream: keeps the random numbers of different calls apart (the step's number).
            seed: of the run.
            version: of the weights.

        Raises:
            UserError: on every process, when the reward function fails on any. Collective.
        """
        requests = [
            Request(number, group.prompt, sample_ids(stream, group.slot, samples), sampling)
            for number, group in enumerate(groups)
        ]

        def draw() -> Gradings:
            gradings: Gradings = []
            with closing(self.engine.generate(requests, seed=seed, version=version)) as generation:
                for rollout in generation:
                    gradings += self.collect(groups[rollout.group], rollout, samples)
            return gradings

        return self.graded(draw)

    def fill_pairs(
        self,
        groups: Sequence[Group],
        *,
        samples: int,
        sampling: Sampling,
        refine_sampling: Sampling,
        stream: int,
        seed: int,
        version: int,
    ) -> list[Group]:
        """As ``fill``, and one refinement of each solution by the same weights.

        A refinement is asked for as soon as its solution has ended, and extends its cache where the refine prompt
        continues it token for token; ``engine.counts`` says how often it did.

        Args:
            groups: prompts, without rollouts yet.
            samples: solutions per prompt.
            sampling: how to draw solutions.
            refine_sampling: how to draw refinements.
            stream: keeps the random numbers of different calls apart; refinements have those of ``stream + 1``.
            seed: of the run.
            version: of the weights.

        Returns:
            A group of one refinement for each solution, in the order of the solutions.

        Raises:
            UserError: as ``fill``. Collective.
        """
        refined: list[Group] = []
        requests = [
            Request(number, group.prompt, sample_ids(stream, group.slot, samples), sampling, keep=True)
            for number, group in enumerate(groups)
        ]

        def refinement(solution: Rollout) -> Request:
            slot = solution.sample_id - sample_ids(stream, 0, 1)[0]
            group = self.refine_group(groups[solution.group], as_base(solution), slot)
            refined.append(group)
            ids = sample_ids(stream + 1, slot, 1)
            return Request(len(groups) + len(refined) - 1, group.prompt, ids, refine_sampling, extends=solution)

        def draw() -> Gradings:
            gradings: Gradings = []
            with closing(self.engine.generate(requests, seed=seed, version=version)) as generation:
                for rollout in generation:
                    if rollout.group >= len(groups):
                        gradings += self.collect(refined[rollout.group - len(groups)], rollout, 1)
                    else:
                        gradings += self.collect(groups[rollout.group], rollout, samples)
                        generation.add([refinement(rollout)])
            return gradings

        try:
            self.graded(draw)
        finally:
            self.engine.release_kept()
        return sorted(refined, key=_by_slot)

    def collect(self, group: Group, rollout: Rollout, samples: int) -> Gradings:
        """Put a rollout that ended into its group; once that has ``samples``, have it graded."""
        rollout.text = self.chat.response_text(rollout.response, self.stop_ids)
        if rollout.stop_string is not None:
            rollout.text = rollout.text.partition(rollout.stop_string)[0]
        group.rollouts.append(rollout)
        if len(group.rollouts) < samples:
            return []
        group.rollouts.sort(key=_by_sample_id)
        texts = [rollout.text for rollout in group.rollouts]
        return [(group, self.grader.submit(group.problem, group.messages, texts))]

    def graded(self, draw: Callable[[], Gradings]) -> SamplingTimes:
        """Draw, wait for the graders and set the rewards.

        Args:
            draw: gives what is being graded still.

        Raises:
            UserError: on every process, when drawing or grading fails on any. Collective.
        """
        started = time.perf_counter()
        timeouts, preemptions = self.grader.timeouts, self.engine.counts.preemptions
        error: UserError | None = None
        try:
            gradings = draw()
            sampled = time.perf_counter()
            for group, grading in gradings:
                set_rewards(group, grading)
        except UserError as caught:
            error, sampled = caught, time.perf_counter()
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


def sample_ids(stream: int, slot: int, samples: int) -> tuple[int, ...]:
    """Ids of a group's samples, in order; no two streams and no two slots share one."""
    first = (stream << 32) + slot * samples
    return tuple(range(first, first + samples))


def _by_sample_id(rollout: Rollout) -> int:
    return rollout.sample_id


def _by_slot(group: Group) -> int:
    return group.slot
