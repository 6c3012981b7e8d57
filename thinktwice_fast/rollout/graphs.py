"""Decoding on a GPU that goes on by itself: steps as CUDA graphs, replayed several times before the host looks.

A step is the forward pass, the draw, and ``csrc.advance``, which notes down what was drawn and makes it the next step's
input; a row that has ended idles. A chunk is one transfer of what the host knows, up to ``MOST_STEPS`` steps, and one
transfer back. The chunk after it is launched before the first one's results are waited for: its rows go on from the
device's own state, in blocks of the cache taken ahead, while the host notes down the first one's.

A graph is fixed in its shapes: rows of the batch, blocks of a table, and whether sequences share prefixes. Each is
rounded up, so that a few graphs serve all batches; they are captured when they are first needed. Rows that are left
over have ended from the start. Everything else that may change stands in buffers.
"""

from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import Protocol

import torch

from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model import csrc
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.paged import Blocks, PagedKVCache
from thinktwice_fast.model.policy import Model
from thinktwice_fast.rollout.batch import Batch, NewTokens
from thinktwice_fast.rollout.chunks import MOST_STEPS, Buffers, Chunk, Shape, group_room, host_inputs, tokens_left
from thinktwice_fast.rollout.modules import ModuleRunner
from thinktwice_fast.rollout.step import not_finite

_LEAST_KEYS = 256  # that a table of a graph has room for; a split of the attention's keys


class Capture(Protocol):
    """Makes a step repeatable."""

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run the step once, and give what repeats it on the same memory, without Python."""
        ...


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
        self._buffers: Buffers | None = None
        self._graphs: dict[Shape, Callable[[], None]] = {}
        self._ahead: Chunk | None = None  # launched, and not asked for yet
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

    def _begin(self, batch: Batch, most: int) -> Chunk:
        """The first chunk of a batch: as many steps as there are blocks for, one of them reserved already."""
        left = tokens_left(batch)
        most = min(most, MOST_STEPS, min(left) if batch.others_wait else max(left))
        for steps in range(most, 0, -1):
            blocks = self._take_ahead(batch, left, steps)
            if blocks is not None:
                break
        assert blocks is not None, "one step takes no more blocks"
        return self._launch(batch, blocks, steps, None)

    def _follow(self, chunk: Chunk, batch: Batch, most: int) -> Chunk | None:
        """The chunk after one whose results are not known; None where others wait, nothing can be left or no blocks."""
        left = tokens_left(batch)
        steps = min(most, MOST_STEPS, max(left) - chunk.steps)
        if not self._goes_ahead or batch.others_wait or steps < 1:
            return None
        blocks = self._take_ahead(batch, left, chunk.steps + steps)
        return None if blocks is None else self._launch(batch, blocks, steps, chunk)

    def _take_ahead(self, batch: Batch, left: Sequence[int], steps: int) -> Blocks | None:
        return self._cache.take_ahead(_handles(batch), [min(steps, n) - 1 for n in left])

    def _launch(self, batch: Batch, blocks: Blocks, steps: int, before: Chunk | None) -> Chunk:
        buffers = self._buffers
        if buffers is None or buffers.stop_ids != len(batch.stop_ids):
            sizes = (self._rows[-1], self._blocks[-1], len(batch.stop_ids))
            buffers = self._buffers = Buffers(self._cache, *sizes)
            self._graphs.clear()
        shape = self._shape(blocks, buffers)
        buffers.fill(shape, host_inputs(shape, batch, blocks, before, self._cache.spare_blocks[0]))
        for _ in range(steps):
            self._replay(shape, buffers)
        rows = {id(sequence): row for row, sequence in enumerate(batch.sequences)}
        return Chunk(batch.sequences, rows, steps, shape, buffers.results(shape))

    def _shape(self, blocks: Blocks, buffers: Buffers) -> Shape:
        """Of the smallest graph that holds a batch."""
        sequences, width = blocks.tables.shape
        rows = next(size for size in self._rows if size >= sequences)
        # The rows that are left over are one more group.
        grouped = 0 < len(blocks.shared_blocks) < group_room(rows)
        return Shape(rows, next(size for size in self._blocks if size >= width), grouped, buffers.stop_ids)

    def _replay(self, shape: Shape, buffers: Buffers) -> None:
        if shape in self._graphs:
            self._graphs[shape]()
        else:
            self._graphs[shape] = self._capture(lambda: self._compute(shape, buffers))

    def _compute(self, shape: Shape, buffers: Buffers) -> None:
        """A step."""
        plan, inputs, state = buffers.plan(shape), buffers.inputs(shape), buffers.state(shape)
        rows, attention = buffers.every_row[: shape.rows], PagedAttention(self._cache, plan, self._longest)
        logits = self._policy(state.tokens, state.positions, attention, rows, self._head, self._product)
        options = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
        keys = {"seed": inputs.seed, "sample_ids": inputs.sample_ids, "positions": state.draws}
        buffers.advance(shape, csrc.draw(logits, *options, **keys))


def _handles(batch: Batch) -> list[int]:
    return [sequence.cached for sequence in batch.sequences]


class CudaCapture:
    """Captures steps as CUDA graphs that share one pool of memory: no two run at a time.

    Raises:
        UserError: a step that no graph can hold, as where it looks at the GPU's results.
    """

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
        try:
            # Other threads go on using the GPU meanwhile: NCCL's watchdog asks for its events.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                step()  # is recorded, and does not run
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails may leave its own in place
            cause = error.__context__ or error  # the end of a capture that failed fails too
            if isinstance(cause, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"a decoding step of this model can't be a CUDA graph ({str(cause).splitlines()[0]})",
                ("give ", Option("rollout.decoder", "modules")),
            ) from error
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
