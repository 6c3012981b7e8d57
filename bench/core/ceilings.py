"""What a machine can do at best: copies and products of torch, and nothing else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]


def copy_of(source: Tensor) -> Work:
    source = source.detach()
    return partial(torch.empty_like(source).copy_, source)


def square_products(
    flop: float,
    size: int,  # rows and columns
    dtype: torch.dtype,
    device: torch.device,
) -> Work:
    """So many products of two squares, of which the last one is cut."""
    left, right, out = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    rows = round(flop / (2 * size * size))
    counts = [min(size, rows - start) for start in range(0, rows, size)]

    def products() -> None:
        for count in counts:
            torch.mm(left[:count], right, out=out[:count])

    return products
