"""DAPO (arXiv 2503.14476): GRPO on groups that have something to teach alone, with long answers rewarded less."""

from typing import Any

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.metrics import Sample, rollout_metrics, sample_metrics
from thinktwice_fast.algorithms.parts import Parts
from thinktwice_fast.algorithms.policy_step import PolicyStep, graded, raw_reward
from thinktwice_fast.algorithms.sampler import Sampler, SamplingTimes
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, overlong_buffer, samples_per_step
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Rollout
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater


def build(parts: Parts) -> "DAPO":
    """DAPO of a run's parts."""
    return DAPO(parts.config, parts.problems, parts.sampler, parts.updater)


class DAPO:
    """Each step draws problems, ``problems_per_step`` at a time, until as many have samples of unequal reward.

    It trains on the first of these, in the order in which they were drawn; what else was drawn is discarded. So between
    steps there is only the position in the problem stream, and a step sees the same samples whatever the number of
    processes.
    """

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._policy_step = PolicyStep(config, sampler, updater, reward_of=self._shaped)
        self._position = 0  # problems drawn

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample and grade until the batch is full, update. Collective.

        Raises:
            UserError: on every process, when the bound on draws is hit.
        """
        batch = self._config.problems_per_step
        samples: list[Sample] = []
        kept: dict[int, Group] = {}  # this process's groups with signal, by slot
        found: list[int] = []  # slots of those of all processes, in order
        times = SamplingTimes(0.0, 0.0, 0, 0)
        draws = 0
        while len(found) < batch:
            self._check_bound(draws, len(found))
            # Slots go on from draw to draw: no two samples of the step share random numbers.
            groups = [self._group(draws * batch + slot) for slot in self._policy_step.slots]
            times += self._sampler.fill(groups, self._policy_step.spec(number))
            samples += Sample.of(groups)
            kept |= {group.slot: group for group in groups if has_signal(group)}
            found = sorted(parallel.gather_flat([*kept]))
            draws += 1
        metrics = sample_metrics(samples) | rollout_metrics(samples, times)
        chosen = [kept[slot] for slot in found[:batch] if slot in kept]
        metrics |= self._selection_metrics(chosen, draws)
        places = {slot: place for place, slot in enumerate(found[:batch])}
        for group in chosen:
            group.slot = places[group.slot]  # within the batch: what mini-batches are cut by
        metrics |= self._policy_step.learn([chosen])
        self._position += draws * batch
        return Step("solve", metrics, chosen, generations=draws * samples_per_step(self._config))

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position = state["position"]

    def _group(self, slot: int) -> Group:
        return self._sampler.solve_group(slot, self._problems[self._position + slot])

    def _check_bound(self, draws: int, found: int) -> None:
        bound = self._config.dapo.max_draws
        if draws == bound:
            batch = self._config.problems_per_step
            raise UserError(
                f"--dapo.max_draws {bound}: of {draws * batch} problems drawn {found} have samples that are not all "
                f"rewarded alike, and a batch takes {batch}: raise it (off = no bound) or --samples_per_problem, or "
                "take problems that are neither too easy nor too hard"
            )

    def _selection_metrics(self, chosen: list[Group], draws: int) -> dict[str, float]:
        rollouts = graded(chosen)
        everyone = parallel.gather((sum(map(self._overlong, rollouts)), len(rollouts)))
        penalty, count = (sum(column) for column in zip(*everyone, strict=True))
        return {
            "draws": float(draws),
            "samples_discarded": float((draws - 1) * samples_per_step(self._config)),
            "overlong_penalty": penalty / count,
        }

    def _shaped(self, rollout: Rollout) -> float:
        return raw_reward(rollout) - self._overlong(rollout)

    def _overlong(self, rollout: Rollout) -> float:
        return self._config.dapo.overlong_penalty * overlong_share(
            len(rollout.response), self._config.rollout.max_response_tokens, overlong_buffer(self._config)
        )


def has_signal(group: Group) -> bool:
    """Whether the graded samples of a group are not all rewarded alike: only then do their advantages differ."""
    return len({rollout.reward for rollout in graded([group])}) > 1


def overlong_share(tokens: int, limit: int, buffer: int) -> float:
    """How far a response of so many tokens reaches into the last ``buffer`` before ``limit``: 0 to 1."""
    return max(0, tokens - (limit - buffer)) / buffer if buffer else 0.0
