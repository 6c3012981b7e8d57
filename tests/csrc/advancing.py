"""Rows that decode, for `csrc.advance`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinktwice_fast.model.csrc import Sampled, State

BLOCK_SIZE, SPARE_SLOT, STEPS = 4, 999, 3


class Rows(NamedTuple):
    """Arguments of ``csrc.advance`` after what was drawn."""

    stop_ids: Tensor
    block_tables: Tensor
    block_size: int
    spare_slot: int
    state: Tensor
    context_lens: Tensor
    new_tokens: Tensor
    new_logps: Tensor
    new_entropies: Tensor

    def to(self, device: str) -> "Rows":
        moved: dict[str, Any] = {name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**moved)


def decoding_rows(n: int) -> Rows:
    """Some that have ended, at all places in their blocks; some tables are too short for what comes next."""
    random = torch.Generator().manual_seed(n)

    def numbers(high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, size, generator=random, dtype=dtype)

    state = torch.zeros(len(State._fields), n + 5, dtype=torch.int64)[:, :n]  # rows of more than are used
    fields = State(*state)
    for field, high in ((fields.tokens, 50), (fields.positions, 12), (fields.draws, 9), (fields.left, 4)):
        field.copy_(numbers(high, n))
    tables = numbers(90, n, 3, dtype=torch.int32)
    lens = torch.zeros(n, dtype=torch.int32)
    new: list[Any] = [torch.zeros(STEPS, n, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32)]
    return Rows(torch.tensor([7, 11]), tables, BLOCK_SIZE, SPARE_SLOT, state, lens, *new)


def drawings(n: int, steps: int) -> Iterator[Sampled]:
    """Tokens from 0 to 49, one in ten of them -1: refused."""
    random = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        tokens = torch.randint(50, (n,), generator=random)
        tokens[torch.rand(n, generator=random) < 0.1] = -1
        yield Sampled(tokens, *torch.rand(3, n, generator=random))
