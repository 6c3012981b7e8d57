"""The step of every algorithm that learns from its own samples: roll out, grade, advantages, update, metrics."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.metrics import Sample, rollout_metrics, sample_metrics
from thinktwice_fast.algorithms.sampler import Sampler, SampleSpec
from thinktwice_fast.config import Config, optimizer_steps_per_step
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Rollout, Sampling
from thinktwice_fast.update.updater import Updater
from thinktwice_kernels import group_advantages


def raw_reward(rollout: Rollout) -> float:
    """What the grader gave a graded rollout."""
    assert rollout.reward is not None
    return rollout.reward


class PolicyStep:
    """Turns groups of prompts into samples, rewards and better weights.

    Args:
        config: the run's.
        sampler: rolls out and grades.
        updater: learns.
        reward_of: what the advantage of a graded rollout is made from.
    """

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        updater: Updater,
        reward_of: Callable[[Rollout], float] = raw_reward,
    ):
        self._config = config
        self._sampler = sampler
        self._updater = updater
        self._reward_of = reward_of
        problems = config.problems_per_step
        self._minibatch = problems // optimizer_steps_per_step(config)  # problems in it
        own = minibatch_slots(problems, self._minibatch, parallel.rank(), parallel.world_size())
        self.slots = [slot for minibatch in own for slot in minibatch]  # this process's problems of a step, by number

    def __call__(self, groups: Sequence[Group], stream: int) -> dict[str, float]:
        """Fill the groups with graded samples of the present policy and learn from them. Collective.

        Args:
            groups: one of each of ``slots``, without rollouts yet.
            stream: keeps random numbers apart (the step's number).

        Returns:
            Metrics by name without their phase.
        """
        times = self._sampler.fill(groups, self.spec(stream))
        samples = Sample.of(groups)
        return sample_metrics(samples) | rollout_metrics(samples, times) | self.learn([groups])

    def spec(self, stream: int) -> SampleSpec:
        """The samples of a training step by the present weights."""
        return training_spec(self._config, stream, self._updater.version)

    def learn(self, phases: Sequence[Sequence[Group]]) -> dict[str, float]:
        """Advantages and an update on groups that are filled. Collective.

        Args:
            phases: of each this process's groups, slot by slot alike; over all processes one of each slot. An advantage
                compares answers to one prompt, and its scale those of one phase.

        Returns:
            Metrics of the update, by name without their phase.
        """
        for groups in phases:
            set_advantages(groups, self._config.loss.scale_rewards, self._reward_of)
        minibatches = [
            [group for together in zip(*phases, strict=True) if together[0].slot in slots for group in together]
            for slots in self._minibatch_slots()
        ]
        return self._updater.policy_update([graded(groups) for groups in minibatches])

    def _minibatch_slots(self) -> list[range]:
        """The slots of each mini-batch, whichever process has them."""
        problems, size = self._config.problems_per_step, self._minibatch
        return [range(start, start + size) for start in range(0, problems, size)]


def training_spec(config: Config, stream: int, version: int) -> SampleSpec:
    """How a training step samples.

    Args:
        stream: keeps random numbers apart (the step's number).
        version: of the weights.
    """
    options = config.rollout
    sampling = Sampling(
        options.temperature,
        options.top_p,
        options.top_k,
        options.min_p,
        options.max_response_tokens,
        options.stop_strings,
    )
    return SampleSpec(config.samples_per_problem, sampling, stream, config.seed, version)


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


def set_advantages(
    groups: Sequence[Group],
    scale_rewards: Literal["none", "group", "batch", "mean"],
    reward_of: Callable[[Rollout], float] = raw_reward,
) -> None:
    """Set each graded rollout's group-normalised advantage. Collective: ``batch`` scales over all processes.

    Raises UserError, on every process, for a negative reward with ``mean``.
    """
    own = [(group.slot, rollout) for group in groups for rollout in graded([group])]
    everyone = parallel.gather([(slot, reward_of(rollout)) for slot, rollout in own])
    slots, rewards = zip(*[pair for part in everyone for pair in part], strict=True) if any(everyone) else ((), ())
    if scale_rewards == "mean" and min(rewards, default=0.0) < 0:
        raise UserError(
            f"--loss.scale_rewards mean divides by a group's mean reward, and a reward is {min(rewards):g}: let the "
            "reward function return none below 0, or choose another scale"
        )
    advantages = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(slots, dtype=torch.int64), scale_rewards=scale_rewards
    )
    start = sum(len(part) for part in everyone[: parallel.rank()])
    for (_, rollout), advantage in zip(own, advantages[start : start + len(own)].tolist(), strict=True):
        rollout.advantage = advantage


def graded(groups: Sequence[Group]) -> list[Rollout]:
    """The groups' rollouts that have a reward, in order."""
    return [rollout for group in groups for rollout in group.rollouts if rollout.reward is not None]
