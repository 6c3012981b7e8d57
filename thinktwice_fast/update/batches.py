"""Training sequences packed into rows without padding.

Letters: S sequences, T tokens of the row, N response tokens (those with a loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from thinktwice_fast.model.attention import Attention, PrefixAttention, causal_attention
from thinktwice_fast.model.flash import Flash
from thinktwice_fast.model.lists import int64, upload


class Trainable(Protocol):
    """A prompt and the response that the loss is on: a rollout, or a supervised example."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def response(self) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """A supervised example."""

    prompt: tuple[int, ...]  # token ids
    response: list[int]  # token ids, end token included


@dataclass(frozen=True)
class PackedRow:
    """S sequences; the last token of each is only a target, so it is not in the row."""

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each sequence
    attention: Attention
    select: torch.Tensor  # int64 [N], places in the row that predict a response token
    targets: torch.Tensor  # int64 [N], the response tokens, sequence after sequence
    cu_seqlens: torch.Tensor  # int32 [S+1], where each sequence's response begins among the N


def pack(sequences: Sequence[Trainable], device: torch.device, flash: Flash | None = None) -> PackedRow:
    """Pack sequences with at least one prompt and one response token each, one after another.

    Args:
        flash: the attention's kernels, see ``PrefixAttention``.
    """
    row = _Row()
    select: list[int] = []
    for sequence in sequences:
        start = row.add([*sequence.prompt, *sequence.response[:-1]])
        select += range(start + len(sequence.prompt) - 1, start + sequence_tokens(sequence))
    return row.packed(sequences, select, causal_attention(row.lengths, device, flash), device)


def pack_shared(sequences: Sequence[Trainable], device: torch.device, flash: Flash | None = None) -> PackedRow:
    """Pack sequences so that those with one prompt share it: [prompt][response 1]...[response G] for each prompt.

    A response sees its prompt and itself, at positions that continue the prompt's. The prompt's last token predicts the
    first token of each of its responses, so ``select`` repeats it. A prompt that only one sequence has stands before
    its response as ``pack`` would put it. Loss and gradients are those of ``pack``, and so is the order of targets.

    Args:
        sequences: with at least one prompt and one response token each, in any order.
        flash: the attention's kernels, see ``PrefixAttention``.
    """
    row = _Row()
    select: list[list[int]] = [[] for _ in sequences]
    for members in families(sequences):
        prompt = sequences[members[0]].prompt
        if len(members) == 1:
            response = sequences[members[0]].response
            start = row.add([*prompt, *response[:-1]])
            select[members[0]] = list(range(start + len(prompt) - 1, start + len(prompt) + len(response) - 1))
            continue
        shared = len(row.lengths)
        last = row.add(list(prompt)) + len(prompt) - 1
        for member in members:
            own = sequences[member].response[:-1]
            select[member] = [last]
            if own:
                start = row.add(own, shared)
                select[member] += range(start, start + len(own))
    attention = PrefixAttention.from_segments(row.lengths, row.prefix, device, flash)
    return row.packed(sequences, [place for places in select for place in places], attention, device)


class _Row:
    """A row under construction, segment by segment."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.prefix: list[int] = []
        self._tokens: list[int] = []
        self._positions: list[int] = []

    def add(self, tokens: list[int], prefix: int = -1) -> int:
        """A segment that continues segment ``prefix``; returns the place of its first token."""
        start = len(self._tokens)
        before = self.lengths[prefix] if prefix >= 0 else 0
        self.lengths.append(len(tokens))
        self.prefix.append(prefix)
        self._tokens += tokens
        self._positions += range(before, before + len(tokens))
        return start

    def packed(
        self, sequences: Sequence[Trainable], select: list[int], attention: Attention, device: torch.device
    ) -> PackedRow:
        targets = int64([token for sequence in sequences for token in sequence.response])
        ends = accumulate((len(sequence.response) for sequence in sequences), initial=0)
        cu_seqlens = torch.tensor(list(ends), dtype=torch.int32)
        tokens, positions, places, targets, cu_seqlens = upload(
            [int64(self._tokens), int64(self._positions), int64(select), targets, cu_seqlens], device
        )
        return PackedRow(tokens, positions, attention, places, targets, cu_seqlens)


def families(sequences: Sequence[Trainable]) -> list[list[int]]:
    """Indices of the sequences by prompt, in the order in which each prompt first comes."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt, []).append(index)
    return list(by_prompt.values())


def sequence_tokens(sequence: Trainable) -> int:
    """Tokens that the sequence takes in a row."""
    return len(sequence.prompt) + len(sequence.response) - 1
