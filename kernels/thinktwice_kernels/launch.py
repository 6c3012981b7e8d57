"""What every op stands on: the type it computes in, the code that runs it, the launch of its kernels, one derivative.

Triton runs on CUDA, and on the CPU where TRITON_INTERPRET=1 is set; else the CPU runs C++ on rows of logits
(csrc/loss/) and in the ops of a decoder layer (csrc/layers/), and plain torch on everything else. Kernels that are too
long for their op's file lie in triton/, each with its launch.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NAMESPACE = "thinktwice_kernels"  # of the ops in torch.library
Gradients = tuple[Tensor | None, ...]
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, looks once, when it is imported
_REMEDY = "run `make`, or `pip install ./kernels` in the repository"
# Where the interpreter or the ahead-of-time compiler stands in for a GPU.
_PROCESSORS_WITHOUT_GPU = 132


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def fake_gradient(like: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    """A fake gradient: of the shape of `like`, or [0] where it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,), dtype=dtype)


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton computes with tensors beside this one: on CUDA, or in its interpreter."""
    return tensor.is_cuda or (_INTERPRETED and tensor.device.type == "cpu")


def in_triton(name: str) -> Any:
    """The module triton/<name>.py, imported when it first runs: it may itself stand on the file of the op."""
    return importlib.import_module(f"thinktwice_kernels.triton.{name}")


@lru_cache
def in_cpp(library: str) -> Any:
    """The ops of that name in the C++ extension (csrc/loss/ and csrc/layers/), which computes on the CPU.

    Raises RuntimeError where it is not built, or for another torch.
    """
    found = sorted(Path(__file__).parent.glob("_csrc*.so"))
    if not found:
        raise RuntimeError(f"the C++ extension of thinktwice_kernels is not built: {_REMEDY}")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = f"does not load with torch {torch.__version__} ({str(error).splitlines()[0]})"
        raise RuntimeError(f"the C++ extension of thinktwice_kernels {reason}: {_REMEDY}") from error
    return getattr(torch.ops, library)


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


# Chosen by reasoning for an H200: 4.8 TB/s at a latency of about 700 ns needs 25 KiB in flight on each of 132
# processors. With 256 threads of at most 64 registers four programs share a processor, and each has 16 KiB under way:
# twice that, so that one may compute while the others wait. More vectors a step would only take registers.
SHAPES = {
    "row_statistics": Shape(num_warps=8, vectors=4),
    "row_gradient": Shape(num_warps=8, vectors=4),
    "combine_statistics": Shape(num_warps=1, block=64),
    "row_exponentials": Shape(num_warps=8, vectors=4),
    "add_entropy": Shape(num_warps=8, vectors=2),
    # A few thousand elements of a row of hidden states at a time.
    "row_shifts": Shape(num_warps=4, block=1024),
    "scale_rows": Shape(num_warps=4, block=1024),
    "finish_rows": Shape(num_warps=1, block=32),
    # A vector of each half a thread: short programs, many at a time.
    "swiglu": Shape(num_warps=4, vectors=1),
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


@dataclass(frozen=True)
class Tile:
    """Rows that a program holds in its registers whole, 16 elements a thread: two vectors of 16 bytes in bfloat16."""

    rows: int
    columns: int  # a power of 2

    @property
    def num_warps(self) -> int:
        return min(max(self.rows * self.columns // (32 * 16), 1), 32)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the registers hold it without spilling: 16,384 elements in bfloat16, 8,192 in fp32."""
        return self.rows * self.columns * dtype.itemsize <= 32 * 1024


def row_tile(size: int) -> Tile:
    """For rows of `size` elements: one, or as many short ones as give four warps work."""
    columns = triton.next_power_of_2(size)
    return Tile(max(1, 4 * 32 * 16 // columns), columns)


def row_arguments(name: str, x: Tensor | None) -> dict[str, Any]:
    """``{name}_ptr`` and ``{name}_stride``: rows [..., H] as a kernel takes them, in place where they lie evenly."""
    if x is None:
        return {f"{name}_ptr": None, f"{name}_stride": 0}
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    # The stride of a single row says nothing, but would count as another case to compile for.
    return {f"{name}_ptr": rows, f"{name}_stride": rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]}


def triton_type(dtype: torch.dtype) -> Any:
    """fp32 or float64 in Triton's terms."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def looping_programs(
    tiles: int,
    tile: Tile,
    device: torch.device,
) -> int:
    """How many programs share the tiles where each adds something up over its own: 16 warps on every processor.

    More would write more partial sums, fewer would leave memory idle.
    """
    return min(tiles, processors(device) * max(1, 16 // tile.num_warps))


def launch(kernel: Any, name: str, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    """Runs `kernel`, whose line of `SHAPES` is `name`, on all of the grid; nothing where that is empty."""
    launch_warps(kernel, SHAPES[name].num_warps, grid, device, arguments)


def launch_warps(
    kernel: Any, warps: int, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]
) -> None:
    """`launch` with as many warps to a program."""
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


class _SecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the ops of thinktwice_kernels have no second derivative: drop create_graph=True, or use "
            "thinktwice_kernels.reference"
        )


def first_order_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make the second derivative an error, for ``backward(ctx, *gradients)`` with its inputs in ctx.saved_tensors.

    It finds ctx.creates_graph set: whether what it gives may be looked at again.

    torch's once_differentiable lets create_graph=True pass in silence when the incoming gradient is a constant, and
    the second derivative then lacks this op's share.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Gradients:
        ctx.creates_graph = torch.is_grad_enabled()
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        sources = [tensor for tensor in (*ctx.saved_tensors, *gradients) if tensor is not None and tensor.requires_grad]
        return tuple(None if result is None else _SecondOrder.apply(result, *sources) for result in results)

    return wrapped
