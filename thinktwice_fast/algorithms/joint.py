"""ThinkTwice with `pairing: joint`: solve and refine under one policy, then update on both."""

from typing import Any

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.metrics import Sample, rollout_metrics, sample_metrics
from thinktwice_fast.algorithms.pair_rollout import fill_joint
from thinktwice_fast.algorithms.policy_step import PolicyStep
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, samples_per_step
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater


class JointThinkTwice:
    """Each step is a whole pair, so that between steps there is only the position in the problem stream."""

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._policy_step = PolicyStep(config, sampler, updater)
        self._position = 0  # problems finished

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample, grade, update. Collective.

        Random numbers and bases are those that the sequential steps ``2 * number - 1`` and ``2 * number`` would take.
        """
        slots = self._policy_step.slots
        solve = [self._sampler.solve_group(slot, self._problems[self._position + slot]) for slot in slots]
        extended = self._sampler.engine.counts.extended
        spec = self._policy_step.spec(2 * number - 1)
        refine, times = fill_joint(self._sampler, solve, spec, self._config.thinktwice.base_selection)
        extended = sum(parallel.gather(self._sampler.engine.counts.extended - extended))
        solved, refined = Sample.of(solve), Sample.of(refine)
        metrics = rollout_metrics([*solved, *refined], times) | self._policy_step.learn((solve, refine))
        metrics["refine_extended"] = extended / self._config.problems_per_step
        self._position += self._config.problems_per_step
        halves = (Step("solve", sample_metrics(solved), solve), Step("refine", sample_metrics(refined), refine))
        return Step("pair", metrics, [], halves, samples_per_step(self._config))

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position = state["position"]
