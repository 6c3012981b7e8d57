"""What every algorithm gives the loop: one step at a time, and a state to save between steps."""

from dataclasses import dataclass
from typing import Any, Protocol

from thinktwice_fast.records import Group


@dataclass(frozen=True)
class Step:
    """The outcome of one global step."""

    phase: str  # "solve", "refine", "pair" or "sft": the prefix of its metrics
    metrics: dict[str, float]  # without the prefix; the same on every process
    groups: list[Group]  # this process's samples, for transcripts; empty for SFT and a pair
    halves: tuple["Step", ...] = ()  # of a pair: what belongs to its solutions alone, and to its refinements
    generations: int = 0  # samples drawn for it, over all processes, those that were discarded among them
    notes: tuple[str, ...] = ()  # for the user, a line each


class Algorithm(Protocol):
    """Decides what to sample next and which loss to train on; knows nothing of devices."""

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1). Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON values from which ``load_state`` continues; the same on every process."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        ...
