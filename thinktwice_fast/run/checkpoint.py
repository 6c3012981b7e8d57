"""Checkpoints: written under a temporary name, then renamed, so that the newest one is always whole.

A checkpoint folder ``checkpoints/step-000040`` holds

- ``model/``: the float32 master weights, tokenizer and config in transformers format;
- ``adapter/``: with LoRA, the adapters in peft's format, which are merged in ``model/`` and continued from here;
- ``optimizer/``: the tensors of AdamW's state, in a safetensors file of each process; any number of them reads it;
- ``state.json``: step, algorithm state (data position, a half-finished pair), schedule, counters;
- ``random/``: a JSON file of every process's random states.

Nothing in it is pickled: reading one runs nobody's code. ``saving`` writes them.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from thinktwice_fast import parallel
from thinktwice_fast.config import UpdateOptions
from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.model.loading import under_every_name
from thinktwice_fast.model.lora import WEIGHTS as ADAPTER_WEIGHTS
from thinktwice_fast.model.lora import Adapters
from thinktwice_fast.model.policy import Model, Policy, named_weights
from thinktwice_fast.model.sharding import own_state
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.run.shards import Chunk, Chunks, cause, file_chunks, read_shards, shape_of, shard_chunks
from thinktwice_fast.update.optimizer import MOMENT_BYTES, continue_schedule
from thinktwice_fast.update.updater import Updater

FOLDER = "checkpoints"
BEST = "best.json"  # beside the checkpoints: which of them is kept as the best
MODEL, ADAPTER, OPTIMIZER, RANDOM, STATE = "model", "adapter", "optimizer", "random", "state.json"
LAYOUT = 3  # of a checkpoint
_PREFIX = "step-"
_PARTIAL = ".partial-"
_WEIGHT_BYTES = 4  # of a parameter in float32


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return output / FOLDER / f"{_PREFIX}{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints in a run's folder, oldest first."""
    folders = (output / FOLDER).glob(f"{_PREFIX}*")
    return sorted((folder for folder in folders if folder.name.removeprefix(_PREFIX).isdecimal()), key=step_of)


def check_room(output: Path, model: torch.nn.Module, options: UpdateOptions, processes: int) -> None:
    """Raise UserError when the disk can't hold even one checkpoint of the model.

    Until several processes' shards of the weights are put together these are there twice.
    """
    moments, weights = MOMENT_BYTES[options.optimizer], _WEIGHT_BYTES * (1 if processes == 1 else 2)
    needed = sum(
        parameter.numel() * (weights + (moments if parameter.requires_grad else 0)) for parameter in model.parameters()
    )
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"--output {output}: a checkpoint takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room, "
            "or give a folder on a larger disk"
        )


def remove_older(output: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the ``keep`` newest and that of step ``best``."""
    for old in checkpoints(output)[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old.rename(old.with_name(_PARTIAL + old.name)))


def optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What the optimizer keeps of each parameter, as ``NAME/KEY``: its tensors, sharded as they are, and the rest."""
    names = {parameter: name for name, parameter in own_state(policy).items()}
    kept = {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    tensors = {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in kept.items() if name not in tensors}


def load_checkpoint(folder: Path, updater: Updater) -> dict[str, Any]:
    """Set weights, optimizer, schedule and random states from a checkpoint. Collective.

    Learning rate, betas and weight decay are those asked for now, not those of the checkpoint.

    Returns:
        The ``state`` that it was saved with, with ``step``.

    Raises:
        UserError: the folder is no whole checkpoint, or one of another model or of other adapters.
    """
    state = read_state(folder)
    _check_layout(folder, state)
    masters, model = updater.models.masters, updater.models.rollout
    try:
        _check_same_model(folder, model)
        _check_same_adapters(folder, masters.adapters)
        chunks = _weight_chunks(folder, masters)
        weights = own_state(masters)
        read_shards({name: weights[name] for name in chunks}, chunks)
        updater.models.sync()
        if masters.adapters is not None:
            _check_same_base(folder, model)
        _load_optimizer(folder, updater, state["optimizer"])
        random_states = [json.loads(path.read_text()) for path in sorted((folder / RANDOM).glob("*.json"))]
    except UserError:
        raise
    except CheckpointException as error:
        raise _not_whole(folder, cause(error)) from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _not_whole(folder, error) from error
    continue_schedule(updater.optimizer, updater.schedule, state["optimizer_steps"])
    updater.version = state["version"]
    if len(random_states) == parallel.world_size():
        _set_random_state(random_states[parallel.rank()], masters.device)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; UserError where there is none."""
    try:
        return json.loads((folder / STATE).read_text())
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
        UserError: for an OSError, and for what torch and safetensors make of one.
    """
    try:
        yield path
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"can't write {path} ({str(error).splitlines()[0]}): earlier checkpoints are whole; free some space, then "
            "continue with --resume auto"
        ) from error


def partial_folder(folder: Path) -> Path:
    """What ``folder`` is called while it is written."""
    return folder.with_name(_PARTIAL + folder.name)


def start_partial(partial: Path) -> None:
    """Make the folder, empty."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def finish_partial(partial: Path, folder: Path) -> None:
    """See everything reach the disk, then give it its name."""
    for path in partial.rglob("*"):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(folder: Path) -> int:
    """The number in a checkpoint's name."""
    return int(folder.name.removeprefix(_PREFIX))


def _not_whole(folder: Path, error: BaseException) -> UserError:
    return UserError(f"--resume {folder}: not a whole checkpoint ({one_line(error)}): take an earlier one")


def _check_layout(folder: Path, state: dict[str, Any]) -> None:
    if state.get("layout") != LAYOUT:
        raise UserError(
            f"--resume {folder}: a checkpoint of an earlier version, which this one can't continue: start from its "
            f"weights with --model.path {folder / 'model'} and another --output"
        )


def _check_same_model(folder: Path, model: Model) -> None:
    here = {name: tuple(value.shape) for name, value in named_weights(model, model.state_dict()).items()}
    saved = {name: chunk.sizes for name, chunk in _model_chunks(folder, model).items()}
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


def _model_chunks(folder: Path, model: Model) -> dict[str, Chunk]:
    """Where each weight of a checkpoint's model lies, by transformers' names."""
    found: dict[str, Chunk] = {}
    for path in _weight_files(folder):
        found |= file_chunks(path)
    return under_every_name(found, model)


def _weight_chunks(folder: Path, masters: Policy) -> Chunks:
    """Where what is trained lies, by the model's own names."""
    if masters.adapters is not None:
        there = file_chunks(folder / ADAPTER / ADAPTER_WEIGHTS)
        return {name: [there[file]] for name, file in masters.adapters.files().items()}
    model = masters.model
    saved = _model_chunks(folder, model)
    if not isinstance(model, Transformer):
        return {name: [saved[name]] for name in own_state(masters)}
    chunks: Chunks = {}
    for name, parts in model.parts().items():
        found = [(part.first, saved[part.name]) for part in parts]
        chunks[name] = [chunk._replace(offsets=(first, *chunk.offsets[1:])) for first, chunk in found]
    return chunks


def _load_optimizer(folder: Path, updater: Updater, rest: Mapping[str, Any]) -> None:
    """Tensors of the files and values of ``rest``, under the names that ``optimizer_state`` gives."""
    chunks = shard_chunks(folder / OPTIMIZER)
    if len(chunks) != rest["tensors"]:
        raise ValueError(f"a file is missing in {OPTIMIZER}/")
    parameters = own_state(updater.models.masters)
    updater.optimizer.state.clear()  # first: there may not be room for both
    values: dict[str, Any] = {
        name: _room_for(chunk, parameters[name.rpartition("/")[0]]) for name, chunk in chunks.items()
    }
    read_shards(values, chunks)
    for name, value in (values | rest["values"]).items():
        parameter, _, key = name.rpartition("/")
        updater.optimizer.state[parameters[parameter]][key] = value


def _room_for(chunks: list[Chunk], parameter: torch.Tensor) -> torch.Tensor:
    """For a tensor of an optimizer's state, which is sharded where it is of a sharded parameter's shape."""
    shape = torch.Size(shape_of(chunks))
    if isinstance(parameter, DTensor) and shape == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=chunks[0].dtype)
    return torch.empty(shape, dtype=chunks[0].dtype, device=parameter.device)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted((folder / "model").glob("*.safetensors"))
    if not files:
        raise UserError(f"--resume {folder}: not a whole checkpoint (no weights): take an earlier one")
    return files


def random_state(device: torch.device) -> dict[str, Any]:
    """Every random state of this process, as JSON values."""
    return {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state(legacy=True)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
