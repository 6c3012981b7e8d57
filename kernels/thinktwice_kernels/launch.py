"""What every op stands on: the type it computes in, the code that runs it, the launch of its kernels, one derivative.

Triton runs on CUDA, and on the CPU where TRITON_INTERPRET=1 is set; else the CPU runs C++ (csrc/loss/) on rows of
logits and plain torch on everything else. Kernels that are too long for their op's file lie in triton/, each with its
launch, under the name of that file; nothing imports them before they run, since not every platform has Triton.
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
from torch import Tensor

NAMESPACE = "thinktwice_kernels"  # of the ops in torch.library
Gradients = tuple[Tensor | None, ...]
_REMEDY = "run `make`, or `pip install .` in the repository"
# Where the interpreter or the ahead-of-time compiler stands in for a GPU.
_PROCESSORS_WITHOUT_GPU = 132


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def fake_gradient(like: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    """A fake gradient: of the shape of `like`, or [0] where it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,), dtype=dtype)


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels run what is computed of the tensor; else the CPU's code does.

    Raises:
        RuntimeError: the tensor lies on a device that has neither.
    """
    if tensor.device.type not in ("cpu", "cuda"):
        raise RuntimeError(
            f"thinktwice_kernels has no kernels for {tensor.device.type}: move the tensors to the CPU or CUDA, or use "
            "thinktwice_kernels.reference"
        )
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def in_triton(name: str) -> Any:
    """The module triton/<name>.py."""
    return importlib.import_module(f"thinktwice_kernels.triton.{name}")


@lru_cache
def in_cpp() -> Any:
    """The ops of csrc/loss/."""
    found = sorted(Path(__file__).parent.glob("_csrc*.so"))
    if not found:
        raise RuntimeError(f"the C++ extension of thinktwice_kernels is not built: {_REMEDY}")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = f"does not load with torch {torch.__version__} ({str(error).splitlines()[0]})"
        raise RuntimeError(f"the C++ extension of thinktwice_kernels {reason}: {_REMEDY}") from error
    return torch.ops.thinktwice_loss


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
