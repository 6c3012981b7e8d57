"""STaR (arXiv 2203.14465): sample, keep what is right, fine-tune the start model on it, repeat."""

import random
from collections.abc import Sequence
from typing import Any

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.metrics import Sample, rollout_metrics, sample_metrics
from thinktwice_fast.algorithms.parts import Parts
from thinktwice_fast.algorithms.policy_step import minibatch_slots, training_spec
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, StarOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Message, Problem, Rollout, is_right
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.batches import Example
from thinktwice_fast.update.updater import Updater

# A problem's prompt and the responses to it that are kept, as token ids.
Kept = tuple[tuple[int, ...], list[list[int]]]


def build(parts: Parts) -> "STaR":
    """STaR of a run's parts."""
    return STaR(parts.config, parts.problems, parts.sampler, parts.updater)


class STaR:
    """Iterations of sampling steps, then of fine-tuning steps; a global step is one or the other.

    An iteration samples ``star.problems_per_iteration`` problems, ``problems_per_step`` in a step, and keeps the right
    answers. Then weights, optimizer and learning rate are set back to the start, and ``finetune_steps`` batches of
    ``problems_per_step`` kept answers train the model that samples in the next iteration.
    """

    def __init__(self, config: Config, problems: ProblemStream, sampler: Sampler, updater: Updater):
        self._config = config
        self._problems = problems
        self._sampler = sampler
        self._updater = updater
        self._start_weights = updater.trained_weights()  # before a checkpoint is read
        batch = config.problems_per_step
        (self._slots,) = minibatch_slots(batch, batch, parallel.rank(), parallel.world_size())
        self._sampling_steps = config.star.problems_per_iteration // batch
        self._position = 0  # problems sampled
        self._iteration = 0  # from 0
        self._sampled = 0  # sampling steps of this iteration that are done
        self._tuned = 0  # fine-tuning steps
        self._kept: list[Kept] = []  # in this iteration, by all processes

    def step(self, number: int) -> Step:
        """Run global step ``number`` (from 1): sample and grade, or fine-tune on one batch. Collective.

        Raises:
            UserError: on every process, when an iteration has sampled and nothing is right.
        """
        sampling = not self._tuned and self._sampled < self._sampling_steps
        step = self._sample(number) if sampling else self._finetune()
        step.metrics["iteration"] = float(self._iteration + 1)
        if self._tuned >= finetune_steps(self._config.star, self._iteration):
            self._iteration, self._sampled, self._tuned, self._kept = self._iteration + 1, 0, 0, []
        return step

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to continue, as plain JSON values; the same on every process."""
        return {
            "position": self._position,
            "iteration": self._iteration,
            "sampled": self._sampled,
            "tuned": self._tuned,
            "kept": [[list(prompt), responses] for prompt, responses in self._kept],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        self._position, self._iteration = state["position"], state["iteration"]
        self._sampled, self._tuned = state["sampled"], state["tuned"]
        self._kept = [(tuple(prompt), responses) for prompt, responses in state["kept"]]

    def _sample(self, number: int) -> Step:
        batch = self._config.problems_per_step
        spec = training_spec(self._config, number, self._updater.version)
        groups = [self._sampler.solve_group(slot, self._problems[self._position + slot]) for slot in self._slots]
        times = self._sampler.fill(groups, spec)
        samples = Sample.of(groups)
        metrics = sample_metrics(samples)
        hinted: list[Group] = []
        if self._config.star.rationalize:
            hinted = [self._hinted(batch + group.slot, group) for group in groups if not self._right(group)]
            times += self._sampler.fill(hinted, spec)
            samples += Sample.of(hinted)
        kept = self._gathered(groups, hinted)
        rationalized = sum(parallel.gather(sum(len(self._right(group)) for group in hinted)))
        metrics |= rollout_metrics(samples, times)
        metrics |= {
            "kept": float(sum(len(responses) for _, responses in kept)),
            "rationalized": float(rationalized),
        }
        drawn = len(groups) + len(hinted)
        self._kept = [*self._kept, *kept]
        self._position += batch
        self._sampled += 1
        return Step("solve", metrics, groups, generations=sum(parallel.gather(drawn)) * spec.samples)

    def _finetune(self) -> Step:
        if not self._kept:
            raise UserError(
                f"none of the answers sampled in iteration {self._iteration + 1} is right, so that there is nothing to "
                "learn: raise --star.problems_per_iteration, or start anew with more --samples_per_problem, easier "
                "problems, or --star.rationalize true"
            )
        if not self._tuned:
            self._updater.restart(self._start_weights)
        batch = self._config.problems_per_step
        examples = [Example(prompt, response) for prompt, responses in self._kept for response in responses]
        order = f"star:{self._config.seed}:{self._iteration}"
        chosen = shuffled_batch(len(examples), self._tuned * batch, batch, order)
        metrics = self._updater.supervised_update([examples[chosen[slot]] for slot in self._slots])
        self._tuned += 1
        return Step("sft", metrics, [])

    def _hinted(self, slot: int, group: Group) -> Group:
        """The group's problem with its answer told."""
        messages = with_hint(group.problem, self._config.star.hint)
        return Group(slot, group.problem, messages, tuple(self._sampler.chat.prompt_ids(messages)))

    def _right(self, group: Group) -> list[Rollout]:
        """The rollouts to keep. One that was cut off would teach the model never to stop."""
        right = [r for r in group.rollouts if r.finished and is_right(r.reward)]
        if not self._config.star.dedupe:
            return right
        return list({tuple(rollout.response): rollout for rollout in reversed(right)}.values())[::-1]

    def _gathered(self, groups: Sequence[Group], hinted: Sequence[Group]) -> list[Kept]:
        """Prompts and kept responses of all processes, in the order of the problems."""
        batch = self._config.problems_per_step
        prompts = {group.slot: group.prompt for group in groups}  # without a hint, which is not there to learn from
        own = [
            (group.slot % batch, prompts[group.slot % batch], [rollout.response for rollout in right])
            for group in (*groups, *hinted)
            if (right := self._right(group))
        ]
        return [(prompt, responses) for _, prompt, responses in sorted(parallel.gather_flat(own))]


def finetune_steps(options: StarOptions, iteration: int) -> int:
    """Fine-tuning steps of an iteration, from 0."""
    return round(options.finetune_steps * options.finetune_growth**iteration)


def with_hint(problem: Problem, hint: str) -> tuple[Message, ...]:
    """The problem's chat with ``hint`` after the question, "{answer}" in it filled in."""
    *before, question = problem.messages
    told = f"{question['content']} {hint.replace('{answer}', problem.answer)}"
    return (*before, {**question, "content": told})


def shuffled_batch(count: int, first: int, size: int, seed: str) -> list[int]:
    """Places ``first`` to ``first + size`` of an endless order that visits 0 to ``count`` anew in each epoch."""
    epochs = range(first // count, (first + size - 1) // count + 1)
    order: list[int] = []
    for epoch in epochs:
        numbers = list(range(count))
        random.Random(f"{seed}:{epoch}").shuffle(numbers)
        order += numbers
    start = first - epochs[0] * count
    return order[start : start + size]
