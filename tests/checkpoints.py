"""Checkpoints outside of a run."""

from pathlib import Path

import torch

from tests.small_models import bpe_tokenizer
from thinktwice_fast import parallel
from thinktwice_fast.model.lora import whole
from thinktwice_fast.model.sharding import own_state
from thinktwice_fast.run.checkpoint import optimizer_state
from thinktwice_fast.run.saving import Saver
from thinktwice_fast.update.updater import Updater


def saver(output: Path, updater: Updater, keep: int = 9, limit: float = 60.0) -> Saver:
    return Saver(output, updater, bpe_tokenizer(), keep, limit)


def save(output: Path, step: int, updater: Updater, keep: int = 9) -> Path:
    """The checkpoint of ``step``, written. Collective."""
    made = saver(output, updater, keep)
    folder = made.save(step, {})
    made.wait()
    return folder


def everything(updater: Updater) -> dict[str, torch.Tensor]:
    """Master weights and the optimizer's tensors, whole and copied. Collective."""
    masters = updater.models.masters
    tensors = own_state(masters) | optimizer_state(masters, updater.optimizer)[0]
    return {name: whole(value).clone() for name, value in tensors.items()}


def same(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> bool:
    return here.keys() == there.keys() and all(torch.equal(here[name], value) for name, value in there.items())


def one_folder(folder: Path) -> Path:
    """The folder that rank 0 names. Collective."""
    return Path(parallel.gather(str(folder))[0])
