"""Checkpoints: written under a temporary name, then renamed, so that the newest one is always whole.

A checkpoint folder ``checkpoints/step-000040`` holds

- ``model/``: the float32 master weights, tokenizer and config in transformers format;
- ``adapter/``: with LoRA, the adapters in peft's format, which are merged in ``model/`` and continued from here;
- ``optimizer.pt``: AdamW's state, whole, whatever the number of processes;
- ``state.json``: step, algorithm state (data position, a half-finished pair), schedule, counters;
- ``random.pt``: every random state of every process.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from thinktwice_fast import parallel
from thinktwice_fast.config import UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import save_model
from thinktwice_fast.model.lora import Adapters
from thinktwice_fast.model.policy import Model, named_weights
from thinktwice_fast.model.sharding import adapter_state, full_state, load_full_state
from thinktwice_fast.update.optimizer import MOMENT_BYTES, continue_schedule
from thinktwice_fast.update.updater import Updater

FOLDER = "checkpoints"
_T = TypeVar("_T")
_PREFIX = "step-"
_PARTIAL = ".partial-"
ADAPTER = "adapter"
_LAYOUT = 2  # of a checkpoint; the optimizer's state names parameters as the model does
_WEIGHT_BYTES = 4  # of a parameter in float32
_ASKED = ("initial_lr", "betas", "weight_decay")  # of an optimizer's parameter group, what the options say


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return output / FOLDER / f"{_PREFIX}{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints in a run's folder, oldest first."""
    folders = (output / FOLDER).glob(f"{_PREFIX}*")
    return sorted((folder for folder in folders if folder.name.removeprefix(_PREFIX).isdecimal()), key=_step_of)


def check_room(output: Path, model: torch.nn.Module, options: UpdateOptions) -> None:
    """Raise UserError when the disk can't hold even one checkpoint of the model."""
    moments = MOMENT_BYTES[options.optimizer]
    needed = sum(
        parameter.numel() * (_WEIGHT_BYTES + (moments if parameter.requires_grad else 0))
        for parameter in model.parameters()
    )
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"--output {output}: a checkpoint takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room, "
            "or give a folder on a larger disk"
        )


def save_checkpoint(
    output: Path, step: int, updater: Updater, tokenizer: Any, state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of ``step``, then remove all but the ``keep`` newest. Collective; rank 0 writes.

    Args:
        state: JSON values of the loop and the algorithm.

    Raises:
        UserError: on every process, when it can't be written; earlier checkpoints stay as they are.
    """
    weights = full_state(updater.models.masters)
    adapters = adapter_state(updater.models.masters)
    optimizer = get_optimizer_state_dict(
        updater.models.masters, updater.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    states = parallel.gather(_random_state(updater.models.masters.device))
    folder = checkpoint_folder(output, step)
    error: UserError | None = None
    if parallel.rank() == 0:
        try:
            with _renamed_when_whole(folder) as partial:
                save_model(updater.models.rollout, weights, tokenizer, partial / "model", torch.float32)
                if updater.models.masters.adapters is not None:
                    updater.models.masters.adapters.save(adapters, partial / ADAPTER)
                torch.save(optimizer, partial / "optimizer.pt")
                torch.save(states, partial / "random.pt")
                whole = state | {
                    "layout": _LAYOUT,
                    "step": step,
                    "version": updater.version,
                    "optimizer_steps": updater.schedule.last_epoch,
                }
                (partial / "state.json").write_text(json.dumps(whole))
            for old in checkpoints(output)[:-keep]:
                shutil.rmtree(old.rename(old.with_name(_PARTIAL + old.name)))
        except UserError as caught:
            error = caught
    parallel.agree(error)
    return folder


def load_checkpoint(folder: Path, updater: Updater) -> dict[str, Any]:
    """Set weights, optimizer, schedule and random states from a checkpoint. Collective.

    Learning rate, betas and weight decay are those asked for now, not those of the checkpoint.

    Returns:
        The ``state`` that ``save_checkpoint`` was given, with ``step``.

    Raises:
        UserError: the folder is no whole checkpoint, or one of another model or of other adapters.
    """
    state = read_state(folder)
    _check_layout(folder, state)
    weights: dict[str, torch.Tensor] = {}
    optimizer: dict[str, Any] = {}
    masters, model = updater.models.masters, updater.models.rollout
    _check_same_model(folder, model)
    _check_same_adapters(folder, masters.adapters)
    if parallel.rank() == 0:
        adapters = masters.adapters
        weights = _read_weights(folder, model) if adapters is None else adapters.read(folder / ADAPTER)
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    load_full_state(masters, weights)
    updater.models.sync()
    if masters.adapters is not None:
        _check_same_base(folder, model)
    asked = [{name: group[name] for name in _ASKED} for group in updater.optimizer.param_groups]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(masters, updater.optimizer, optimizer, options=options)
    for group, values in zip(updater.optimizer.param_groups, asked, strict=True):
        group.update(values)
    continue_schedule(updater.optimizer, updater.schedule, state["optimizer_steps"])
    updater.version = state["version"]
    states = torch.load(folder / "random.pt", weights_only=False)
    if len(states) == parallel.world_size():
        _set_random_state(states[parallel.rank()], masters.device)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; UserError where there is none."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume {folder}: not a checkpoint (no readable state.json): give a folder under checkpoints/, or auto"
        ) from error


def remove_partial(output: Path) -> None:
    """Clear away what a killed process left half-written."""
    for partial in (output / FOLDER).glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Say in one line what goes wrong while ``path``, which this gives back, is written.

    Raises:
        UserError: for an OSError, and for what `torch.save` and safetensors make of one.
    """
    try:
        yield path
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"can't write {path} ({str(error).splitlines()[0]}): earlier checkpoints are whole; free some space, then "
            "continue with --resume auto"
        ) from error


@contextlib.contextmanager
def _renamed_when_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes ``folder``'s name once everything in it has reached the disk."""
    partial = folder.with_name(_PARTIAL + folder.name)
    try:
        with writing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                _sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _check_layout(folder: Path, state: dict[str, Any]) -> None:
    if state.get("layout") != _LAYOUT:
        raise UserError(
            f"--resume {folder}: a checkpoint of an earlier version, which this one can't continue: start from its "
            f"weights with --model.path {folder / 'model'} and another --output"
        )


def _check_same_model(folder: Path, model: Model) -> None:
    here = {name: tuple(value.shape) for name, value in named_weights(model, model.state_dict()).items()}
    saved: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    saved = _under_every_name(saved, model)
    different = sorted(name for name in here | saved if here.get(name) != saved.get(name))
    if different:
        name = different[0]
        there, now = (found.get(name) or "missing" for found in (saved, here))
        raise UserError(
            f"--resume {folder}: a checkpoint of another model ({name} is {there} there, {now} here): "
            "give the --model.path that the run was started with, or another --output"
        )


def _check_same_adapters(folder: Path, adapters: Adapters | None) -> None:
    if (folder / ADAPTER).is_dir() != (adapters is not None):
        there, now = ("without LoRA", "with") if adapters else ("with LoRA", "without")
        raise UserError(
            f"--resume {folder}: a checkpoint of a run {there}, and this is one {now}: give the same "
            "--model.lora_rank, or another --output"
        )
    if different := adapters.differences(folder / ADAPTER) if adapters is not None else []:
        raise UserError(
            f"--resume {folder}: a checkpoint of a run with {', '.join(different)}: give the same, or another --output"
        )


def _check_same_base(folder: Path, merged: Model) -> None:
    """The weights below the adapters come from where the run had them: merged, they have to be what was saved."""
    weights = named_weights(merged, merged.state_dict())
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            changed = [name for name in file.keys() if _differs(weights[name], file.get_tensor(name))]  # noqa: SIM118
        if changed:
            raise UserError(
                f"--resume {folder}: its LoRA adapters were trained on other weights ({changed[0]} differs): give the "
                "--model.path (and --seed, with --model.random_init) that the run was started with"
            )


def _differs(here: torch.Tensor, saved: torch.Tensor) -> bool:
    """By more than the rounding of a merge in float32 and of the type of ``here``."""
    there = saved.to(here.dtype).float()
    tolerance = 1e-5 * float(there.abs().max())
    return not torch.allclose(here.float().cpu(), there, rtol=torch.finfo(here.dtype).eps, atol=tolerance)


def _read_weights(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _under_every_name(weights, model)


def _under_every_name(saved: dict[str, _T], model: torch.nn.Module) -> dict[str, _T]:
    """Of tied parameters (embedding and head) transformers saves one; here it stands under all their names."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    complete = dict(saved)
    for tied in names.values():
        known = [saved[name] for name in tied if name in saved]
        complete |= dict.fromkeys(tied, known[0]) if known else {}
    return complete


def _weight_files(folder: Path) -> list[Path]:
    files = sorted((folder / "model").glob("*.safetensors"))
    if not files:
        raise UserError(f"--resume {folder}: not a whole checkpoint (no weights): take an earlier one")
    return files


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
