"""What a chunk of steps of decoding reads and writes on the device, and how it goes there and back.

One transfer brings what the host knows (``Inputs``), one takes back what was drawn (``Results``). Between them stands
the state of the rows, which chunks hand on to each other without the host.

Letters: R rows of a graph, W blocks of its tables, G groups it has room for, S steps of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from thinktwice_fast.model import csrc
from thinktwice_fast.model.lists import download, int64, pack, packed_size, unpack
from thinktwice_fast.model.paged import Blocks, PagedKVCache, Plan
from thinktwice_fast.rollout.batch import Batch, NewTokens, Sequence
from thinktwice_fast.rollout.step import random_keys, sampling_columns

MOST_STEPS = 8  # of a chunk


class Shape(NamedTuple):
    """What a graph is captured for."""

    rows: int  # R
    blocks: int  # W
    grouped: bool
    stop_ids: int


@dataclass(frozen=True)
class Chunk:
    """Steps under way, or done, on the device."""

    sequences: list[Sequence]
    rows: dict[int, int]  # of each, by its id
    steps: int
    shape: Shape
    wait: Callable[[], Tensor]  # for the results, packed

    def holds(self, batch: Batch, most: int) -> bool:
        """Whether these are the next steps of all of the batch's sequences."""
        return self.steps <= most and all(id(sequence) in self.rows for sequence in batch.sequences)

    def row(self, sequence: Sequence) -> int:
        return self.rows[id(sequence)]

    def results(self, batch: Batch) -> NewTokens:
        """What the batch's sequences drew."""
        got = Results(*unpack(self.wait(), _results_like(self.shape)))
        counts = got.counts.tolist()
        places = [(row, counts[row]) for row in map(self.row, batch.sequences)]
        assert all(count > 0 for _, count in places), "they have not ended"
        columns = [column.T.tolist() for column in (got.tokens, got.logps, got.entropies)]
        return NewTokens(*([column[row][:count] for row, count in places] for column in columns))


class Inputs(NamedTuple):
    """What the host hands to a chunk in one transfer."""

    start: Tensor  # int64 [4, R], the first rows of ``csrc.State``
    before: Tensor  # int64 [R], the row of the chunk before that each goes on from; -1 = begins with ``start``
    sample_ids: Tensor  # int64 [R]
    seed: Tensor  # int64 [1]
    stop_ids: Tensor  # int64 [stop ids]
    temperature: Tensor  # float32 [R]
    top_k: Tensor  # int32 [R]
    top_p: Tensor  # float32 [R]
    min_p: Tensor  # float32 [R]
    group_offsets: Tensor  # int32 [G + 1]
    shared_blocks: Tensor  # int32 [G]
    tables: Tensor  # int32 [R, W]


class Results(NamedTuple):
    """What comes back of a chunk in one transfer."""

    tokens: Tensor  # int64 [S, R]
    logps: Tensor  # float32 [S, R]
    entropies: Tensor  # float32 [S, R]
    counts: Tensor  # int64 [R], how many of the S each row has


class Buffers:
    """What graphs read and write; each shape its first rows."""

    def __init__(self, cache: PagedKVCache, rows: int, blocks: int, stop_ids: int):
        self.stop_ids = stop_ids
        self._cache = cache
        largest = Shape(rows, blocks, True, stop_ids)
        self._inputs = torch.zeros(packed_size(_inputs_like(largest)), dtype=torch.uint8, device=cache.device)
        self._results = torch.zeros(packed_size(_results_like(largest)), dtype=torch.uint8, device=cache.device)
        self._state = torch.zeros(len(csrc.State._fields), rows, dtype=torch.int64, device=cache.device)
        self._context_lens = torch.zeros(rows, dtype=torch.int32, device=cache.device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)
        self.every_row = torch.arange(rows, device=cache.device)

    def inputs(self, shape: Shape) -> Inputs:
        like = _inputs_like(shape)
        return Inputs(*unpack(self._inputs[: packed_size(like)], like))

    def state(self, shape: Shape) -> csrc.State:
        return csrc.State(*self._state[:, : shape.rows])

    def plan(self, shape: Shape) -> Plan:
        """The plan of every batch of this shape."""
        inputs, state = self.inputs(shape), self.state(shape)
        return Plan(
            inputs.tables,
            self._context_lens[: shape.rows],
            self._starts[: shape.rows + 1],
            state.positions,
            state.slots,
            inputs.group_offsets if shape.grouped else None,
            inputs.shared_blocks if shape.grouped else None,
        )

    def fill(self, shape: Shape, given: Inputs) -> None:
        """Begin a chunk, with rows of the one before or from the start."""
        packed = pack(given, pinned=self._inputs.is_cuda)
        self._inputs[: len(packed)].copy_(packed, non_blocking=True)
        inputs, carried = self.inputs(shape), len(given.start)
        went_on = self._state[:carried].index_select(1, inputs.before.clamp(min=0))
        self._state[:carried, : shape.rows] = torch.where(inputs.before >= 0, went_on, inputs.start)
        self.state(shape).counts.zero_()
        self.advance(shape, None)

    def advance(self, shape: Shape, drawn: csrc.Sampled | None) -> None:
        """To the next step."""
        inputs, size = self.inputs(shape), self._cache.block_size
        state, lens = self._state[:, : shape.rows], self._context_lens[: shape.rows]
        new = self._views(shape)[:3]
        spare_slot = self._cache.spare_blocks[0] * size
        csrc.advance(drawn, inputs.stop_ids, inputs.tables, size, spare_slot, state, lens, *new)

    def results(self, shape: Shape) -> Callable[[], Tensor]:
        """Begin to bring them to the host; packed."""
        self._views(shape).counts.copy_(self.state(shape).counts)
        return download(self._results[: packed_size(_results_like(shape))])

    def _views(self, shape: Shape) -> Results:
        like = _results_like(shape)
        return Results(*unpack(self._results[: packed_size(like)], like))


def _inputs_like(shape: Shape) -> Inputs:
    """Without memory."""
    rows, groups = shape.rows, group_room(shape.rows) if shape.grouped else 0

    def like(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    return Inputs(
        like(4, rows), like(rows), like(rows), like(1), like(shape.stop_ids),
        like(rows, dtype=torch.float32), like(rows, dtype=torch.int32), like(rows, dtype=torch.float32),
        like(rows, dtype=torch.float32), like(groups + 1, dtype=torch.int32), like(groups, dtype=torch.int32),
        like(rows, shape.blocks, dtype=torch.int32),
    )  # fmt: skip


def _results_like(shape: Shape) -> Results:
    """Without memory."""
    tokens = torch.empty(MOST_STEPS, shape.rows, dtype=torch.int64, device="meta")
    logps, entropies = tokens.float(), tokens.float()
    return Results(tokens, logps, entropies, tokens[0])


def host_inputs(shape: Shape, batch: Batch, blocks: Blocks, before: Chunk | None, spare: int) -> Inputs:
    """On the CPU; what a table holds beyond its sequence is not read."""
    samples = batch.samples
    sample_ids, draws = random_keys(batch)
    rows = [-1] * len(samples) if before is None else [before.row(sequence) for sequence in batch.sequences]
    # The last token's place: all before it are in the cache.
    positions = [len(sample.prompt) + len(sample.response) - 1 for sample in samples]
    start = torch.stack([int64(batch.tokens), int64(positions), draws, int64(tokens_left(batch))])
    temperature, top_k, top_p, min_p = sampling_columns(batch)
    tables = torch.full((shape.rows, shape.blocks), spare, dtype=torch.int32)
    tables[: len(samples), : blocks.tables.shape[1]] = blocks.tables
    groups = group_room(shape.rows) if shape.grouped else 0
    return Inputs(
        _padded(start, shape.rows, 0), _padded(int64(rows), shape.rows, -1), _padded(sample_ids, shape.rows, 0),
        int64([batch.seed]), batch.stop_ids,
        _padded(temperature, shape.rows, 0), _padded(top_k, shape.rows, 0), _padded(top_p, shape.rows, 1),
        _padded(min_p, shape.rows, 0), _padded(blocks.group_offsets, groups + 1, shape.rows),
        _padded(blocks.shared_blocks, groups, 0), tables,
    )  # fmt: skip


def _padded(values: Tensor, size: int, fill: int) -> Tensor:  # [..., n] -> [..., size]
    padded = values.new_full((*values.shape[:-1], size), fill)
    n = min(size, values.shape[-1])  # groups that a graph has no room for are not grouped
    padded[..., :n] = values[..., :n]
    return padded


def tokens_left(batch: Batch) -> list[int]:
    """How many tokens each sequence may still draw, a token or more."""
    pairs = zip(batch.samplings, batch.samples, strict=True)
    return [sampling.max_tokens - len(sample.response) for sampling, sample in pairs]


def group_room(rows: int) -> int:
    """Groups that a graph has room for: of two members or more, and one of the rows that are left over."""
    return rows // 2 + 1
