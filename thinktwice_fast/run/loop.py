"""The run: steps, evaluations and checkpoints, until the end or a signal."""

import errno
import gc
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import save_model
from thinktwice_fast.model.sharding import full_state
from thinktwice_fast.model.weights import convert_model
from thinktwice_fast.run.best import Best
from thinktwice_fast.run.build import Run, build_run
from thinktwice_fast.run.checkpoint import (
    ADAPTER,
    MODEL,
    check_room,
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    read_state,
    remove_partial,
    step_of,
    writing,
)
from thinktwice_fast.run.device_memory import peak_bytes
from thinktwice_fast.run.evaluation import evaluate
from thinktwice_fast.run.metrics import SAMPLED
from thinktwice_fast.run.output import Output
from thinktwice_fast.run.profiling import StepProfiler, profiled_steps
from thinktwice_fast.run.saving import Saver
from thinktwice_fast.run.signals import StopSignals
from thinktwice_fast.run.transcripts import choose_samples
from thinktwice_fast.tasks.text_stream import TokenTexts
from thinktwice_fast.update.updater import NonFiniteLoss

_NOTHING_SAVED = "nothing was saved (--run.save false)"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A checkpoint is continued by the same recipe in these: they decide what its data position, its bases and its
# optimizer's state mean.
_FIXED_OPTIONS = ("algorithm", "problems_per_step", "thinktwice.pairing", "update.optimizer")


def run(config: Config, stop: StopSignals) -> None:
    """Train as ``config`` (already checked, see `checks`) says, from the start or from a checkpoint.

    Raises:
        UserError: bad problems, reward or model before training; afterwards a failing reward, a loss that is
            not finite, or no space left, with everything up to then kept.
    """
    try:
        with ExitStack() as resources:
            trainer = Trainer(build_run(config, resources), resources, stop)
            # What is there now stays: the garbage collector goes no more through a million objects of libraries each
            # time that a step has made many lists.
            gc.collect()
            gc.freeze()
            resources.callback(gc.unfreeze)
            trainer.train()
    except OSError as error:
        # Metrics, events, curves: many hands write, and what can go wrong for all of them is a full disk.
        if error.errno not in _NO_SPACE:
            raise
        with writing(Path(config.output)):
            raise


class Trainer:
    """Where the run stands, and its way forward by one step."""

    def __init__(self, parts: Run, resources: ExitStack, stop: StopSignals):
        self._parts = parts
        self._stop = stop
        self._config = parts.config
        self._folder = Path(parts.config.output)
        self._step = 0
        self._saved: Path | None = None  # the newest checkpoint, which may be under way
        self._saved_step = 0  # of it
        self._generations = 0
        self._elapsed = 0.0  # seconds of training before this session
        if self._config.run.save:
            check_room(self._folder, parts.loaded.model, self._config.update, parallel.world_size())
        resumed = self._resume()
        self._started = time.perf_counter()
        texts = TokenTexts(parts.sampler.chat, parts.sampler.stop_ids)
        self._output = resources.enter_context(Output(self._config, self._step, resumed, texts))
        for note in parts.notes:
            self._output.message(note)
        steps = profiled_steps(self._config.profile)
        if steps and steps[0] <= self._step:
            self._output.message(f"--profile {self._config.profile}: steps up to {self._step} are done already")
        own = steps if parallel.rank() == 0 else range(0)
        self._profiler = StepProfiler(own, self._folder, parts.loaded.model.device)
        self._saver: Saver | None = None
        if self._config.run.save:
            options, tokenizer = self._config.run, parts.loaded.tokenizer
            saver = Saver(self._folder, parts.updater, tokenizer, options.keep_checkpoints, options.distributed_timeout)
            self._saver = resources.enter_context(saver)
            self._find_best(saver)

    def train(self) -> None:
        """All steps that are left, then the closing evaluation, model and report."""
        steps, saves = self._config.run.steps, self._config.run.save
        self._evaluate_if_due()
        self._stop.training = True
        while self._step < steps:
            self._advance()
            last = self._step == steps
            stopping = self._is_stopping()
            # Before the evaluation, which may take long: what comes after a checkpoint is made up for on resume.
            if saves and (last or stopping or _due(self._step, self._config.run.checkpoint_every)):
                self._checkpoint()
            if stopping and not last:
                then = "continue with --resume auto" if saves else _NOTHING_SAVED
                self._close({}, f"stopped by a signal after step {self._step}; {then}")
                return
            self._evaluate_if_due()
        self._close(self._save_model(), f"complete: {self._step} of {steps} steps")

    def _is_stopping(self) -> bool:
        """Whether a signal came, on any process; a checkpoint that could not be written stops them all."""
        failed = self._saver is not None and self._saver.failed
        asked = parallel.gather((self._stop.requested, failed))
        if self._saver is not None and any(failed for _, failed in asked):
            self._saver.wait()
        return any(stop for stop, _ in asked)

    def _close(self, written: dict[str, Path], outcome: str) -> None:
        if self._saver is not None:
            self._saver.wait()
            if self._saver.best is not None:
                written = written | {"best": checkpoint_folder(self._folder, self._saver.best.step)}
        written = {"profile": self._profiler.folder, **written}
        self._output.close_report(written, outcome, self._parts.predicted_bytes)

    def _resume(self) -> bool:
        wanted = self._config.resume
        if parallel.rank() == 0:
            remove_partial(self._folder)
        if wanted is None:
            return False
        if wanted == "auto":
            found = checkpoints(self._folder)
            if not found:
                return False
            folder = found[-1]
        else:
            folder = Path(wanted)
            self._refuse_newer(folder)
        # What was written before one of these options existed was written under its default.
        saved = _fixed_options(Config()) | read_state(folder)
        for name, value in _fixed_options(self._config).items():
            if saved[name] != value:
                raise UserError(
                    f"--resume {folder}: a checkpoint of a run with --{name} {saved[name]}: give the same, or another "
                    "--output"
                )
        state = load_checkpoint(folder, self._parts.updater)
        self._parts.algorithm.load_state(state["algorithm_state"])
        self._step = self._saved_step = state["step"]
        self._saved = folder
        self._generations = state["generations"]
        self._elapsed = state["elapsed_seconds"]
        return True

    def _refuse_newer(self, folder: Path) -> None:
        newest = (checkpoints(self._folder) or [folder])[-1]
        if folder.resolve().parent == newest.resolve().parent and folder.name < newest.name:
            raise UserError(
                f"--resume {folder}: {newest.name} beside it is newer, and would be mixed up with what comes now: "
                "take it with --resume auto, or branch off with another --output"
            )

    def _advance(self) -> None:
        number = self._step + 1
        try:
            with self._profiler.around(number):
                started = time.perf_counter()
                step = self._parts.algorithm.step(number)
                seconds = time.perf_counter() - started
        except NonFiniteLoss as error:
            raise UserError(f"step {number}: {error}; {self._keep_evidence(number, error)}") from error
        except UserError as error:
            raise UserError(f"step {number}: {error}; {self._keep_progress()}") from error
        self._step = number
        self._generations += step.generations
        self._log_step(step, seconds)

    def _log_step(self, step: Step, seconds: float) -> None:
        parts = (*step.halves, step)
        metrics = {f"{part.phase}/{name}": value for part in parts for name, value in part.metrics.items()}
        metrics |= {
            f"{step.phase}/seconds_step": seconds,
            "elapsed_seconds": self._elapsed_now(),
            "peak_memory_bytes": float(max(parallel.gather(peak_bytes(self._parts.loaded.model.device)))),
            "generations": self._generations,
        }
        self._output.record(self._step, step.phase, metrics)
        for note in step.notes:
            self._output.message(f"step {self._step}: {note}")
        sampled = [part for part in parts if part.phase in SAMPLED]
        every = self._config.run.transcripts_every if sampled else 0
        # With a refine step each time, and from the first one on, which is what one looks at when trying something new.
        refines = "refine" in METHODS[self._config.algorithm].phases and not step.halves
        ahead = self._config.thinktwice.refine_every if refines else 0
        if every and (self._step <= 1 + ahead or any(_due(self._step + more, every) for more in range(ahead + 1))):
            self._transcribe(sampled)

    def _transcribe(self, parts: Sequence[Step]) -> None:
        """Write what was sampled, with its log-probabilities before and after the update. Collective."""
        most, writes = self._config.run.transcript_tokens, parallel.rank() == 0
        chosen = {part.phase: choose_samples(part.groups, most) for part in parts if writes}
        updated = self._parts.updater.logps([rollout for samples in chosen.values() for _, rollout in samples])
        for phase, samples in chosen.items():
            self._output.transcripts(self._step, phase, samples, updated)

    def _evaluate_if_due(self) -> None:
        due = self._step in (0, self._config.run.steps) or _due(self._step, self._config.eval.every)
        if not due or not self._parts.evaluation_sets or any(parallel.gather(self._output.evaluated(self._step))):
            return
        started = time.perf_counter()
        parts = self._parts
        try:
            metrics = evaluate(parts.evaluation_sets, parts.sampler, self._config, parts.updater.version)
        except UserError as error:
            raise UserError(f"evaluation after step {self._step}: {error}; {self._keep_progress()}") from error
        metrics["seconds_evaluation"] = time.perf_counter() - started
        self._output.record(self._step, "eval", metrics)
        name = self._config.run.keep_best
        if self._saver is not None and name is not None and self._step:
            self._keep_if_best(self._saver, name, metrics.get(name))

    def _find_best(self, saver: Saver) -> None:
        """What was the best before, by the metrics written, of the steps whose checkpoints are there."""
        name = self._config.run.keep_best
        steps = {step_of(folder) for folder in checkpoints(self._folder)}
        known = [(step, value) for step, value in self._output.evaluations(name or "") if step in steps]
        (best, *_) = parallel.gather(max(known, key=lambda found: found[1], default=None))
        saver.keep_best(Best(best[0], name, best[1]) if best is not None and name is not None else None)

    def _keep_if_best(self, saver: Saver, name: str, value: float | None) -> None:
        """The first of equals stays the best; an evaluation may lack the metric (nothing was wrong to be put right)."""
        if value is None or (saver.best is not None and value <= saver.best.value):
            return
        if self._saved != checkpoint_folder(self._folder, self._step):
            self._checkpoint()
        saver.keep_best(Best(self._step, name, value))

    def _checkpoint(self) -> None:
        assert self._saver is not None
        started = time.perf_counter()
        state: dict[str, Any] = {
            **_fixed_options(self._config),
            "algorithm_state": self._parts.algorithm.state(),
            "generations": self._generations,
            "elapsed_seconds": self._elapsed_now(),
        }
        self._saved = self._saver.save(self._step, state)
        self._saved_step = self._step
        self._output.record(self._step, "checkpoint", {"seconds_checkpoint": time.perf_counter() - started})

    def _save_model(self) -> dict[str, Path]:
        """What is saved, and where: what the last checkpoint holds, in the type that rollouts read."""
        if self._saver is None or self._saved is None:
            return {}
        self._saver.wait()
        saved = {name: self._folder / name for name in (MODEL, ADAPTER) if (self._saved / name).is_dir()}
        if parallel.rank() == 0:
            with writing(saved[MODEL]) as folder:
                convert_model(self._saved / MODEL, folder, self._parts.updater.models.rollout.dtype)
            if ADAPTER in saved:
                with writing(saved[ADAPTER]) as folder:
                    shutil.copytree(self._saved / ADAPTER, folder, dirs_exist_ok=True)
        return saved

    def _keep_progress(self) -> str:
        """A failure before the update: the weights are those of the step before."""
        if self._step == 0:
            return "nothing was trained yet"
        if self._saver is None:
            return _NOTHING_SAVED
        if not all(parallel.gather(all(bool(p.isfinite().all()) for p in self._parts.loaded.model.parameters()))):
            return "the weights are not finite either and were not saved: continue from the last checkpoint"
        if self._step > self._saved_step:
            self._checkpoint()
        self._saver.wait()
        return f"everything up to step {self._step} is kept: continue with --resume auto"

    def _keep_evidence(self, number: int, error: NonFiniteLoss) -> str:
        folder = self._folder / f"not-finite-step-{number:06d}"
        evidence = parallel.gather(error.evidence)
        weights = full_state(self._parts.updater.models.masters)
        if parallel.rank() == 0:
            model, tokenizer = self._parts.updater.models.rollout, self._parts.loaded.tokenizer
            with writing(folder):
                save_model(model, weights, tokenizer, folder / "model", torch.float32)
                (folder / "batch.json").write_text(json.dumps(evidence, default=asdict))
        parallel.gather(None)  # to end before would end the one that writes
        return f"the batch and the weights that led to it are in {folder}"

    def _elapsed_now(self) -> float:
        return self._elapsed + time.perf_counter() - self._started


def _fixed_options(config: Config) -> dict[str, Any]:
    return {name: attrgetter(name)(config) for name in _FIXED_OPTIONS}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
