"""GRPO (DeepSeekMath, arXiv 2402.03300), and Dr.GRPO (arXiv 2503.20783), which is another loss alone."""

from typing import Any

from thinktwice_fast.algorithms.parts import Parts
from thinktwice_fast.algorithms.policy_step import PolicyStep
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, samples_per_step
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater


def build(parts: Parts) -> "GRPO":
    """GRPO of a run's parts."""
    return GRPO(parts.config, parts.problems, parts.sampler, parts.updater)


class GRPO:
    """Each step solves the next problems and learns from the solutions."""

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._policy_step = PolicyStep(config, sampler, updater)
        self._position = 0  # problems finished

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample, grade, update. Collective."""
        slots = self._policy_step.slots
        groups = [self._sampler.solve_group(slot, self._problems[self._position + slot]) for slot in slots]
        metrics = self._policy_step(groups, number)
        self._position += self._config.problems_per_step
        return Step("solve", metrics, groups, generations=samples_per_step(self._config))

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position = state["position"]
