"""The processes of a run: starting them up, and the few things they tell each other as Python objects."""

import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from thinktwice_fast.errors import UserError

T = TypeVar("T")

_LOOK_SECONDS = 0.5  # how often a process looks whether another has failed
_FAILED = "failed"


class OtherFailed(Exception):
    """Another process has failed and waits in `agree`, where it tells why."""


class _Board:
    """What processes tell each other while they do different things."""

    store: dist.Store | None = None
    next_look = 0.0
    limit: timedelta | None = None  # of a wait for another process


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
    limit = _Board.limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        store, number, size = next(rendezvous("env://", timeout=limit))
        _Board.store = dist.PrefixStore("board", store)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=number, world_size=size, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)


def limit_waits(groups: Iterable[dist.ProcessGroup]) -> None:
    """Have the processes of groups that torch has made wait for each other as long as `start` says."""
    if _Board.limit is not None:
        for group in groups:
            distributed_c10d._set_pg_timeout(_Board.limit, group)


def end(kind: type[BaseException] | None, *_: object) -> None:
    """The end of the process group, as ``contextlib.ExitStack.push`` takes it."""
    if kind is not None and world_size() > 1 and "nccl" in dist.get_backend_config():
        # NCCL comes to its end with all processes together; this one may have failed alone, and they wait for it.
        distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


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


def look_for_failure() -> None:
    """Have a process that works for long by itself stop when another has failed; asks at most every half second.

    Raises:
        OtherFailed: to be handed to `agree`.
    """
    if _Board.store is None or time.monotonic() < _Board.next_look:
        return
    _Board.next_look = time.monotonic() + _LOOK_SECONDS
    if _Board.store.check([_FAILED]):
        raise OtherFailed


def agree(error: UserError | OtherFailed | None) -> None:
    """Raise everywhere when any process has an error, so that none waits for one that stopped. Collective.

    Those that call `look_for_failure` until they come here come soon.
    """
    said = (error.what, *error.remedies) if isinstance(error, UserError) else None
    if said is not None and _Board.store is not None:
        _Board.store.set(_FAILED, "")
    for number, parts in enumerate(gather(said)):
        if parts is not None:
            found = UserError(*parts)
            raise found if world_size() == 1 else found.within(f"process {number}")
