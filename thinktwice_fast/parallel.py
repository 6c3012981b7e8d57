"""The processes of a run: starting them up, and the few things they tell each other as Python objects."""

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from thinktwice_fast.errors import UserError

T = TypeVar("T")


def start(device: torch.device, timeout: float) -> None:
    """Bring up the process group: gloo for CPU tensors, NCCL for CUDA ones.

    Args:
        device: of this process.
        timeout: seconds after which a process that waits for another gives up.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size()


def gather(value: T) -> list[T]:
    """Every process's ``value``, in rank order. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def gather_flat(values: list[T]) -> list[T]:
    """Every process's list, one after another in rank order. Collective."""
    return [value for part in gather(values) for value in part]


def agree(error: UserError | None) -> None:
    """Raise everywhere when any process has an error, so that none waits for one that stopped. Collective."""
    said = None if error is None else (error.what, *error.remedies)
    for number, parts in enumerate(gather(said)):
        if parts is not None:
            found = UserError(*parts)
            raise found if world_size() == 1 else found.within(f"process {number}")
