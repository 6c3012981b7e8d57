"""Runs of computed tokens whose loss depends on no others: what `linear_grpo_loss` works through one after another.

Letters: T tokens, N computed tokens, n tokens of a segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from thinktwice_kernels.options import LossInputs, LossOptions, Selection
from thinktwice_kernels.rows import tiles

# Tokens that one thread or program takes at a time where sequences don't matter.
_TOKENS_TOGETHER = 1024


@dataclass(frozen=True)
class Segment:
    """Consecutive computed tokens whose loss depends on no others."""

    start: int
    stop: int
    offsets: list[int]  # of its sequences, from 0 to stop - start

    def rows(self, tokens: Selection, piece: slice) -> Tensor | slice:
        """Which of the T tokens a piece of it holds."""
        computed = slice(self.start + piece.start, self.start + piece.stop)
        return computed if tokens.everything else tokens.rows[computed]

    def inputs(
        self,
        of_all: LossInputs,  # N tokens
        offsets: Tensor,  # this segment's, int32
        logps: Tensor,  # [n]
        entropy: Tensor,  # [n]
    ) -> LossInputs:
        """Its part of them."""
        own = slice(self.start, self.stop)

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[own]

        return replace(
            of_all,
            logps=logps,
            entropy=entropy,
            advantages=part(of_all.advantages),
            weights=of_all.weights[own],
            cu_seqlens=offsets,
            old_logps=part(of_all.old_logps),
            ref_logps=part(of_all.ref_logps),
            rollout_logps=part(of_all.rollout_logps),
            guide_mask=part(of_all.guide_mask),
        )


def segments_of(
    tokens: Selection,
    options: LossOptions,
    step: int,  # rows of a tile, at most
    multiple: int,  # of which a tile's rows are one where cuts may lie anywhere
) -> Iterator[Segment]:
    """All computed tokens, as few segments as can be; one is longer than a tile only if a sequence is."""
    count, borders = tokens.rows.numel(), tokens.borders
    if options.needs_whole_sequences():
        assert borders is not None
        yield from _whole_sequences(borders, step)
        return
    # Where one guided token makes its sequence guided, it must not reach into the next one. Elsewhere any cuts do.
    if borders is None:
        borders = list(range(0, count, _TOKENS_TOGETHER))
    for piece in tiles(0, count, step, multiple):
        inside = sorted({border - piece.start for border in borders if piece.start < border < piece.stop})
        yield Segment(piece.start, piece.stop, [0, *inside, piece.stop - piece.start])


def _whole_sequences(borders: list[int], step: int) -> Iterator[Segment]:
    """As many sequences at a time as a tile has rows for, at least one."""
    start, offsets = 0, [0]
    for begin, end in pairwise(borders):
        if end - start > step and begin > start:
            yield Segment(start, begin, offsets)
            start, offsets = begin, [0]
        if end > begin:
            offsets.append(end - start)
    if len(offsets) > 1:
        yield Segment(start, start + offsets[-1], offsets)


def may_lack_gradient(inputs: LossInputs, options: LossOptions) -> bool:
    """Whether a computed token can be without a gradient: clipped, dropped, or left out of the shaping."""
    clips = inputs.old_logps is not None and options.policy_loss == "clip"
    whole = options.needs_whole_sequences()
    may_lack = clips or whole or inputs.guide_mask is not None or options.rollout_is.endswith("mask")
    return may_lack and options.skips_zero_advantages()


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU may read pageable memory after it is freed, so the copy is from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
