"""Decoding on a GPU that goes on by itself: steps as CUDA graphs, replayed several times before the host looks.

A step is the forward pass, the draw, and ``csrc.advance``, which notes down what was drawn and makes it the next step's
input; a row that has ended idles. A chunk is one transfer of what the host knows, up to ``_MOST_STEPS`` steps, and one
transfer back. The chunk after it is launched before the first one's results are waited for: its rows go on from the
device's own state, in blocks of the cache taken ahead, while the host notes down the first one's.

A graph is fixed in its shapes: rows of the batch, blocks of a table, and whether sequences share prefixes. Each is
rounded up, so that a few graphs serve all batches; they are captured when they are first needed. Rows that are left
over have ended from the start. Everything else that may change stands in buffers.

Letters: N sequences; R rows of a graph, W blocks of its tables, G groups it has room for, S steps of a chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from thinktwice_fast.model import csrc
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.lists import download, int64, pack, packed_size, unpack
from thinktwice_fast.model.paged import Blocks, PagedKVCache, Plan
from thinktwice_fast.model.policy import Model
from thinktwice_fast.rollout.batch import Batch, NewTokens
from thinktwice_fast.rollout.batch import Sequence as Decoding
from thinktwice_fast.rollout.modules import ModuleRunner
from thinktwice_fast.rollout.step import not_finite, random_keys, sampling_columns

_LEAST_KEYS = 256  # that a table of a graph has room for; a split of the attention's keys
_MOST_STEPS = 8  # of a chunk


class Capture(Protocol):
    """Makes a step repeatable."""

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run the step once, and give what repeats it on the same memory, without Python."""
        ...


class Shape(NamedTuple):
    """What a graph is captured for."""

    rows: int  # R
    blocks: int  # W
    grouped: bool
    stop_ids: int


class GraphRunner(ModuleRunner):
    """A runner whose decoding steps are graphs; other batches run as they come.

    The addresses of the model's weights and of the cache must not change. A chunk ends with its steps; where others
    wait for a place, no later than a sequence can have no tokens left. Until then rows that stopped early idle.

    Args:
        model: decoded with.
        cache: of its keys and values, with a spare block.
        max_sequences: largest batch.
        max_tokens: longest sequence.
        capture: how; by default as CUDA graphs that share one pool of memory.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        max_sequences: int,
        max_tokens: int,
        capture: Capture | None = None,
    ):
        super().__init__(model, cache)
        assert cache.spare_blocks, "rows that are left over need a block to write to"
        self._capture = capture or CudaCapture(cache.device)
        self._longest = max_tokens
        self._rows = row_buckets(max_sequences)
        self._blocks = block_buckets(-(-max_tokens // cache.block_size), cache.block_size)
        self._buffers: _Buffers | None = None
        self._graphs: dict[Shape, Callable[[], None]] = {}
        self._ahead: _Chunk | None = None  # launched, and not asked for yet
        self._goes_ahead = True

    def refresh(self) -> None:
        super().refresh()
        self._ahead, self._goes_ahead = None, True

    @torch.inference_mode()
    def step(self, batch: Batch, most: int) -> NewTokens:
        if not batch.decodes:
            self._drop_ahead(batch)
            return super().step(batch, most)
        if self._ahead is not None and not self._ahead.holds(batch, most):
            self._drop_ahead(batch)
        chunk = self._ahead or self._begin(batch, most)
        self._ahead = self._follow(chunk, batch, most)
        new = chunk.results(batch)
        if any(tokens[-1] < 0 for tokens in new.tokens):
            self._ahead = None
            raise not_finite()
        handles = _handles(batch)
        self._cache.grow(handles, [len(tokens) - 1 for tokens in new.tokens])
        if self._ahead is None:
            self._cache.trim(handles)
        return new

    def _drop_ahead(self, batch: Batch) -> None:
        """Other sequences have come. They will again: what follows an end asks for them.

        What the dropped chunk wrote lies beyond its sequences' ends, or was in the stream before a block's next owner.
        """
        if self._ahead is None:
            return
        self._ahead, self._goes_ahead = None, False
        self._cache.trim(_handles(batch))

    def _begin(self, batch: Batch, most: int) -> "_Chunk":
        """The first chunk of a batch: as many steps as there are blocks for, one of them reserved already."""
        left = _left(batch)
        most = min(most, _MOST_STEPS, min(left) if batch.others_wait else max(left))
        for steps in range(most, 0, -1):
            blocks = self._take_ahead(batch, left, steps)
            if blocks is not None:
                break
        assert blocks is not None, "one step takes no more blocks"
        return self._launch(batch, blocks, steps, None)

    def _follow(self, chunk: "_Chunk", batch: Batch, most: int) -> "_Chunk | None":
        """The chunk after one whose results are not known; None where others wait, nothing can be left or no blocks."""
        left = _left(batch)
        steps = min(most, _MOST_STEPS, max(left) - chunk.steps)
        if not self._goes_ahead or batch.others_wait or steps < 1:
            return None
        blocks = self._take_ahead(batch, left, chunk.steps + steps)
        return None if blocks is None else self._launch(batch, blocks, steps, chunk)

    def _take_ahead(self, batch: Batch, left: Sequence[int], steps: int) -> Blocks | None:
        return self._cache.take_ahead(_handles(batch), [min(steps, n) - 1 for n in left])

    def _launch(self, batch: Batch, blocks: Blocks, steps: int, before: "_Chunk | None") -> "_Chunk":
        buffers = self._buffers
        if buffers is None or buffers.stop_ids != len(batch.stop_ids):
            sizes = (self._rows[-1], self._blocks[-1], len(batch.stop_ids))
            buffers = self._buffers = _Buffers(self._cache, *sizes)
            self._graphs.clear()
        shape = self._shape(blocks, buffers)
        buffers.fill(shape, _host_inputs(shape, batch, blocks, before, self._cache.spare_blocks[0]))
        for _ in range(steps):
            self._replay(shape, buffers)
        rows = {id(sequence): row for row, sequence in enumerate(batch.sequences)}
        return _Chunk(batch.sequences, rows, steps, shape, buffers.results(shape))

    def _shape(self, blocks: Blocks, buffers: "_Buffers") -> Shape:
        """Of the smallest graph that holds a batch."""
        sequences, width = blocks.tables.shape
        rows = next(size for size in self._rows if size >= sequences)
        # The rows that are left over are one more group.
        grouped = 0 < len(blocks.shared_blocks) < group_room(rows)
        return Shape(rows, next(size for size in self._blocks if size >= width), grouped, buffers.stop_ids)

    def _replay(self, shape: Shape, buffers: "_Buffers") -> None:
        if shape in self._graphs:
            self._graphs[shape]()
        else:
            self._graphs[shape] = self._capture(lambda: self._compute(shape, buffers))

    def _compute(self, shape: Shape, buffers: "_Buffers") -> None:
        """A step."""
        plan, inputs, state = buffers.plan(shape), buffers.inputs(shape), buffers.state(shape)
        rows, attention = buffers.every_row[: shape.rows], PagedAttention(self._cache, plan, self._longest)
        logits = self._policy(state.tokens, state.positions, attention, rows, self._head, self._product)
        options = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
        keys = {"seed": inputs.seed, "sample_ids": inputs.sample_ids, "positions": state.draws}
        buffers.advance(shape, csrc.draw(logits, *options, **keys))


@dataclass(frozen=True)
class _Chunk:
    """Steps under way, or done, on the device."""

    sequences: list[Decoding]
    rows: dict[int, int]  # of each, by its id
    steps: int
    shape: Shape
    wait: Callable[[], Tensor]  # for the results, packed

    def holds(self, batch: Batch, most: int) -> bool:
        """Whether these are the next steps of all of the batch's sequences."""
        return self.steps <= most and all(id(sequence) in self.rows for sequence in batch.sequences)

    def row(self, sequence: Decoding) -> int:
        return self.rows[id(sequence)]

    def results(self, batch: Batch) -> NewTokens:
        """What the batch's sequences drew."""
        got = _Results(*unpack(self.wait(), _results_like(self.shape)))
        counts = got.counts.tolist()
        places = [(row, counts[row]) for row in map(self.row, batch.sequences)]
        assert all(count > 0 for _, count in places), "they have not ended"
        columns = [column.T.tolist() for column in (got.tokens, got.logps, got.entropies)]
        return NewTokens(*([column[row][:count] for row, count in places] for column in columns))


class _Inputs(NamedTuple):
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


class _Results(NamedTuple):
    """What comes back of a chunk in one transfer."""

    tokens: Tensor  # int64 [S, R]
    logps: Tensor  # float32 [S, R]
    entropies: Tensor  # float32 [S, R]
    counts: Tensor  # int64 [R], how many of the S each row has


class _Buffers:
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

    def inputs(self, shape: Shape) -> _Inputs:
        like = _inputs_like(shape)
        return _Inputs(*unpack(self._inputs[: packed_size(like)], like))

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

    def fill(self, shape: Shape, given: _Inputs) -> None:
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

    def _views(self, shape: Shape) -> _Results:
        like = _results_like(shape)
        return _Results(*unpack(self._results[: packed_size(like)], like))


def _inputs_like(shape: Shape) -> _Inputs:
    """Without memory."""
    rows, groups = shape.rows, group_room(shape.rows) if shape.grouped else 0

    def like(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    return _Inputs(
        like(4, rows), like(rows), like(rows), like(1), like(shape.stop_ids),
        like(rows, dtype=torch.float32), like(rows, dtype=torch.int32), like(rows, dtype=torch.float32),
        like(rows, dtype=torch.float32), like(groups + 1, dtype=torch.int32), like(groups, dtype=torch.int32),
        like(rows, shape.blocks, dtype=torch.int32),
    )  # fmt: skip


def _results_like(shape: Shape) -> _Results:
    """Without memory."""
    size = (_MOST_STEPS, shape.rows)
    numbers = [torch.empty(size, dtype=torch.float32, device="meta") for _ in range(2)]
    tokens, counts = (torch.empty(size, dtype=torch.int64, device="meta") for size in (size, size[1:]))
    return _Results(tokens, *numbers, counts)


def _host_inputs(shape: Shape, batch: Batch, blocks: Blocks, before: _Chunk | None, spare: int) -> _Inputs:
    """On the CPU; what a table holds beyond its sequence is not read."""
    samples = batch.samples
    sample_ids, draws = random_keys(batch)
    rows = [-1] * len(samples) if before is None else [before.row(sequence) for sequence in batch.sequences]
    # The last token's place: all before it are in the cache.
    positions = [len(sample.prompt) + len(sample.response) - 1 for sample in samples]
    start = torch.stack([int64(batch.tokens), int64(positions), draws, int64(_left(batch))])
    temperature, top_k, top_p, min_p = sampling_columns(batch)
    tables = torch.full((shape.rows, shape.blocks), spare, dtype=torch.int32)
    tables[: len(samples), : blocks.tables.shape[1]] = blocks.tables
    groups = group_room(shape.rows) if shape.grouped else 0
    return _Inputs(
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


def _left(batch: Batch) -> list[int]:
    """How many tokens each sequence may still draw, a token or more."""
    pairs = zip(batch.samplings, batch.samples, strict=True)
    return [sampling.max_tokens - len(sample.response) for sampling, sample in pairs]


def _handles(batch: Batch) -> list[int]:
    return [sequence.cached for sequence in batch.sequences]


class CudaCapture:
    """Captures steps as CUDA graphs that share one pool of memory: no two run at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()  # as it is: libraries get ready at their first call, which no graph can hold
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using the GPU meanwhile: NCCL's watchdog asks for its events.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            step()  # is recorded, and does not run
        return graph.replay


def row_buckets(most: int) -> list[int]:
    """Rows of the graphs for up to ``most`` sequences, ascending: closer together where a row costs more of a step."""
    sizes = chain((1, 2, 4, 8), range(16, 32, 8), range(32, 128, 16), range(128, most, 32))
    return [*takewhile(lambda size: size < most, sizes), most]


def block_buckets(most: int, block_size: int) -> list[int]:
    """Blocks of the tables of graphs, ascending: doubling, since keys that a sequence does not have cost little."""
    sizes = [min(most, max(1, _LEAST_KEYS // block_size))]
    while sizes[-1] < most:
        sizes.append(min(most, 2 * sizes[-1]))
    return sizes


def group_room(rows: int) -> int:
    """Groups that a graph has room for: of two members or more, and one of the rows that are left over."""
    return rows // 2 + 1
