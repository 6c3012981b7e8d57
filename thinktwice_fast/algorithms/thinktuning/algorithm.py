"""ThinkTuning (arXiv 2508.07616): GRPO in which some rollouts of each group go on with a teacher's feedback."""

from typing import Any

from thinktwice_fast.algorithms.metrics import Sample, rollout_metrics, sample_metrics
from thinktwice_fast.algorithms.parts import Parts
from thinktwice_fast.algorithms.policy_step import PolicyStep
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.algorithms.thinktuning.feedback import REFUSALS
from thinktwice_fast.algorithms.thinktuning.guide import Guidance, Guide
from thinktwice_fast.algorithms.thinktuning.prompt import load_prompt
from thinktwice_fast.config import Config, samples_per_step
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater


def build(parts: Parts) -> "ThinkTuning":
    """ThinkTuning of a run's parts."""
    assert parts.teacher is not None
    behaviours = [shot.behaviour for shot in load_prompt(parts.config.thinktuning.shots).shots]
    guide = Guide(parts.config, parts.sampler, parts.teacher, behaviours)
    return ThinkTuning(parts.config, parts.problems, parts.sampler, parts.updater, guide)


class ThinkTuning:
    """Each step solves the next problems, has some solutions guided, and learns from all."""

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater, guide: Guide):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._guide = guide
        self._policy_step = PolicyStep(config, sampler, updater)
        self._position = 0  # problems finished
        self._asked = self._accepted = 0  # of the teacher's answers, since the start

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample, guide, grade, update. Collective."""
        slots = self._policy_step.slots
        groups = [self._sampler.solve_group(slot, self._problems[self._position + slot]) for slot in slots]
        times = self._sampler.fill(groups, self._policy_step.spec(number))
        metrics = rollout_metrics(Sample.of(groups), times)
        guidance = self._guide(groups, number)
        metrics |= sample_metrics(Sample.of(groups)) | guidance.metrics | self._policy_step.learn([groups])
        self._position += self._config.problems_per_step
        self._asked += guidance.asked
        self._accepted += guidance.accepted
        metrics["teacher_answers"] = float(self._asked)
        notes = self._notes(guidance, number)
        return Step("solve", metrics, groups, generations=samples_per_step(self._config), notes=notes)

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {"position": self._position, "asked": self._asked, "accepted": self._accepted}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position, self._asked, self._accepted = state["position"], state["asked"], state["accepted"]

    def _notes(self, guidance: Guidance, number: int) -> tuple[str, ...]:
        """A word, more and more seldom, as long as no answer at all could be used."""
        if self._accepted or not guidance.asked or number & (number - 1):
            return ()
        reason = max(REFUSALS, key=lambda name: guidance.metrics[f"refused/{name}"])
        detail = f"; {guidance.detail}" if guidance.detail else ""
        return (
            f"none of the teacher's {self._asked} answers so far could be used (in step {number} most of them for "
            f"solve/refused/{reason}{detail}): until one can, this is GRPO under another name",
        )
