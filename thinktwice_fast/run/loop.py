"""The run: steps, evaluations and checkpoints, until the end or a signal."""

import errno
import time
from collections.abc import Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config, samples_per_step
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import save_model
from thinktwice_fast.model.sharding import adapter_state, full_state
from thinktwice_fast.run.build import Run, build_run
from thinktwice_fast.run.checkpoint import (
    ADAPTER,
    check_room,
    checkpoints,
    load_checkpoint,
    read_state,
    remove_partial,
    save_checkpoint,
    writing,
)
from thinktwice_fast.run.evaluation import evaluate
from thinktwice_fast.run.memory import peak_bytes
from thinktwice_fast.run.metrics import SAMPLED
from thinktwice_fast.run.output import Output
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
            parts = build_run(config, resources)
            Trainer(parts, resources, stop).train()
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
        self._saved_step = 0  # of the newest checkpoint
        self._generations = 0
        self._elapsed = 0.0  # seconds of training before this session
        if self._config.run.save:
            check_room(self._folder, parts.loaded.model, self._config.update)
        resumed = self._resume()
        self._started = time.perf_counter()
        texts = TokenTexts(parts.sampler.chat, parts.sampler.stop_ids)
        self._output = resources.enter_context(Output(self._config, self._step, resumed, texts))
        for note in parts.notes:
            self._output.message(note)

    def train(self) -> None:
        """All steps that are left, then the closing evaluation, model and report."""
        steps, saves = self._config.run.steps, self._config.run.save
        self._evaluate_if_due()
        self._stop.training = True
        while self._step < steps:
            self._advance()
            last = self._step == steps
            stopping = any(parallel.gather(self._stop.requested))
            # Before the evaluation, which may take long: what comes after a checkpoint is made up for on resume.
            if saves and (last or stopping or _due(self._step, self._config.run.checkpoint_every)):
                self._checkpoint()
            if stopping and not last:
                then = "continue with --resume auto" if saves else _NOTHING_SAVED
                self._close({}, f"stopped by a signal after step {self._step}; {then}")
                return
            self._evaluate_if_due()
        self._close(self._save_model() if saves else {}, f"complete: {self._step} of {steps} steps")

    def _close(self, written: dict[str, Path], outcome: str) -> None:
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
        started = time.perf_counter()
        number = self._step + 1
        try:
            step = self._parts.algorithm.step(number)
        except NonFiniteLoss as error:
            raise UserError(f"step {number}: {error}; {self._keep_evidence(number, error)}") from error
        except UserError as error:
            raise UserError(f"step {number}: {error}; {self._keep_progress()}") from error
        self._step = number
        if self._config.algorithm != "sft":
            self._generations += samples_per_step(self._config)
        self._log_step(step, time.perf_counter() - started)

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
        sampled = [part for part in parts if part.phase in SAMPLED]
        every = self._config.run.transcripts_every if sampled else 0
        # A whole pair each time, and the first one, which is what one looks at when trying something new.
        ahead = 0 if step.halves else 1
        if every and (self._step <= 1 + ahead or _due(self._step, every) or _due(self._step + ahead, every)):
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

    def _checkpoint(self) -> None:
        started = time.perf_counter()
        state: dict[str, Any] = {
            **_fixed_options(self._config),
            "algorithm_state": self._parts.algorithm.state(),
            "generations": self._generations,
            "elapsed_seconds": self._elapsed_now(),
        }
        tokenizer = self._parts.loaded.tokenizer
        save_checkpoint(
            self._folder, self._step, self._parts.updater, tokenizer, state, self._config.run.keep_checkpoints
        )
        self._saved_step = self._step
        self._output.record(self._step, "checkpoint", {"seconds_checkpoint": time.perf_counter() - started})

    def _save_model(self) -> dict[str, Path]:
        """What is saved, and where."""
        models, adapters = self._parts.updater.models, self._parts.updater.models.masters.adapters
        state, adapter_weights = full_state(models.masters), adapter_state(models.masters)
        saved = {"model": self._folder / "model"}
        if adapters is not None:
            saved["adapter"] = self._folder / ADAPTER
        if parallel.rank() == 0:
            with writing(saved["model"]) as folder:
                save_model(models.rollout, state, self._parts.loaded.tokenizer, folder, models.rollout.dtype)
            if adapters is not None:
                with writing(saved["adapter"]) as folder:
                    adapters.save(adapter_weights, folder)
        return saved

    def _keep_progress(self) -> str:
        """A failure before the update: the weights are those of the step before."""
        if self._step == 0:
            return "nothing was trained yet"
        if not self._config.run.save:
            return _NOTHING_SAVED
        if not all(parallel.gather(all(bool(p.isfinite().all()) for p in self._parts.loaded.model.parameters()))):
            return "the weights are not finite either and were not saved: continue from the last checkpoint"
        if self._step > self._saved_step:
            self._checkpoint()
        return f"everything up to step {self._step} is kept: continue with --resume auto"

    def _keep_evidence(self, number: int, error: NonFiniteLoss) -> str:
        folder = self._folder / f"not-finite-step-{number:06d}"
        evidence = parallel.gather(error.evidence)
        weights = full_state(self._parts.updater.models.masters)
        if parallel.rank() == 0:
            model, tokenizer = self._parts.updater.models.rollout, self._parts.loaded.tokenizer
            with writing(folder):
                save_model(model, weights, tokenizer, folder / "model", torch.float32)
                torch.save(evidence, folder / "batch.pt")
        return f"the batch and the weights that led to it are in {folder}"

    def _elapsed_now(self) -> float:
        return self._elapsed + time.perf_counter() - self._started


def _fixed_options(config: Config) -> dict[str, Any]:
    return {name: attrgetter(name)(config) for name in _FIXED_OPTIONS}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
