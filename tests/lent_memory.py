"""Memory on the CPU that a KV cache lends: what was in it is lost each time, its address stays."""

import torch
from torch import Tensor

_LOST = 255  # in every byte: NaN in floating point


class Lent:
    """Stands for ``arena.Arena``."""

    def __init__(self, size: int):
        self._bytes = torch.full((size,), _LOST, dtype=torch.uint8)
        self.calls: list[str] = []
        self.there = False

    def map(self) -> None:
        if not self.there:
            self.calls.append("map")
        self.there = True

    def unmap(self) -> None:
        if self.there:
            self.calls.append("unmap")
        self.there = False
        self._bytes.fill_(_LOST)

    def tensor(self) -> Tensor:
        assert self.there
        return self._bytes

    def close(self) -> None:
        self.calls.append("close")
