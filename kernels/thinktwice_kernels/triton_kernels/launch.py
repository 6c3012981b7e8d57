"""How the kernels are launched: block sizes and warps, chosen by reasoning for an H200, and the launch itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Where the interpreter or the ahead-of-time compiler stands in for a GPU.
_PROCESSORS_WITHOUT_GPU = 132


@dataclass(frozen=True)
class Shape:
    """The shape of a program.

    Row kernels: each thread reads `vectors` vectors of 16 bytes a step. Token kernels: `block` tokens a step.
    """

    num_warps: int
    vectors: int = 0
    block: int = 0

    def lanes(self, itemsize: int) -> int:
        """Elements of `itemsize` bytes that all threads together read with one vector each."""
        return self.num_warps * 32 * 16 // itemsize


# 4.8 TB/s at a latency of about 700 ns needs 25 KiB in flight on each of 132 processors. With 256 threads of at most
# 64 registers four programs share a processor, and each has 16 KiB under way: twice that, so that one may compute
# while the others wait. More vectors a step would only take registers.
SHAPES = {
    "row_statistics": Shape(num_warps=8, vectors=4),
    "row_gradient": Shape(num_warps=8, vectors=4),
    "combine_statistics": Shape(num_warps=1, block=64),
    "scale": Shape(num_warps=8, vectors=4),
    "select_tokens": Shape(num_warps=8, block=2048),
    # float64 arithmetic with 15 sums per token: two tokens a thread fit into registers.
    "sequence_loss": Shape(num_warps=8, block=512),
    "group_advantages": Shape(num_warps=4, block=512),
}
# Fewer programs than this many per processor leave memory idle: then several share a row.
PROGRAMS_PER_PROCESSOR = 4

Launch = tuple[Any, dict[str, Any], int]  # kernel, arguments, warps
_recorded: list[Launch] | None = None


def launch(kernel: Any, name: str, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    """Runs `kernel`, whose line of `SHAPES` is `name`, on all of the grid; nothing where that is empty."""
    warps = SHAPES[name].num_warps
    if _recorded is not None:
        _recorded.append((kernel, arguments, warps))
    elif 0 in grid:
        return
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](**arguments, num_warps=warps, num_stages=1)
    else:
        kernel[grid](**arguments)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it launches are written to the list that it gives, and nothing runs."""
    global _recorded
    _recorded, before = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = before


def steps_and_splits(
    rows: int,
    steps: int,  # that a whole row takes
    device: torch.device,
    most: int,
) -> tuple[int, int]:
    """How many steps of a row a program takes, and how many programs share a row, at most `most`."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // max(rows, 1))
    each = -(-steps // min(wanted, most))
    return each, -(-steps // each)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
