"""ThinkTwice (arXiv 2604.01591): solve a batch of problems, update, refine one solution of each, update."""

from dataclasses import asdict
from typing import Any

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.bases import choose_base
from thinktwice_fast.algorithms.joint import JointThinkTwice
from thinktwice_fast.algorithms.parts import Parts
from thinktwice_fast.algorithms.policy_step import PolicyStep
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, samples_per_step
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Base, Group
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater


def build(parts: Parts) -> "ThinkTwice | JointThinkTwice":
    """ThinkTwice, paired as ``thinktwice.pairing`` says."""
    kind = JointThinkTwice if parts.config.thinktwice.pairing == "joint" else ThinkTwice
    return kind(parts.config, parts.problems, parts.sampler, parts.updater)


class ThinkTwice:
    """Alternates solve and refine steps on the same problems, with the same 0/1 reward.

    With ``thinktwice.refine_every`` above 1 so many solve steps, each on its own problems, come to a refine step.
    Between steps it holds all that a resumed run needs: the position in the problem stream and, in the
    middle of a pair, the chosen bases.
    """

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._policy_step = PolicyStep(config, sampler, updater)
        self._position = 0  # problems finished, solve and where they have one refine
        self._bases: dict[int, Base] = {}  # by slot, all processes' slots; empty = the next step solves

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample, grade, update. Collective."""
        phase = "refine" if self._bases else "solve"
        groups = [self._group(slot) for slot in self._policy_step.slots]
        metrics = self._policy_step(groups, number)
        if phase == "solve" and self._refines_next():
            self._bases = self._choose_bases(groups, number)
        else:
            self._bases = {}
            self._position += self._config.problems_per_step
        return Step(phase, metrics, groups, generations=samples_per_step(self._config))

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {
            "position": self._position,
            "bases": {str(slot): asdict(base) for slot, base in self._bases.items()},
            "questions": {str(slot): self._question(slot) for slot in self._bases},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken; in the refine step of a half-finished pair, with the same bases.

        Raises:
            UserError: the bases answer other problems than the data options give now.
        """
        self._position = state["position"]
        self._bases = {
            int(slot): Base(tuple(base["response"]), base["text"], base["reward"])
            for slot, base in state["bases"].items()
        }
        if any(self._question(int(slot)) != question for slot, question in state["questions"].items()):
            raise UserError(
                "the checkpoint stands in the middle of a pair whose problems these options don't give: resume with "
                "the --seed, --data and prompt options of its config.yaml, or from a checkpoint between pairs"
            )

    def _refines_next(self) -> bool:
        """Whether a refine step follows the solve step of these problems; each solve step has moved on by a batch."""
        solve_steps = self._position // self._config.problems_per_step + 1
        return solve_steps % self._config.thinktwice.refine_every == 0

    def _question(self, slot: int) -> str:
        return self._problems[self._position + slot].question

    def _group(self, slot: int) -> Group:
        solve = self._sampler.solve_group(slot, self._problems[self._position + slot])
        base = self._bases.get(slot)
        return solve if base is None else self._sampler.refine_group(solve, base, slot)

    def _choose_bases(self, groups: list[Group], number: int) -> dict[int, Base]:
        selection = self._config.thinktwice.base_selection
        chosen = [(group.slot, Base.of(choose_base(group, selection, self._config.seed, number))) for group in groups]
        return dict(parallel.gather_flat(chosen))
