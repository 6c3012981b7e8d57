"""Decoding steps as CUDA graphs: a captured forward pass per size of a batch, replayed on what stands in its buffers.

A graph is fixed in its shapes: rows of the batch, blocks of a table, and whether sequences share prefixes. Each is
rounded up, so that a few graphs serve all batches; they are captured when they are first needed. Rows that are left
over write into a spare block of the cache and attend to that one key.

Letters: N sequences, one token each; R rows of a graph, W blocks of its tables; V vocabulary.
"""

from collections.abc import Callable
from itertools import chain, takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.lists import int64, upload
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.rollout.step import Runner

_LEAST_KEYS = 256  # that a table of a graph has room for; a split of the attention's keys


class Capture(Protocol):
    """Makes a step repeatable."""

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run the step, and give what repeats it on the same memory, without Python."""
        ...


class Shape(NamedTuple):
    """What a graph is captured for."""

    rows: int  # R
    blocks: int  # W
    grouped: bool


class GraphRunner(Runner):
    """A runner whose decoding steps are graphs; other batches run as they come.

    The addresses of the model's weights and of the cache must not change. Logits of a decoding step are overwritten
    by the next.

    Args:
        policy: decoded with.
        cache: of its keys and values, with a spare block.
        max_sequences: largest batch that is captured; larger ones run as they come.
        max_tokens: longest sequence that is captured.
        capture: how; by default as CUDA graphs that share one pool of memory.
    """

    def __init__(
        self,
        policy: Policy,
        cache: PagedKVCache,
        max_sequences: int,
        max_tokens: int,
        capture: Capture | None = None,
    ):
        assert cache.spare_blocks, "rows that are left over need a block to write to"
        self._policy = policy
        self._cache = cache
        self._capture = capture or CudaCapture(cache.device)
        self._rows = row_buckets(max_sequences)
        self._blocks = block_buckets(-(-max_tokens // cache.block_size), cache.block_size)
        vocabulary: int = policy.model.config.get_text_config().vocab_size
        self._buffers = _Buffers(cache, self._rows[-1], self._blocks[-1], vocabulary)
        self._graphs: dict[Shape, Callable[[], None]] = {}

    @torch.inference_mode()
    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> Tensor:  # float32 [len(last), V]
        shape = self._shape(len(tokens), plan)
        ids, rows = upload([int64(tokens), int64(last)], self._policy.device)
        if shape is None:
            return self._forward(ids, plan, rows)
        self._buffers.fill(shape, ids, plan)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(lambda: self._step(shape))
        self._graphs[shape]()
        logits = self._buffers.logits[: len(tokens)]
        return logits if len(last) == len(tokens) else logits[rows]

    def _shape(self, tokens: int, plan: Plan) -> Shape | None:
        """Of the smallest graph that holds a batch; None where no graph does."""
        sequences, blocks = plan.block_tables.shape
        decoding = 0 < tokens == sequences  # a plan of the scheduler has a token or more of each sequence
        if not decoding or sequences > self._rows[-1] or blocks > self._blocks[-1]:
            return None
        rows = next(size for size in self._rows if size >= sequences)
        # The rows that are left over are one more group.
        grouped = plan.shared_blocks is not None and len(plan.shared_blocks) < group_room(rows)
        return Shape(rows, next(size for size in self._blocks if size >= blocks), grouped)

    def _step(self, shape: Shape) -> None:
        buffers = self._buffers
        logits = self._forward(buffers.tokens[: shape.rows], buffers.plan(shape), buffers.every_row[: shape.rows])
        buffers.logits[: shape.rows].copy_(logits)

    def _forward(self, tokens: Tensor, plan: Plan, rows: Tensor) -> Tensor:
        return self._policy(tokens, plan.positions, PagedAttention(self._cache, plan), rows, linear_head)


class _Buffers:
    """What graphs read and write; each its first rows."""

    def __init__(self, cache: PagedKVCache, rows: int, blocks: int, vocabulary: int):
        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=cache.device)

        self.tokens, self.positions, self.slots = zeros(rows), zeros(rows), zeros(rows)
        self.context_lens, self.shared_blocks = (zeros(rows, dtype=torch.int32) for _ in range(2))
        self.group_offsets = zeros(rows + 1, dtype=torch.int32)
        self.tables = zeros(rows * blocks, dtype=torch.int32)  # a graph's [R, W] are its first
        self.every_row = torch.arange(rows, device=cache.device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)
        # One for all graphs: a result of their own would be kept by each.
        self.logits = zeros(rows, vocabulary, dtype=torch.float32)
        self._spare = cache.spare_blocks[0]
        self._spare_slot = self._spare * cache.block_size

    def plan(self, shape: Shape) -> Plan:
        """The plan of every batch of this shape."""
        rows, room = shape.rows, group_room(shape.rows)
        return Plan(
            self.tables[: rows * shape.blocks].view(rows, shape.blocks),
            self.context_lens[:rows],
            self.starts[: rows + 1],
            self.positions[:rows],
            self.slots[:rows],
            self.group_offsets[: room + 1] if shape.grouped else None,
            self.shared_blocks[:room] if shape.grouped else None,
        )

    def fill(self, shape: Shape, tokens: Tensor, plan: Plan) -> None:
        """Put a batch in; what a table holds beyond its sequence is not read."""
        there = self.plan(shape)
        n, blocks = plan.block_tables.shape
        there.block_tables[:n, :blocks].copy_(plan.block_tables)
        there.block_tables[n:, 0] = self._spare
        for buffer, values, left_over in (
            (self.tokens[: shape.rows], tokens, 0),
            (there.positions, plan.positions, 0),
            (there.slots, plan.slots, self._spare_slot),
            (there.context_lens, plan.context_lens, 1),
        ):
            buffer[:n].copy_(values)
            buffer[n:] = left_over
        if there.group_offsets is None or there.shared_blocks is None:
            return
        assert plan.group_offsets is not None and plan.shared_blocks is not None
        groups = len(plan.shared_blocks)
        there.group_offsets[: groups + 1].copy_(plan.group_offsets)
        there.group_offsets[groups + 1 :] = shape.rows
        there.shared_blocks[:groups].copy_(plan.shared_blocks)
        there.shared_blocks[groups:] = 0


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
            step()  # libraries get ready at their first call, which no graph can hold
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using the GPU meanwhile: NCCL's watchdog asks for its events.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            step()
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
