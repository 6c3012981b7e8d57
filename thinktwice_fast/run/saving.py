"""Writes checkpoints in the background while training goes on, one at a time.

What is saved is copied first, so that later steps don't leak in: each process's shards of weights and optimizer, which
then wait in main memory until they are on the disk. A thread of each process writes them; what these threads have to
tell each other goes through a process group of their own. Rank 0 puts the model together, tensor by tensor.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from thinktwice_fast import parallel
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import model_files, write_model
from thinktwice_fast.model.sharding import cpu_copy, cpu_mesh, own_shard, own_state, saved_weights
from thinktwice_fast.run.best import Best
from thinktwice_fast.run.checkpoint import (
    ADAPTER,
    BEST,
    FOLDER,
    LAYOUT,
    MODEL,
    OPTIMIZER,
    RANDOM,
    STATE,
    checkpoint_folder,
    finish_partial,
    optimizer_state,
    partial_folder,
    random_state,
    remove_older,
    start_partial,
    writing,
)
from thinktwice_fast.run.shards import ReadTensors, cause, shard_chunks, write_shards
from thinktwice_fast.update.updater import Updater

_WEIGHTS = "weights"  # of several processes their shards of the model, until it is put together


@dataclass(frozen=True)
class _Copy:
    """What one process has to write."""

    folder: Path
    weights: dict[str, torch.Tensor]  # by the model's own names
    optimizer: dict[str, torch.Tensor]  # as `optimizer_state` gives it
    state: str  # JSON
    random: str  # JSON
    best: int | None  # step of the checkpoint that is kept as the best


class Saver:
    """Saves the updater's weights and optimizer. While it is entered a write may be under way; leaving waits for it.

    Collective, as are ``save`` and ``wait``.

    Args:
        output: the run's folder.
        keep: newest checkpoints that are kept.
        limit: seconds that a write may take.
    """

    def __init__(self, output: Path, updater: Updater, tokenizer: Any, keep: int, limit: float):
        self._output = output
        self._updater = updater
        self._keep = keep
        self._limit = limit
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))
        masters, self._model = updater.models.masters, updater.models.rollout
        self._adapters = masters.adapters
        self._mesh = cpu_mesh(masters)
        # Read here, as training uses them at the same time: a tokenizer can't be saved while it encodes.
        self._files = model_files(self._model, tokenizer, torch.float32) if parallel.rank() == 0 else {}
        shapes = {name: torch.empty(value.shape, device="meta") for name, value in own_state(masters).items()}
        self._names = tuple(shapes)
        self._outline = dict(saved_weights(self._model, shapes, self._adapters))
        self._thread: Thread | None = None
        self._folder: Path | None = None  # that it writes; not the copy, which goes once it is written
        self._error: BaseException | None = None
        self.best: Best | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.join(self._limit)

    @property
    def failed(self) -> bool:
        """Whether this process knows already that what it wrote last has failed; ``wait`` says why."""
        return self._error is not None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Start to write the checkpoint of ``step``, as everything is now, once the one before is written.

        Args:
            state: JSON values of the loop and the algorithm.

        Returns:
            Where it will be; all but the newest ``keep`` and the best are then removed.

        Raises:
            UserError: as ``wait`` does, of the one before.
        """
        self.wait()
        updater, masters = self._updater, self._updater.models.masters
        tensors, values = optimizer_state(masters, updater.optimizer)
        whole = dict(state) | {
            "layout": LAYOUT,
            "step": step,
            "version": updater.version,
            "optimizer_steps": updater.schedule.last_epoch,
            "optimizer": {"tensors": len(tensors), "values": values},
        }
        copy = _Copy(
            checkpoint_folder(self._output, step),
            {name: cpu_copy(value, self._mesh) for name, value in own_state(masters).items()},
            {name: cpu_copy(value, self._mesh) for name, value in tensors.items()},
            json.dumps(whole),
            json.dumps(random_state(masters.device)),
            self.best.step if self.best is not None else None,
        )
        # A daemon, so that a process whose others have died can end.
        self._thread = Thread(target=self._run, args=(copy,), name="checkpoint", daemon=True)
        self._thread.start()
        self._folder = copy.folder
        return copy.folder

    def wait(self) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            UserError: on every process, when it could not be written, or not within the limit; earlier checkpoints
                stay as they are.
        """
        if self._thread is None:
            return
        self._thread.join(self._limit)
        error = self._outcome()
        self._thread = self._folder = self._error = None
        parallel.agree(error)

    def keep_best(self, best: Best | None) -> None:
        """Keep the checkpoint of that step and no longer the best one before; a file says which it is. Collective.

        Raises:
            UserError: as ``wait`` does.
        """
        self.wait()
        self.best = best
        if parallel.rank():
            return
        note = self._output / FOLDER / BEST
        if best is None:
            note.unlink(missing_ok=True)
            return
        named = {"checkpoint": checkpoint_folder(self._output, best.step).name}
        note.with_suffix(".tmp").write_text(json.dumps(named | {"metric": best.metric, "value": best.value}))
        note.with_suffix(".tmp").replace(note)
        remove_older(self._output, self._keep, best.step)

    def _outcome(self) -> UserError | None:
        assert self._thread is not None and self._folder is not None
        if self._thread.is_alive():
            return UserError(
                f"{self._folder} was not written within --run.distributed_timeout {self._limit:g}: earlier "
                "checkpoints are whole; see to the disk, then continue with --resume auto"
            )
        error = cause(self._error) if isinstance(self._error, CheckpointException) else self._error
        if error is None:
            return None
        try:
            with writing(self._folder):
                raise error
        except UserError as known:
            return known

    def _run(self, copy: _Copy) -> None:
        try:
            with torch.no_grad():
                self._write(copy)
        except BaseException as error:  # for `wait` to raise, in the thread that trains
            self._error = error

    def _write(self, copy: _Copy) -> None:
        partial = partial_folder(copy.folder)
        try:
            self._write_shards(copy, partial)
            try:
                if parallel.rank() == 0:  # the others learn in `wait` whether it could
                    self._finish(copy, partial)
            finally:
                dist.barrier(self._group)  # a write is under way in every process until rank 0 is done
        finally:
            if parallel.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _write_shards(self, copy: _Copy, partial: Path) -> None:
        """What every process has; afterwards its memory is free, but for a whole model's weights."""
        tensors = {f"{OPTIMIZER}/{name}": value for name, value in copy.optimizer.items()}
        if parallel.world_size() > 1:
            tensors |= {f"{_WEIGHTS}/{name}": value for name, value in copy.weights.items()}
            copy.weights.clear()
        copy.optimizer.clear()
        texts = {f"{RANDOM}/{parallel.rank():05d}.json": copy.random}
        write_shards(tensors, texts, partial, self._group, lambda: start_partial(partial))

    def _finish(self, copy: _Copy, partial: Path) -> None:
        weights: Mapping[str, torch.Tensor] = {name: own_shard(value) for name, value in copy.weights.items()}
        if parallel.world_size() > 1:  # one whole weight at a time, in the room that the shards have left
            chunks = shard_chunks(partial / _WEIGHTS)
            weights = ReadTensors({name: chunks[name] for name in self._names})
        values = saved_weights(self._model, weights, self._adapters)
        write_model(self._model, self._outline, values, self._files, partial / MODEL, torch.float32)
        if self._adapters is not None:
            self._adapters.save(weights, partial / ADAPTER)
        shutil.rmtree(partial / _WEIGHTS, ignore_errors=True)
        (partial / STATE).write_text(copy.state)
        finish_partial(partial, copy.folder)
        remove_older(self._output, self._keep, copy.best)
