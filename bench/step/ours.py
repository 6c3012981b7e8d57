"""The project's own run, step by step, as ``run/loop.py`` does them."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench.models import set_options
from bench.step import truth
from bench.step.desk import BETAS, CLIP, LEARNING_RATE, Ask, Desk
from thinktwice_fast import launch, parallel
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.model import arena
from thinktwice_fast.model.loading import LoadedModel, load_model
from thinktwice_fast.model.sharding import full_state
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.run import build
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.tasks.arithmetic import RECHECK
from thinktwice_fast.tasks.grading import Graders
from thinktwice_fast.tasks.pool import Grading


def train(ask: Ask, desk: Desk) -> None:
    config = config_of(ask)
    check_config(config, launch.env_world_size())
    with ExitStack() as resources:
        run = _built(config, ask, resources)
        trainer, device = _Trainer(run, ask), run.loaded.model.device
        desk.gpu_peak, desk.restart_gpu_peak = partial(arena.peak_bytes, device), partial(arena.restart_peak, device)
        while desk.wait():
            if desk.checking:
                desk.answer(trainer.checked())
            else:
                desk.report(*trainer.timed())


def config_of(ask: Ask) -> Config:
    workload = ask.workload
    config = Config(problems_per_step=workload.prompts, samples_per_problem=workload.samples)
    config.model.path = ask.folder
    config.model.device = "cuda" if ask.cuda else "cpu"
    config.model.activation_checkpointing = workload.checkpointing
    config.data.source = ask.problems
    config.data.shuffle = False
    config.thinktwice.refine_instruction = RECHECK
    rollout = config.rollout
    rollout.max_prompt_tokens = max(rollout.max_prompt_tokens, 1024 + 2 * workload.new_tokens if ask.cuda else 0)
    rollout.max_response_tokens = workload.new_tokens
    rollout.max_sequences = workload.sequences
    update = config.update
    update.minibatch_sequences = 0  # one optimizer step, as the other trainer takes
    update.learning_rate, update.adam_betas, update.grad_clip, update.warmup_steps = LEARNING_RATE, BETAS, CLIP, 0
    update.microbatch_tokens = workload.microbatch_tokens
    set_options(config, ask.options)
    return config


def _built(config: Config, ask: Ask, resources: ExitStack) -> build.Run:
    """The run, but that no token ends a response, and that what the grader finds counts only where asked for."""
    graders = MixedGraders if ask.workload.reward == "mixed" else Graders
    with mock.patch.multiple(build, load_model=_endless, Graders=graders):
        return build.build_run(config, resources)


def _endless(options: ModelOptions, seed: int, device: torch.device) -> LoadedModel:
    return replace(load_model(options, seed, device), stop_ids=frozenset())


class MixedGraders(Graders):
    """Grades as ever, then calls every other sample right."""

    def submit(self, problem: Problem, prompt: Sequence[Message], completions: Sequence[str]) -> Grading:
        return _Mixed(super().submit(problem, prompt, completions))


class _Mixed:
    def __init__(self, grading: Grading):
        self._grading = grading

    def done(self) -> bool:
        return self._grading.done()

    def result(self) -> list[float | None]:
        return [float(number % 2) for number, _ in enumerate(self._grading.result())]


class _Trainer:
    """Does solve steps on problem after problem, or refine steps of one solve step's solutions."""

    def __init__(self, run: build.Run, ask: Ask):
        self._run = run
        self._ask = ask
        self._number = 0
        self._state: dict[str, Any] = {"position": 0, "bases": {}, "questions": {}}
        if ask.phase == "refine":
            self._step()
            self._state = run.algorithm.state()
            run.updater.optimizer.state.clear()  # the refine step that is checked is a first one

    def timed(self) -> tuple[dict[str, float], int, int]:
        started = time.perf_counter()
        step = self._step()
        seconds = time.perf_counter() - started
        parts = {name: step.metrics[f"seconds_{name}"] for name in ("rollout", "grading", "update")}
        parts["rest"] = seconds - sum(parts.values())
        completions = parallel.gather_flat([len(r.response) for group in step.groups for r in group.rollouts])
        return parts, len(completions), sum(completions)

    def checked(self) -> dict[str, float]:
        before = self._weights()
        step = self._step()
        after = self._weights()
        samples = parallel.gather_flat(_samples(step))
        if parallel.rank():
            return {}
        done = truth.Done(samples, step.metrics["loss"], step.metrics["grad_norm"], before, after)
        return truth.errors(self._ask, done)

    def _step(self) -> Step:
        self._number += 1
        if self._ask.phase == "solve":
            self._state["position"] = (self._number - 1) * self._ask.workload.prompts
        self._run.algorithm.load_state(self._state)
        return self._run.algorithm.step(self._number)

    def _weights(self) -> dict[str, torch.Tensor]:
        state = full_state(self._run.updater.models.masters)
        return {name: value.clone() for name, value in state.items()}


def _samples(step: Step) -> list[truth.Sample]:
    return [
        truth.Sample(group.slot, rollout.prompt, tuple(rollout.response), rollout.reward or 0.0)
        for group in step.groups
        for rollout in group.rollouts
    ]
