"""Tensors of a checkpoint on disk: each process writes its shards, and any number of processes reads what it needs.

torch.distributed.checkpoint plans who writes and who reads what. The files are safetensors whose headers say where each
tensor begins in the whole one, as torch's own ``HuggingFaceStorageWriter`` has it, so that its reader knows them too;
nothing is pickled. Unlike that writer this one needs no second copy of what it writes.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from thinktwice_fast.model.files import write_safetensors
from thinktwice_fast.model.weights import read_tensor

_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
_SHAPE = "shape"  # of the whole tensor; ours
_TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Chunk(NamedTuple):
    """Where a part of a tensor lies."""

    offsets: tuple[int, ...]  # of its first element in the whole tensor
    sizes: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    name: str  # in the file


Chunks = dict[str, list[Chunk]]  # by tensor


def write_shards(
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    folder: Path,
    group: dist.ProcessGroup | None,
    begin: Callable[[], None],
) -> None:
    """Write tensors, ``kind/name`` each, into files ``folder/kind/PROCESS.safetensors``. Collective over ``group``.

    Args:
        tensors: on the CPU, whole (and the same on every process) or sharded.
        texts: files of this process alone, by their paths below ``folder``.
        begin: called by rank 0 before anything is written.

    Raises:
        CheckpointException: on every process, when any of them could not do its part.
    """
    writer = _Writer(texts, folder, begin)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)


def read_shards(tensors: Mapping[str, torch.Tensor], chunks: Chunks) -> None:
    """Fill tensors, whole or sharded and anywhere, from files. Collective.

    Raises:
        CheckpointException: on every process, when something is missing or can't be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(tensors), storage_reader=_Reader(chunks), planner=planner)


def cause(error: CheckpointException) -> BaseException:
    """What went wrong first, in the process of the lowest number."""
    return error.failures[min(error.failures)][0]


def shard_chunks(folder: Path) -> Chunks:
    """Of all tensors in the files that ``write_shards`` made of one kind.

    Raises:
        OSError, SafetensorError, ValueError: a file can't be read, or a part of a tensor is missing.
    """
    found: Chunks = {}
    shapes: dict[str, torch.Size] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, info in json.loads((file.metadata() or {}).get(_INFO, "{}")).items():
                found.setdefault(name, []).append(_chunk(file, path, name, tuple(info[_OFFSETS])))
                shapes[name] = torch.Size(info[_SHAPE])
    for name, chunks in found.items():
        if sum(torch.Size(chunk.sizes).numel() for chunk in chunks) != shapes[name].numel():
            raise ValueError(f"a part of {name} is missing in {folder.name}/")
    return found


def file_chunks(path: Path) -> dict[str, Chunk]:
    """Of each tensor in a safetensors file, which holds them whole."""
    with safe_open(path, "pt") as file:
        return {name: _chunk(file, path, name) for name in file.keys()}  # noqa: SIM118


def shape_of(chunks: list[Chunk]) -> tuple[int, ...]:
    """Of the whole tensor."""
    ends = ([first + size for first, size in zip(chunk.offsets, chunk.sizes, strict=True)] for chunk in chunks)
    return tuple(map(max, zip(*ends, strict=True)))


class ReadTensors(Mapping[str, torch.Tensor]):
    """Tensors that are read when they are asked for, each whole and anew."""

    def __init__(self, chunks: Chunks):
        self._chunks = chunks

    def __getitem__(self, name: str) -> torch.Tensor:
        chunks = self._chunks[name]
        if len(chunks) == 1:
            return read_tensor(chunks[0].path, chunks[0].name)
        whole = torch.empty(shape_of(chunks), dtype=chunks[0].dtype)
        for chunk in chunks:
            place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = read_tensor(chunk.path, chunk.name)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)


def _chunk(file: Any, path: Path, name: str, offsets: tuple[int, ...] | None = None) -> Chunk:
    part = file.get_slice(name)
    sizes = tuple(part.get_shape())
    return Chunk((0,) * len(sizes) if offsets is None else offsets, sizes, _TORCH_TYPES[part.get_dtype()], path, name)


class _Writer(StorageWriter):
    def __init__(self, texts: Mapping[str, str], folder: Path, begin: Callable[[], None]):
        self._texts = texts
        self._folder = folder
        self._begin = begin

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "one writer writes one checkpoint"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for name, text in self._texts.items():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_text(text)
        results: list[WriteResult] = []
        for kind, items in groupby(sorted(plan.items, key=lambda item: _kind(item)[0]), lambda item: _kind(item)[0]):
            results += self._write(kind, list(items), planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, kind: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        path = self._folder / kind / f"{dist.get_rank():05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        named: list[tuple[str, Any, Any]] = [(_kind(item)[1], item, planner.resolve_data(item)) for item in items]
        named.sort(key=lambda part: -part[2].element_size())
        places = {
            name: {_OFFSETS: list(item.tensor_data.chunk.offsets), _SHAPE: list(item.tensor_data.size)}
            for name, item, _ in named
        }
        tensors = {name: tensor for name, _, tensor in named}
        write_safetensors(path, tensors, tensors.items(), {"format": "pt", _INFO: json.dumps(places)})
        return [WriteResult(item.index, tensor.nbytes, path.name) for _, item, tensor in named]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # the files' headers say where everything is


def _kind(item: WriteItem) -> tuple[str, str]:
    kind, _, name = item.index.fqn.partition("/")
    return kind, name


class _Reader(StorageReader):
    def __init__(self, chunks: Chunks):
        self._chunks = chunks

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "one reader reads one checkpoint"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _storage(chunks) for name, chunks in self._chunks.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places = {
            MetadataIndex(name, chunk.offsets): chunk for name, chunks in self._chunks.items() for chunk in chunks
        }
        by_path: dict[Path, list[Any]] = {}
        for item in plan.items:
            by_path.setdefault(places[item.storage_index].path, []).append(item)
        for path, items in by_path.items():
            with safe_open(path, "pt") as file:
                for item in items:
                    name = places[item.storage_index].name
                    target = planner.resolve_tensor(item).detach()
                    place = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target.copy_(file.get_slice(name)[place] if place else file.get_tensor(name))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _storage(chunks: list[Chunk]) -> TensorStorageMetadata:
    parts = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in chunks]
    return TensorStorageMetadata(TensorProperties(dtype=chunks[0].dtype), torch.Size(shape_of(chunks)), parts)
