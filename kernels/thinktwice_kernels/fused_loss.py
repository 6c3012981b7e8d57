"""`linear_grpo_loss` tile by tile: loss, metrics and all gradients in one go.

A tile of logits becomes log-probabilities, these become the loss and its derivative, and with that the tile becomes
its own gradient, which two products turn into those of hidden states and weight: 6 T V H in all. Rows without signal
never enter a product, rows that the loss clips leave before the last two.

Where one token's loss depends on its whole sequence, tiles hold whole sequences. A sequence that is longer than a
tile is worked through in pieces, of which all but the last are computed a second time: 8 T V H for those.

Letters: T tokens, S sequences, V vocabulary, H hidden size, N computed tokens, n tokens of a segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from thinktwice_kernels.backends import PARTIALS, Head, LossInputs, Selection, backend_of
from thinktwice_kernels.linear_head import bytes_per_logit, new_tile, of_rows
from thinktwice_kernels.options import LossOptions
from thinktwice_kernels.packed import accumulation_dtype, uploaded
from thinktwice_kernels.products import HeadGradients, accumulated_logits, gradient_dtype
from thinktwice_kernels.tiles import rows_per_tile, tiles
from thinktwice_kernels.totals import totals_of

# Tokens that one thread or program takes at a time where sequences don't matter.
_TOKENS_TOGETHER = 1024


def linear_loss_forward(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T] int64
    head: Head,
    inputs: LossInputs,  # but for logps, which are computed here, and entropy
    options: LossOptions,
    wanted: tuple[bool, bool, bool],  # the gradients of hidden, weight and bias
    budget: int | None,  # bytes of logits and their gradient at a time
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Totals of the batch [len(PARTIALS)], and the gradients as `HeadGradients.result` gives them."""
    tokens = backend_of(hidden).select_tokens(_beside(hidden, inputs), hidden.shape[0], options)
    work = _Tiles(hidden, weight, targets, head, options, wanted, budget, tokens)
    segments = list(_segments(tokens, options, work.step))
    parts = [work.segment(*pair) for pair in zip(segments, _offsets(segments, hidden.device), strict=True)]
    totals = totals_of(torch.cat([hidden.new_empty(0, len(PARTIALS), dtype=torch.float64), *parts]))
    totals[PARTIALS.index("tokens")] = tokens.in_loss
    return totals, work.gradients.result()


def _beside(hidden: Tensor, inputs: LossInputs) -> LossInputs:
    """The inputs on the device of the hidden states."""
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    moved: Any = {name: uploaded(tensor, hidden.device) for name, tensor in tensors.items()}
    return replace(inputs, **moved)


@dataclass(frozen=True)
class _Segment:
    """Consecutive computed tokens whose loss depends on no others."""

    start: int
    stop: int
    offsets: list[int]  # of its sequences, from 0 to stop - start


def _segments(tokens: Selection, options: LossOptions, step: int) -> Iterator[_Segment]:
    count, borders = tokens.rows.numel(), tokens.borders
    if options.needs_whole_sequences():
        assert borders is not None
        yield from _whole_sequences(borders, step)
        return
    # Where one guided token makes its sequence guided, it must not reach into the next one. Elsewhere any cuts do.
    if borders is None:
        borders = list(range(0, count, _TOKENS_TOGETHER))
    for piece in tiles(0, count, step):
        inside = sorted({border - piece.start for border in borders if piece.start < border < piece.stop})
        yield _Segment(piece.start, piece.stop, [0, *inside, piece.stop - piece.start])


def _whole_sequences(borders: list[int], step: int) -> Iterator[_Segment]:
    """As many sequences at a time as a tile has rows for, at least one."""
    start, offsets = 0, [0]
    for begin, end in pairwise(borders):
        if end - start > step and begin > start:
            yield _Segment(start, begin, offsets)
            start, offsets = begin, [0]
        if end > begin:
            offsets.append(end - start)
    if len(offsets) > 1:
        yield _Segment(start, start + offsets[-1], offsets)


def _offsets(segments: list[_Segment], device: torch.device) -> Sequence[Tensor]:
    """Each segment's offsets, int32, in one piece of memory."""
    sizes = [len(segment.offsets) for segment in segments]
    offsets = torch.tensor([offset for segment in segments for offset in segment.offsets], dtype=torch.int32)
    return uploaded(offsets, device).split(sizes)


class _Tiles:
    """Works through segments, one tile of logits in memory."""

    def __init__(
        self,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        targets: Tensor,  # [T]
        head: Head,
        options: LossOptions,
        wanted: tuple[bool, bool, bool],
        budget: int | None,
        tokens: Selection,
    ):
        self._hidden, self._weight, self._targets = hidden, weight, targets
        self._head, self._options, self._tokens = head, options, tokens
        self._want_gradient = any(wanted)
        self._backend = backend_of(hidden)
        self._dtype, self._out_dtype = accumulation_dtype(hidden, weight), gradient_dtype(hidden, weight)
        self.step = rows_per_tile(weight.shape[0], bytes_per_logit(self._dtype, self._out_dtype), hidden.device, budget)
        capacity = min(self.step, tokens.rows.numel())
        self._buffer = new_tile(hidden, weight, capacity)
        self._out_buffer = self._buffer
        if any(wanted) and self._out_dtype != self._dtype:
            self._out_buffer = hidden.new_empty(capacity, weight.shape[0], dtype=self._out_dtype)
        self.gradients = HeadGradients(hidden, weight, head.bias, wanted)

    def segment(
        self,
        segment: _Segment,
        offsets: Tensor,  # the segment's, int32
    ) -> Tensor:
        """Partials [sequences, len(PARTIALS)]; the gradients are added to `gradients`."""
        count = segment.stop - segment.start
        logps, lse, entropy = (self._hidden.new_empty(count, dtype=self._dtype) for _ in range(3))
        pieces = list(tiles(0, count, self.step))
        logits = self._buffer
        for piece in pieces:
            rows = self._rows(segment, piece)
            logits = self._logits(rows, piece)
            found = self._backend.row_statistics(logits, self._targets[rows], of_rows(self._head, rows), True)
            logps[piece], lse[piece] = found[:2]
            entropy[piece] = cast(Tensor, found[2])
        partials, d_logps, d_entropy = self._backend.sequence_loss(
            _of_segment(self._tokens.inputs, segment, offsets, logps, entropy), self._options, self._want_gradient
        )
        if not self._want_gradient:
            return partials
        for piece in reversed(pieces):
            live = self._live(d_logps[piece])
            if live is not None and live.numel() == 0:
                continue
            rows = self._rows(segment, piece)
            if piece is not pieces[-1]:
                logits = self._logits(rows, piece)
            self._add_gradients(
                logits,
                rows,
                live,
                lse[piece],
                entropy[piece],
                d_logps[piece],
                d_entropy[piece] if d_entropy.numel() else None,
            )
        return partials

    def _rows(self, segment: _Segment, piece: slice) -> Tensor | slice:
        computed = slice(segment.start + piece.start, segment.start + piece.stop)
        return computed if self._tokens.everything else self._tokens.rows[computed]

    def _logits(self, rows: Tensor | slice, piece: slice) -> Tensor:
        return accumulated_logits(self._hidden[rows], self._weight, out=self._buffer[: piece.stop - piece.start])

    def _add_gradients(
        self,
        logits: Tensor,  # [t, V], overwritten
        rows: Tensor | slice,  # the t rows, of the T
        live: Tensor | None,  # those of the t that have a gradient; None: all
        lse: Tensor,  # [t]
        entropy: Tensor,  # [t]
        d_logps: Tensor,  # [t]
        d_entropy: Tensor | None,  # [t]
    ) -> None:
        count = d_logps.numel() if live is None else live.numel()
        d_logits = logits if self._out_dtype == self._dtype else self._out_buffer[:count]
        self._backend.row_gradient(
            logits, self._targets[rows], of_rows(self._head, rows), lse, entropy, d_logps, d_entropy, live, d_logits
        )
        if live is not None:
            if d_logits is logits:
                d_logits = _compacted(logits, live)
            rows = live + rows.start if isinstance(rows, slice) else rows[live]
        self.gradients.add(d_logits, rows)

    def _live(self, d_logps: Tensor) -> Tensor | None:
        """The rows of a tile with a gradient; None: all. Asking makes a GPU wait, so not where none can lack it."""
        inputs, options = self._tokens.inputs, self._options
        clips = inputs.old_logps is not None and options.policy_loss == "clip"
        whole = options.needs_whole_sequences()
        may_lack = clips or whole or inputs.guide_mask is not None or options.rollout_is.endswith("mask")
        if not (may_lack and options.skips_zero_advantages()):
            return None
        live = torch.nonzero(d_logps).squeeze(1)
        return None if live.numel() == d_logps.numel() else live


def _compacted(
    tile: Tensor,  # [t, V]
    rows: Tensor,  # [m] int64, rising
) -> Tensor:  # [m, V]
    """The rows moved to the tile's beginning, on a CPU in place: a copy needs the memory of a second tile."""
    if tile.is_cuda:  # where that would be a launch a row
        return tile[rows]
    for position, row in enumerate(rows.tolist()):
        if position != row:
            tile[position] = tile[row]
    return tile[: rows.numel()]


def _of_segment(
    inputs: LossInputs,
    segment: _Segment,
    offsets: Tensor,  # the segment's, int32
    logps: Tensor,  # [n]
    entropy: Tensor,  # [n]
) -> LossInputs:
    own = slice(segment.start, segment.stop)

    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[own]

    return replace(
        inputs,
        logps=logps,
        entropy=entropy,
        advantages=part(inputs.advantages),
        weights=inputs.weights[own],
        cu_seqlens=offsets,
        old_logps=part(inputs.old_logps),
        ref_logps=part(inputs.ref_logps),
        rollout_logps=part(inputs.rollout_logps),
        guide_mask=part(inputs.guide_mask),
    )
