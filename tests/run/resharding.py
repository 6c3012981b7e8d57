"""What test_saving.py runs in two processes, which save, and in three and one, which load."""

import errno
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.core.memory import start_peak, status
from tests import checkpoints
from tests.small_models import family_config, foreign_model, own_model
from tests.update.cases import config, rollouts, share
from thinktwice_fast import parallel
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import NAME
from thinktwice_fast.model.lora import add_adapters
from thinktwice_fast.model.sharding import own_shard, own_state, pair_models
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.run import shards
from thinktwice_fast.run.checkpoint import checkpoint_folder, load_checkpoint, optimizer_state
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import Updater

# Adapters of rank 1, so that of several processes all but one have nothing of what they put in front.
KINDS = ("whole", "adapters", "transformers' modules")
Tensors = dict[str, torch.Tensor]


def made(kind: str) -> Updater:
    """Weights of a seed that tells the adapters' base and nothing else; AdamW."""
    options = config(update__learning_rate=1e-2)
    model: Any = foreign_model(NAME) if kind == KINDS[2] else own_model("llama")
    adapt = partial(add_adapters, options=ModelOptions(lora_rank=1), seed=0) if kind == "adapters" else None
    models = pair_models(model, torch.bfloat16 if adapt else torch.float32, adapt)
    models.sync()
    return Updater(models, None, *build_optimizer(models.masters, options.update, 10), options)


def saved(folder: Path) -> dict[str, Tensors]:
    """What each kind of model has been trained to and is saved as. Collective."""
    found = {}
    for kind in KINDS:
        updater = made(kind)
        updater.policy_update(share([rollouts(8)]))
        found[kind] = checkpoints.everything(updater)
        checkpoints.save(folder / kind, 1, updater)
    return found


def loaded(folder: Path) -> dict[str, Tensors]:
    """What the checkpoints give. Collective."""
    found = {}
    for kind in KINDS:
        updater = made(kind)
        load_checkpoint(checkpoint_folder(folder / kind, 1), updater)
        found[kind] = checkpoints.everything(updater)
    return found


def full_disk(folder: Path) -> list[str]:
    """The errors that all get where only the last one's disk is full."""
    error = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(shards, "write_safetensors", side_effect=error if parallel.rank() else None):
        try:
            checkpoints.save(folder / "whole", 2, made("whole"))
        except UserError as refusal:
            return parallel.gather(str(refusal))
    raise AssertionError("it was written")


def rises(folder: Path) -> list[float]:
    """By how much a save raises each process's memory at its peak, as a share of what the process has copied.

    Nearly all of the model is one tensor, which is the most that rank 0 can have to put together at a time.
    """
    theirs: Any = family_config("llama")
    theirs.vocab_size, theirs.hidden_size = 80_000, 256  # shards of more than 32 MiB, which malloc gives back
    options = config()
    model = Transformer(theirs, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    models = pair_models(model, torch.float32)
    updater = Updater(models, None, *build_optimizer(models.masters, options.update, 10), options)
    updater.policy_update(share([rollouts(8)]))
    tensors = (*own_state(models.masters).values(), *optimizer_state(models.masters, updater.optimizer)[0].values())
    copied = sum(own_shard(tensor).nbytes for tensor in tensors)
    start_peak()
    before = status("VmRSS")
    checkpoints.save(folder / "large", 1, updater)
    return parallel.gather((status("VmHWM") - before) / copied)


def everything(folder: Path) -> dict[str, Any]:
    """All results. Collective."""
    if parallel.world_size() == 2:
        return {"tensors": saved(folder), "errors": full_disk(folder), "rises": rises(folder)}
    return {"tensors": loaded(folder)}


if __name__ == "__main__":
    from tests.update.worlds import save

    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"), 60.0)
    save(everything(Path(sys.argv[1])), Path(sys.argv[1]))
