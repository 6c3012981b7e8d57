"""ThinkTwice (arXiv 2604.01591): solve a batch of problems, update, refine one solution of each, update."""

from dataclasses import asdict
from typing import Any, Literal

import torch

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.bases import choose_base
from thinktwice_fast.algorithms.groups import Base, Group, as_base, minibatch_slots
from thinktwice_fast.algorithms.measures import group_measures
from thinktwice_fast.algorithms.sampler import Sampler, SampleSpec
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.rollout.records import Rollout, Sampling
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater
from thinktwice_kernels import group_advantages


class ThinkTwice:
    """Alternates solve and refine steps on the same problems, with the same 0/1 reward.

    Between steps it holds all that a resumed run needs: the position in the problem stream and, in the
    middle of a pair, the chosen bases.
    """

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._updater = updater
        self._position = 0  # problems finished, solve and refine
        self._bases: dict[int, Base] = {}  # by slot, all processes' slots; empty = the next step solves
        self._minibatches = minibatch_slots(
            config.problems_per_step,
            (config.update.minibatch_sequences or config.problems_per_step * config.samples_per_problem)
            // config.samples_per_problem,
            parallel.rank(),
            parallel.world_size(),
        )

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample, grade, update. Collective."""
        phase = "refine" if self._bases else "solve"
        minibatches = [[self._group(slot) for slot in slots] for slots in self._minibatches]
        groups = [group for minibatch in minibatches for group in minibatch]
        times = self._sampler.fill(groups, training_spec(self._config, number, self._updater.version))
        set_advantages(groups, self._config.loss.scale_rewards)
        update = self._updater.policy_update([graded(minibatch) for minibatch in minibatches])
        measures = group_measures(groups, times) | update
        if self._bases:
            self._bases = {}
            self._position += self._config.problems_per_step
        else:
            self._bases = self._choose_bases(groups, number)
        return Step(phase, measures, groups)

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

    def _question(self, slot: int) -> str:
        return self._problems[self._position + slot].question

    def _group(self, slot: int) -> Group:
        solve = self._sampler.solve_group(slot, self._problems[self._position + slot])
        base = self._bases.get(slot)
        return solve if base is None else self._sampler.refine_group(solve, base, slot)

    def _choose_bases(self, groups: list[Group], number: int) -> dict[int, Base]:
        selection = self._config.thinktwice.base_selection
        chosen = [(group.slot, as_base(choose_base(group, selection, self._config.seed, number))) for group in groups]
        return dict(parallel.gather_flat(chosen))


def training_spec(config: Config, stream: int, version: int) -> SampleSpec:
    """The samples of a training step.

    Args:
        stream: the step's number.
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


def set_advantages(groups: list[Group], scale_rewards: Literal["none", "group", "batch"]) -> None:
    """Set each graded rollout's group-normalised advantage. Collective: ``batch`` scales over all processes."""
    own = [(group.slot, rollout) for group in groups for rollout in graded([group])]
    everyone = parallel.gather([(slot, rollout.reward) for slot, rollout in own])
    slots, rewards = zip(*[pair for part in everyone for pair in part], strict=True) if any(everyone) else ((), ())
    advantages = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(slots, dtype=torch.int64), scale_rewards=scale_rewards
    )
    start = sum(len(part) for part in everyone[: parallel.rank()])
    for (_, rollout), advantage in zip(own, advantages[start : start + len(own)].tolist(), strict=True):
        rollout.advantage = advantage


def graded(groups: list[Group]) -> list[Rollout]:
    """The groups' rollouts that have a reward, in order."""
    return [rollout for group in groups for rollout in group.rollouts if rollout.reward is not None]
