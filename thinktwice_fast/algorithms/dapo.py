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
    """Each step draws problems until ``problems_per_step`` of them have samples of unequal reward, and trains on these.

    The first draw is of ``problems_per_step`` problems, each later one of as many as seem to be missing, going by those
    before, and no more than the first. The batch is the first of them in the problem stream's order, whatever the
    draws' sizes and the number of processes; what else was drawn is discarded. So between steps there is only the
    position in the stream.
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
        draws, drawn = 0, 0  # problems drawn
        while len(found) < batch:
            self._check_bound(draws, drawn, len(found))
            # Slots go on from draw to draw: no two samples of the step share random numbers.
            size = next_draw(batch, drawn, len(found))
            slots = range(drawn + parallel.rank(), drawn + size, parallel.world_size())
            groups = [self._sampler.solve_group(slot, self._problems[self._position + slot]) for slot in slots]
            times += self._sampler.fill(groups, self._policy_step.spec(number))
            samples += Sample.of(groups)
            kept |= {group.slot: group for group in groups if has_signal(group)}
            found = sorted(parallel.gather_flat([*kept]))
            draws, drawn = draws + 1, drawn + size
        metrics = sample_metrics(samples) | rollout_metrics(samples, times)
        chosen = [kept[slot] for slot in found[:batch] if slot in kept]
        generations = drawn * self._config.samples_per_problem
        metrics |= {"draws": float(draws), "samples_discarded": float(generations - samples_per_step(self._config))}
        metrics["overlong_penalty"] = self._mean_penalty(chosen)
        places = {slot: place for place, slot in enumerate(found[:batch])}
        for group in chosen:
            group.slot = places[group.slot]  # within the batch: what mini-batches are cut by
        metrics |= self._policy_step.learn([chosen])
        self._position += drawn
        return Step("solve", metrics, chosen, generations=generations)

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position = state["position"]

    def _check_bound(self, draws: int, drawn: int, found: int) -> None:
        bound = self._config.dapo.max_draws
        if draws == bound:
            raise UserError(
                f"--dapo.max_draws {bound}: of {drawn} problems drawn {found} have samples that are not all rewarded "
                f"alike, and a batch takes {self._config.problems_per_step}: raise it (off = no bound) or "
                "--samples_per_problem, or take problems that are neither too easy nor too hard"
            )

    def _mean_penalty(self, chosen: list[Group]) -> float:
        everyone = parallel.gather_flat([self._overlong(rollout) for rollout in graded(chosen)])
        return sum(everyone) / len(everyone)

    def _shaped(self, rollout: Rollout) -> float:
        return raw_reward(rollout) - self._overlong(rollout)

    def _overlong(self, rollout: Rollout) -> float:
        return self._config.dapo.overlong_penalty * overlong_share(
            len(rollout.response), self._config.rollout.max_response_tokens, overlong_buffer(self._config)
        )


def next_draw(batch: int, drawn: int, found: int) -> int:
    """Problems to draw where ``found`` of those drawn so far have signal, and ``batch`` have to."""
    return min(batch, -(-(batch - found) * drawn // found)) if found else batch


def has_signal(group: Group) -> bool:
    """Whether the graded samples of a group are not all rewarded alike: only then do their advantages differ."""
    return len({rollout.reward for rollout in graded([group])}) > 1


def overlong_share(tokens: int, limit: int, buffer: int) -> float:
    """How far a response of so many tokens reaches into the last ``buffer`` before ``limit``: 0 to 1."""
    return max(0, tokens - (limit - buffer)) / buffer if buffer else 0.0
