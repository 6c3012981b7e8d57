"""ThinkTwice with `pairing: joint`: solve and refine under one policy, then update on both."""

from typing import Any

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.groups import minibatch_slots
from thinktwice_fast.algorithms.measures import rollout_measures, sample_measures
from thinktwice_fast.algorithms.pair_rollout import fill_joint
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.algorithms.thinktwice import graded, set_advantages, training_spec
from thinktwice_fast.config import Config
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater


class JointThinkTwice:
    """Each step is a whole pair, so that between steps there is only the position in the problem stream."""

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._updater = updater
        self._position = 0  # problems finished
        pair = 2 * config.samples_per_problem
        self._minibatches = minibatch_slots(
            config.problems_per_step,
            config.update.minibatch_sequences // pair or config.problems_per_step,
            parallel.rank(),
            parallel.world_size(),
        )

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample, grade, update. Collective.

        Random numbers and bases are those that the sequential steps ``2 * number - 1`` and ``2 * number`` would take.
        """
        slots = [slot for minibatch in self._minibatches for slot in minibatch]
        solve = [self._sampler.solve_group(slot, self._problems[self._position + slot]) for slot in slots]
        extended = self._sampler.engine.counts.extended
        spec = training_spec(self._config, 2 * number - 1, self._updater.version)
        refine, times = fill_joint(self._sampler, solve, spec, self._config.thinktwice.base_selection)
        extended = sum(parallel.gather(self._sampler.engine.counts.extended - extended))
        # An advantage compares answers to one prompt, and its scale those of one phase.
        for phase in (solve, refine):
            set_advantages(phase, self._config.loss.scale_rewards)
        pairs = dict(zip(slots, zip(solve, refine, strict=True), strict=True))
        update = self._updater.policy_update(
            [graded([group for slot in minibatch for group in pairs[slot]]) for minibatch in self._minibatches]
        )
        self._position += self._config.problems_per_step
        measures = rollout_measures(solve + refine, times) | update
        measures["refine_extended"] = extended / self._config.problems_per_step
        halves = (Step("solve", sample_measures(solve), solve), Step("refine", sample_measures(refine), refine))
        return Step("pair", measures, [], halves)

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position = state["position"]
