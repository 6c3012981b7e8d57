"""A problem, its prompt, the samples drawn of it and their rewards."""

from dataclasses import dataclass, field

from thinktwice_fast.rollout.records import Rollout
from thinktwice_fast.tasks.problem import Message, Problem


@dataclass(frozen=True)
class Base:
    """A solution that a refine group starts from, written before the update that follows it."""

    response: tuple[int, ...]  # token ids as sampled
    text: str
    reward: float | None


@dataclass
class Group:
    """What a GRPO advantage is taken over: samples that share one prompt."""

    slot: int  # number of the problem within the step, over all processes
    problem: Problem
    messages: tuple[Message, ...]  # what the samples answer: the problem's, or its refine chat
    prompt: tuple[int, ...]  # the same as token ids
    base: Base | None = None  # of a refine group
    rollouts: list[Rollout] = field(default_factory=list)  # in the order of their sample ids


def as_base(rollout: Rollout) -> Base:
    """A rollout as the base of a refinement."""
    return Base(tuple(rollout.response), rollout.text, rollout.reward)


def minibatch_slots(slots: int, size: int, rank: int, world: int) -> list[list[int]]:
    """This process's slots, mini-batch by mini-batch.

    A mini-batch holds the same problems whatever the number of processes, so that an optimizer step
    sees the same samples.

    Args:
        slots: problems per step, over all processes.
        size: problems per mini-batch, over all processes; divides ``slots``.
        rank: this process.
        world: number of processes; divides ``size``.
    """
    share = size // world
    return [list(range(start + rank * share, start + (rank + 1) * share)) for start in range(0, slots, size)]
