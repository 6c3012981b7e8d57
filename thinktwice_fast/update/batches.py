"""Training sequences packed into rows without padding, micro-batch by micro-batch.

Letters: S sequences, T tokens of the row, N response tokens (those with a loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from thinktwice_fast.model.attention import PackedAttention


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
    """S sequences one after another. The last token of each is only a target, so it is not in the row."""

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each sequence
    attention: PackedAttention
    select: torch.Tensor  # int64 [N], positions in the row that predict a response token
    targets: torch.Tensor  # int64 [N], the response tokens
    cu_seqlens: torch.Tensor  # int32 [S+1], where each sequence's response begins among the N


def pack(sequences: Sequence[Trainable], device: torch.device) -> PackedRow:
    """Pack sequences with at least one prompt and one response token each."""
    tokens: list[int] = []
    positions: list[int] = []
    select: list[int] = []
    targets: list[int] = []
    ends = [0]
    for sequence in sequences:
        length = sequence_tokens(sequence)
        start = len(tokens)
        tokens += sequence.prompt
        tokens += sequence.response[:-1]
        positions += range(length)
        select += range(start + len(sequence.prompt) - 1, start + length)
        targets += sequence.response
        ends.append(len(targets))
    return PackedRow(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        PackedAttention.from_lengths([sequence_tokens(sequence) for sequence in sequences], device),
        torch.tensor(select, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
    )


def sequence_tokens(sequence: Trainable) -> int:
    """Tokens that the sequence takes in a row."""
    return len(sequence.prompt) + len(sequence.response) - 1


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in micro-batches of at most ``budget`` tokens, longest sequences first.

    A sequence longer than the budget gets a micro-batch of its own. Neighbours are alike in length, so that
    little is wasted where attention pads.
    """
    parts: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or lengths[index] > room:
            parts.append([])
            room = budget
        parts[-1].append(index)
        room -= lengths[index]
    return parts
