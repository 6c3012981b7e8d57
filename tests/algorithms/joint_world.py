"""A joint run, and a sequential one to hold it against, of the shipped model with weights that stay as they are."""

from typing import Any, cast

import torch

from tests.algorithms.stubs import Grader, Updater
from thinktwice_fast import parallel
from thinktwice_fast.algorithms.joint import JointThinkTwice
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.algorithms.thinktwice import ThinkTwice
from thinktwice_fast.config import Config, ModelOptions, RolloutOptions
from thinktwice_fast.model.loading import load_model
from thinktwice_fast.records import Group
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.tasks.arithmetic import RECHECK, ArithmeticSource
from thinktwice_fast.tasks.prompts import ChatFormat

PROBLEMS = ArithmeticSource("tm5", held_out=True, limit=40)


class JointWorld:
    """Four problems a step, three samples of each; temperature 1.5 makes lengths differ."""

    def __init__(self, grader: Any = None, *, sequential: bool = False, selection: Any = "uniform", **rollout: Any):
        self.config = Config(problems_per_step=4, samples_per_problem=3, rollout=RolloutOptions(temperature=1.5))
        for name, value in rollout.items():
            setattr(self.config.rollout, name, value)
        self.config.thinktwice.base_selection = selection
        self.config.thinktwice.pairing = "sequential" if sequential else "joint"
        self.config.loss.scale_rewards = "batch"
        loaded = load_model(ModelOptions(device="cpu"), 0, torch.device("cpu"))
        self.engine = Engine(loaded.model, loaded.stop_ids, self.config.rollout, 256)
        self.grader = cast(Any, grader or Grader())
        self.updater = Updater()
        self.sampler = Sampler(self.engine, ChatFormat(loaded.tokenizer), self.grader, RECHECK, loaded.stop_ids)
        self.sequential = sequential
        self.start()

    def start(self) -> None:
        """The algorithm anew, with the options as they are now."""
        kind = ThinkTwice if self.sequential else JointThinkTwice
        self.algorithm = kind(self.config, cast(Any, PROBLEMS), self.sampler, cast(Any, self.updater))

    def pair(self, number: int) -> tuple[Step, Step]:
        """Solve and refine half of pair ``number``, from 1."""
        if self.sequential:
            return self.algorithm.step(2 * number - 1), self.algorithm.step(2 * number)
        solve, refine = self.algorithm.step(number).halves
        return solve, refine


def outcome(groups: list[Group]) -> list[Any]:
    """What was drawn, of which prompt, how it was rewarded and what it teaches."""
    return [
        (
            group.slot,
            group.problem.index,
            group.prompt,
            group.base,
            [(r.sample_id, r.response, r.text, r.reward, r.advantage) for r in group.rollouts],
        )
        for group in groups
    ]


def joint_step() -> dict[str, Any]:
    """Outcome, metrics and state of one joint step, over all processes. Collective."""
    world = JointWorld()
    step = world.algorithm.step(1)
    return {
        "outcome": {half.phase: sorted(parallel.gather_flat(outcome(half.groups))) for half in step.halves},
        "metrics": [
            {name: value for name, value in part.metrics.items() if "second" not in name}
            for part in (step, *step.halves)
        ],
        "state": world.algorithm.state(),
    }
