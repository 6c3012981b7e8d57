"""What every op stands on: the type it computes in, the code that runs it, the launch of its kernels, one derivative.

Triton runs on CUDA, and on the CPU where TRITON_INTERPRET=1 is set; else the CPU runs C++ on rows of logits
(csrc/loss/) and in the ops of a decoder layer (csrc/layers/), and plain torch on everything else. Kernels that are too
long for their op's file lie in triton/, each with its launch.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

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


@lru_cache
def op_in_cpp(library: str, name: str) -> Any:
    """One of `in_cpp`, looked up once."""
    return getattr(in_cpp(library), name).default


@dataclass(frozen=True)
class Shape:
    """The shape of a program.

    Row kernels: each thread reads `vectors` vectors of 16 bytes a step (`row_exponentials`: writes). Token kernels:
    `block` tokens a step.
    """

    num_warps: int
    vectors: int = 0
    block: int = 0

    def lanes(self, itemsize: int) -> int:
        """Elements of `itemsize` bytes that all threads together read with one vector each."""
        return self.num_warps * 32 * 16 // itemsize


# Chosen by reasoning for an H200: 4.8 TB/s at a latency of about 700 ns needs 25 KiB in flight on each of 132
# processors. With 256 threads of at most 64 registers four programs share a processor, and each has 16 KiB under way:
# twice that, so that one may compute while the others wait. More vectors a step would only take registers. The gradient
# keeps nothing from step to step: with half the vectors, and registers, a processor is full of its threads.
SHAPES = {
    "row_statistics": Shape(num_warps=8, vectors=4),
    "row_gradient": Shape(num_warps=8, vectors=2),
    "combine_statistics": Shape(num_warps=1, block=64),
    "row_exponentials": Shape(num_warps=8, vectors=2),
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


class Launch(NamedTuple):
    """What `launch` runs but for the grid."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int  # of a program
    stages: int  # of its loads ahead of a product


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


@lru_cache
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
    warps: int,  # of a program
    device: torch.device,
) -> int:
    """How many programs share the tiles where each adds something up over its own: 16 warps on every processor.

    More would write more partial sums, fewer would leave memory idle.
    """
    return min(tiles, processors(device) * max(1, 16 // warps))


def launch(kernel: Any, name: str, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    """Runs `kernel`, whose line of `SHAPES` is `name`, on all of the grid; nothing where that is empty."""
    launch_warps(kernel, SHAPES[name].num_warps, grid, device, arguments)


def launch_warps(
    kernel: Any, warps: int, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any], stages: int = 1
) -> None:
    """`launch` with as many warps to a program, and that many stages of loads ahead of its products."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, warps, stages))
    elif 0 in grid:
        return
    elif device.type != "cuda":
        kernel[grid](**arguments)
    elif device.index == torch.cuda.current_device():
        launch_on(device.index, Launch(kernel, arguments, warps, stages), grid)
    else:
        with torch.cuda.device(device):
            launch_on(device.index, Launch(kernel, arguments, warps, stages), grid)


# What Triton has compiled, by all that it compiles for.
_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


def launch_on(
    device: int,  # the current one
    what: Launch,
    grid: tuple[int, ...],
) -> None:
    """Runs a kernel on a GPU, from the second launch of its kind on without Triton's search for what it compiled.

    That search binds and looks at the arguments in Python, for about 10 microseconds.
    """
    kernel, arguments, warps, stages = what
    found = _kind_of(device, what)
    compiled = None if found is None else _compiled.get(found[0])
    if found is not None and compiled is not None:
        compiled[grid + (1,) * (3 - len(grid))](*found[1])
        return
    compiled = kernel[grid](**arguments, num_warps=warps, num_stages=stages)
    if found is not None and isinstance(compiled, CompiledKernel):
        _compiled[found[0]] = compiled


def _kind_of(device: int, what: Launch) -> tuple[tuple[Any, ...], list[Any]] | None:
    """All that Triton specialises on or more, and the arguments in order; None of arguments of which it is not known.

    Of tensors that is the type and whether they begin on 16 bytes, of numbers whether they are 1 or a multiple of 16
    and how wide they are. Only tensors on the device become addresses, which Triton takes for granted.
    """
    kernel, arguments, warps, stages = what
    if not isinstance(kernel, JITFunction) or len(arguments) != len(kernel.params):
        return None
    key, values = [kernel.fn, device, warps, stages], []
    for parameter in kernel.params:
        value: Any = arguments[parameter.name]
        kind: Any = type(value)
        if value is None or parameter.is_constexpr:
            key.append(value)
        elif kind is Tensor or kind is torch.nn.Parameter:
            if value.get_device() != device:
                return None
            key.append(value.dtype)
            value = value.data_ptr()
            key.append(value % 16 == 0)
        elif kind is int:
            key.append((value == 1) + 2 * (value % 16 == 0) + 4 * (value.bit_length() // 32))
        elif kind is float:
            key.append(kind)
        else:
            return None
        values.append(value)
    return tuple(key), values


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


# What torch.library must not be asked about: numbers, and tensors that are nothing but tensors.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, bool, int, float, str, list, type(None)})


class Op:
    """An op of torch.library, and in eager mode the short way to its code.

    Through torch.library a call and its gradient pass the dispatcher four times, each time with Python of torch's on
    both sides: 30 to 60 microseconds that a small batch on a GPU waits for. A compiler, tensors without values or of a
    subclass, transforms and dispatch modes see the op; plain tensors go to the function itself, or, where a gradient is
    wanted, through one `torch.autograd.Function` with the same setup and the same backward pass.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str] = ()):
        self.library = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=mutates)
        self.register_fake = self.library.register_fake
        self._function = function
        self._mutates = [list(inspect.signature(function).parameters).index(argument) for argument in mutates]
        self._differentiable: Any = None

    def register_autograd(self, backward: Callable[..., Gradients], setup_context: Callable[..., None]) -> None:
        """As torch.library's: ``backward(ctx, *gradients)``, ``setup_context(ctx, inputs, output)``."""
        self.library.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        differentiable: Any = type(function.__name__.strip("_"), (torch.autograd.Function,), methods)
        # Without torch's look for functorch's tensors: `_is_eager` has taken one.
        self._differentiable = super(torch.autograd.Function, differentiable).apply  # type: ignore[misc]

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_eager(arguments):
            return self.library(*arguments)
        if self._differentiable is not None and torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return self._differentiable(*arguments)
        for position in self._mutates:
            torch.autograd.graph.increment_version(arguments[position])
        return self._function(*arguments)


def op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Makes an `Op` of a function whose first argument is a tensor; `mutates` names the arguments it writes to."""
    return lambda function: Op(name, function, mutates)


def _is_eager(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody but the op itself has anything to do with a call."""
    return (
        _PLAIN.issuperset(map(type, arguments))
        and not arguments[0].is_meta
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


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
        if not ctx.creates_graph:
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        sources = [tensor for tensor in (*ctx.saved_tensors, *gradients) if tensor is not None and tensor.requires_grad]
        return tuple(None if result is None else _SecondOrder.apply(result, *sources) for result in results)

    return wrapped
