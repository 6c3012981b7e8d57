"""Compiles every kernel ahead of time, without a GPU: ``python -m thinktwice_kernels.triton.aot``.

The configurations are recorded from the ops' own launches over all types, optional tensors and options. Their
product is large, so a covering set stands for it: every pair of values is there in at least one configuration. Of the
loss, whose kernel takes long to compile, and of the ops of a decoder layer a shorter set can be had: every value is in
at least one, of the loss in one for each type.
"""

import io
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations, product
from typing import Any, get_args

import torch
import triton
from torch import Tensor
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from thinktwice_kernels.exponentials import new_tile
from thinktwice_kernels.gate import swiglu_gradient_in_triton, swiglu_in_triton
from thinktwice_kernels.launch import Launch, accumulation_dtype, recording, row_tile
from thinktwice_kernels.merge import merge_in_triton
from thinktwice_kernels.norm import norm_gradients_in_triton, norm_in_triton
from thinktwice_kernels.options import (
    GuideFallback,
    ImportanceSamplingLevel,
    KlEstimator,
    LossInputs,
    LossOptions,
    PolicyLoss,
    RolloutIs,
)
from thinktwice_kernels.rows import Head
from thinktwice_kernels.triton.advantages import group_advantages_in_triton
from thinktwice_kernels.triton.exponentials import (
    add_entropy_in_triton,
    combine_exponentials_in_triton,
    finish_rows_in_triton,
    row_exponentials_in_triton,
    row_shifts_in_triton,
    scale_rows_in_triton,
)
from thinktwice_kernels.triton.head_product import BLOCKS, Block, head_exponentials_in_triton
from thinktwice_kernels.triton.loss import sequence_loss_in_triton
from thinktwice_kernels.triton.rotary import fits_registers, rotary_gradients_in_triton, rotary_in_triton
from thinktwice_kernels.triton.rows import row_gradient_in_triton, row_statistics_in_triton
from thinktwice_kernels.triton.scale import scale_in_triton
from thinktwice_kernels.triton.selection import compacted

ARCHITECTURES = (80, 90, 100)
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BOTH = (False, True)
_HEAD_AXES: dict[str, Sequence[Any]] = {"bias": _BOTH, "temperatures": _BOTH, "softcap": _BOTH}
# Rows that begin on multiples of 16 bytes or not; one program or several to a row.
_STATISTICS_AXES = {"logits": _TYPES, "aligned": _BOTH, "split": _BOTH, "entropy": _BOTH, **_HEAD_AXES}
_GRADIENT_AXES = {
    "types": (*((dtype, dtype) for dtype in _TYPES), (torch.float32, torch.bfloat16)),  # logits, their gradient
    "aligned": _BOTH,
    "rows": _BOTH,
    "in_place": _BOTH,
    "d_logps": _BOTH,
    "d_entropy": _BOTH,
    **_HEAD_AXES,
}
# Columns of logits whose rows begin on multiples of 16 bytes or not.
_EXPONENTIAL_AXES: dict[str, Sequence[Any]] = {"aligned": _BOTH, "rows": _BOTH, "known": _BOTH, **_HEAD_AXES}
_SELECTED = ("old_logps", "ref_logps", "rollout_logps", "loss_mask")
_SELECTION_AXES: dict[str, Sequence[Any]] = {
    "offsets": (torch.int32, torch.int64),
    "advantage_per_token": _BOTH,
    "guide_mask": ("none", "given", "released_code_compat"),
    "beta": (0.0, 0.1),
    "importance_sampling_level": get_args(ImportanceSamplingLevel),
    **dict.fromkeys(_SELECTED, _BOTH),
}
# A gradient, what it is multiplied by, and what it becomes.
_SCALE_TYPES = (
    *((torch.float32, torch.float32, dtype) for dtype in _TYPES[:3]),
    *((torch.float64, torch.float64, dtype) for dtype in _TYPES),
    *((torch.bfloat16, dtype, torch.bfloat16) for dtype in (torch.float32, torch.float64)),
    (torch.float32, torch.float64, torch.float32),
)
_LOSS_OPTIONS: dict[str, Sequence[Any]] = {
    "policy_loss": get_args(PolicyLoss),
    "importance_sampling_level": get_args(ImportanceSamplingLevel),
    "rollout_is": get_args(RolloutIs),
    "guide_fallback": get_args(GuideFallback),
    "kl_estimator": get_args(KlEstimator),
    "released_code_compat": _BOTH,
    "beta": (0.0, 0.1),
}
_OPTIONAL = ("old_logps", "ref_logps", "rollout_logps", "entropy", "loss_mask", "guide_mask")
_LOSS_TYPES = (torch.float32, torch.float64)  # of logps
_LOSS_AXES: dict[str, Sequence[Any]] = {
    "offsets": (torch.int32, torch.int64),
    "advantages": ("sequence", "token", "rewards"),
    "weight_per_token": _BOTH,
    "entropy_coef and want_gradient": tuple(product((0.0, 0.1), _BOTH)),  # together these say what is written
    **_LOSS_OPTIONS,
    **dict.fromkeys(_OPTIONAL, _BOTH),
}
# Rows that begin on multiples of 16 bytes or not, and tiles of 4 to 32 warps.
_NORM_AXES: dict[str, Sequence[Any]] = {
    "types": (*((dtype, dtype) for dtype in _TYPES), (torch.bfloat16, torch.float32)),  # x, weight
    "size": (7, 1024, 2560, 4096, 8192, 16384),
    "residual": _BOTH,
    "cast_first": _BOTH,
    "want_weight": _BOTH,
}
_GATE_AXES: dict[str, Sequence[Any]] = {"dtype": _TYPES, "size": (9728, 7)}
_MERGE_AXES: dict[str, Sequence[Any]] = {"dtype": _TYPES, "dim": (128, 80, 7)}
_ROTARY_AXES: dict[str, Sequence[Any]] = {
    "dtype": _TYPES,
    "heads": ((32, 8, 128), (16, 8, 128), (40, 40, 128), (14, 2, 64), (3, 1, 6)),  # Q, K, D
    "norms": ("none", "each head", "all heads"),
    "shared_angles": _BOTH,
    "want_norms": _BOTH,
}


@dataclass(frozen=True)
class Configuration:
    """What a kernel is compiled for; equal ones are one compiled kernel."""

    kernel: str
    parameters: tuple[tuple[str, str], ...]  # name -> type and divisibility, or value of a constant
    warps: int
    stages: int = 1

    def describe(self) -> str:
        """The parameters that tell configurations of a kernel apart."""
        return " ".join(f"{name}={value}" for name, value in self.parameters if value not in ("i32", "i64", "fp64"))


@dataclass(frozen=True)
class Compiled:
    """A line of the table."""

    configuration: Configuration
    architecture: int
    registers: int  # of a thread
    shared: int  # bytes of a program
    stack: int  # bytes of a thread: where spilled registers go, and what is indexed by a variable
    spilled: int  # bytes of a thread that it stores there for want of registers
    ptx: str

    def instructions(self, name: str) -> int:
        """How many instructions of that name the PTX has, whatever follows it: of ``wgmma.mma_async``, say."""
        return len(re.findall(rf"(?<![\w.]){re.escape(name)}(?=[.\s])", self.ptx))


def configurations(pairs: bool = True) -> dict[Configuration, Launch]:
    """Configurations, each with a launch that needs it; of the longer sets pairs of values, or values alone."""
    together = 2 if pairs else 1
    with recording() as launches:
        for values in covering(_STATISTICS_AXES, lambda _: True, 2):
            _launch_statistics(**values)
        for values in covering(_GRADIENT_AXES, _is_gradient, 2):
            _launch_gradient(**values)
        for values in covering(_EXPONENTIAL_AXES, lambda _: True, together):
            _launch_exponentials(**values)
        for block, temperatures in product(set(BLOCKS.values()), _BOTH):
            _launch_head_product(block, temperatures)
        for dtypes in [_LOSS_TYPES] if pairs else [(dtype,) for dtype in _LOSS_TYPES]:
            for values in covering(_LOSS_AXES | {"logps": dtypes}, _is_loss, together):
                _launch_loss(values)
        for dtype in _LOSS_TYPES:
            for values in covering(_SELECTION_AXES, lambda _: True, 2 if pairs else 1):
                _launch_selection(dtype, **values)
        for types in _SCALE_TYPES:
            scale_in_triton(*(torch.zeros(4, dtype=dtype) for dtype in types))
        for dtype in _LOSS_TYPES:
            group_advantages_in_triton(torch.zeros(4, dtype=dtype), torch.zeros(4).long(), "none", 1e-6)
        for values in covering(_NORM_AXES, _is_norm, together):
            _launch_norm(**values)
        for values in covering(_GATE_AXES, lambda _: True, together):
            _launch_gate(**values)
        for values in covering(_MERGE_AXES, lambda _: True, together):
            _launch_merge(**values)
        for values in covering(_ROTARY_AXES, _is_rotary, together):
            _launch_rotary(**values)
    return {configuration_of(launch): launch for launch in launches}


def configuration_of(launch: Launch) -> Configuration:
    """The key under which Triton keeps the compiled kernel of a launch."""
    signature, constants, attributes = _source_of(launch)
    parameters = []
    for position, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            kind = str(constants[(position,)])
        elif attributes.get((position,)):
            kind += ":16"
        parameters.append((name, kind))
    return Configuration(launch.kernel.__name__, tuple(parameters), launch.warps, launch.stages)


def compiled(launch: Launch, *architectures: int) -> list[Compiled]:
    """Compiles what a launch needs for each of the architectures. Nothing runs."""
    source = _Source(launch.kernel, *_source_of(launch))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    configuration = configuration_of(launch)

    def compiled_for(architecture: int) -> Compiled:
        log = io.StringIO()
        with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
            knobs.compilation.always_compile = True  # what comes from Triton's cache has no log
            knobs.nvidia.dump_ptxas_log = True
            found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        registers, stack, spilled = _resources(log.getvalue())
        shared, ptx = found.metadata.shared, found.asm["ptx"]
        return Compiled(configuration, architecture, registers, shared, stack, spilled, ptx)

    return [compiled_for(architecture) for architecture in architectures]


def serves(configuration: Configuration, architecture: int) -> bool:
    """Whether it may run there: all do, but the head's product, which each architecture has blocks of its own for."""
    if configuration.kernel != "head_exponentials":
        return True
    block, constants = BLOCKS.get(architecture // 10), dict(configuration.parameters)
    return block is not None and (str(block.stages), str(block.ahead)) == (constants["STAGES"], constants["AHEAD"])


def table(pairs: bool = True, processes: int = 1) -> Iterator[Compiled]:
    """Compiles every configuration for every architecture, in as many processes."""
    jobs = [(pairs, number) for number in range(len(configurations(pairs)))]
    if processes == 1:
        yield from chain.from_iterable(map(_compile_job, jobs))
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from chain.from_iterable(pool.map(_compile_job, jobs, chunksize=2))


def covering(
    axes: Mapping[str, Sequence[Any]],
    valid: Callable[[dict[str, Any]], bool],
    together: int,
) -> list[dict[str, Any]]:
    """Assignments of a value to each axis in which all values of that many axes occur together, if they validly can."""
    draw = random.Random(0)

    def parts(values: dict[str, Any]) -> set[Any]:
        return set(combinations([(name, axes[name].index(value)) for name, value in values.items()], together))

    missing = dict.fromkeys(
        part
        for names in combinations(axes, together)
        for part in product(*([(name, at) for at in range(len(axes[name]))] for name in names))
    )
    found: list[dict[str, Any]] = []
    while missing:
        wanted = {name: axes[name][at] for name, at in next(iter(missing))}
        tries = [{name: draw.choice(values) for name, values in axes.items()} | wanted for _ in range(300)]
        best = max(filter(valid, tries), key=lambda values: len(parts(values) & missing.keys()), default=None)
        if best is not None:
            found.append(best)
        for part in [next(iter(missing))] if best is None else parts(best) & missing.keys():
            del missing[part]
    return found


class _Source(ASTSource):
    """A kernel that is lowered from Python once, for all architectures: they part in the passes after that."""

    _text: str | None = None

    def make_ir(self, *arguments: Any) -> Any:
        if self._text is None:
            module = super().make_ir(*arguments)
            self._text = str(module)
            return module
        context = arguments[-1]
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(self._text)
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module


def _source_of(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes that Triton would compile the kernel with."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("Triton interprets the kernels: unset TRITON_INTERPRET to compile them")
    backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **launch.arguments, debug=False
    )
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return signature, constants, attributes


def _resources(log: str) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes of spilled registers of a thread, from the assembler's log."""

    def number(pattern: str) -> int:
        (found,) = re.findall(pattern, log)
        return int(found)

    return number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill stores")


@lru_cache
def _launches(pairs: bool) -> list[Launch]:
    return list(configurations(pairs).values())


def _compile_job(job: tuple[bool, int]) -> list[Compiled]:
    pairs, number = job
    launch = _launches(pairs)[number]
    configuration = configuration_of(launch)
    return compiled(launch, *(number for number in ARCHITECTURES if serves(configuration, number)))


def _head(logits: Tensor, values: Mapping[str, Any]) -> Head:
    rows, size = logits.shape
    numbers = torch.empty(max(rows, size), dtype=accumulation_dtype(logits))
    return Head(
        numbers[:size] if values["bias"] else None,
        numbers[:rows] if values["temperatures"] else 1.0,
        30.0 if values["softcap"] else None,
    )


def _launch_statistics(logits: torch.dtype, aligned: bool, split: bool, entropy: bool, **head: Any) -> None:
    size = (65536 if split else 16) if aligned else (50257 if split else 7)
    tile = torch.empty(2, size, dtype=logits)
    row_statistics_in_triton(tile, torch.zeros(2).long(), _head(tile, head), entropy)


def _is_gradient(values: Mapping[str, Any]) -> bool:
    same = values["types"][0] == values["types"][1]
    return (values["d_logps"] or values["d_entropy"]) and (same or not values["in_place"])


def _launch_gradient(
    types: tuple[torch.dtype, torch.dtype],
    aligned: bool,
    rows: bool,
    in_place: bool,
    d_logps: bool,
    d_entropy: bool,
    **head: Any,
) -> None:
    logits, targets = torch.empty(2, 16 if aligned else 7, dtype=types[0]), torch.zeros(2).long()
    numbers = torch.empty(2, dtype=accumulation_dtype(logits))
    row_gradient_in_triton(
        logits,
        targets,
        _head(logits, head),
        numbers,
        numbers if d_entropy else None,
        numbers if d_logps else None,
        numbers if d_entropy else None,
        targets if rows else None,
        logits if in_place else torch.empty_like(logits, dtype=types[1]),
    )


def _launch_exponentials(aligned: bool, rows: bool, known: bool, **head: Any) -> None:
    hidden, logits = torch.empty(2, 16, dtype=torch.bfloat16), torch.empty(2, 16 if aligned else 7)
    targets, numbers, of_tile = torch.zeros(2).long(), torch.empty(2), _head(logits, head)
    weight = torch.empty(logits.shape[1], 16, dtype=torch.bfloat16)
    tile = new_tile(weight, 2)
    places = targets if rows else None
    found = None if known else numbers
    row_shifts_in_triton(hidden, weight, targets, of_tile, numbers if known else None, found, numbers)
    partials = torch.empty(2, 3, 2)
    row_exponentials_in_triton(logits, 0, targets, of_tile, numbers, places, tile, partials, 0, numbers)
    combine_exponentials_in_triton(
        partials, numbers, numbers, targets, of_tile, logits.shape[1], numbers, numbers, numbers
    )
    finish_rows_in_triton(tile, numbers, targets, of_tile, numbers, numbers, numbers)
    if of_tile.softcap is None:
        add_entropy_in_triton(
            tile, hidden, weight, targets, of_tile, numbers, numbers, numbers, numbers, numbers, numbers
        )
    scale_rows_in_triton(hidden, numbers, places, hidden, None)
    scale_rows_in_triton(hidden.float(), numbers, None, hidden, places)


def _launch_head_product(block: Block, temperatures: bool) -> None:
    matrix, targets, numbers = torch.empty(16, 16, dtype=torch.bfloat16), torch.zeros(16).long(), torch.empty(16)
    head = Head(temperature=numbers) if temperatures else Head()
    head_exponentials_in_triton(block, matrix, matrix, targets, head, numbers, matrix, numbers)


def _launch_selection(
    dtype: torch.dtype, offsets: torch.dtype, advantage_per_token: bool, guide_mask: str, **rest: Any
) -> None:
    tokens, sequences = 8, 4
    given = {name for name in _SELECTED if rest.pop(name)} | ({"guide_mask"} if guide_mask != "none" else set())
    optional: dict[str, Any] = {
        name: torch.empty(tokens, dtype=torch.bool if name.endswith("mask") else dtype) for name in given
    }
    inputs = LossInputs(
        logps=torch.empty(0, dtype=dtype),
        advantages=torch.empty(tokens if advantage_per_token else sequences, dtype=dtype),
        cu_seqlens=torch.zeros(sequences + 1, dtype=offsets),
        weights=torch.empty(sequences, dtype=dtype),
        **optional,
    )
    options = LossOptions(released_code_compat=guide_mask == "released_code_compat", **rest)
    compacted(inputs, tokens, options)


def _loss_options(values: Mapping[str, Any]) -> LossOptions:
    coefficient, _ = values["entropy_coef and want_gradient"]
    return LossOptions(**{name: values[name] for name in _LOSS_OPTIONS}, entropy_coef=coefficient)


def _is_loss(values: Mapping[str, Any]) -> bool:
    try:
        _loss_options(values).check_inputs({name for name in _OPTIONAL if values[name]})
    except ValueError:
        return False
    return True


def _launch_loss(values: Mapping[str, Any]) -> None:
    tokens, sequences, dtype = 8, 4, values["logps"]

    def numbers(count: int) -> Tensor:
        return torch.empty(count, dtype=dtype)

    optional: dict[str, Any] = {
        name: torch.empty(tokens, dtype=torch.bool if name.endswith("mask") else dtype)
        for name in _OPTIONAL
        if values[name]
    }
    given = {"sequence": sequences, "token": tokens, "rewards": None}[values["advantages"]]
    inputs = LossInputs(
        logps=numbers(tokens),
        advantages=None if given is None else numbers(given),
        cu_seqlens=torch.zeros(sequences + 1, dtype=values["offsets"]),
        weights=numbers(tokens if values["weight_per_token"] else sequences),
        rewards=numbers(sequences),
        group_ids=torch.zeros(sequences).long(),
        **optional,
    )
    sequence_loss_in_triton(inputs, _loss_options(values), values["entropy_coef and want_gradient"][1])


def _is_norm(values: Mapping[str, Any]) -> bool:
    return row_tile(values["size"]).fits(values["types"][0])


def _launch_norm(
    types: tuple[torch.dtype, torch.dtype], size: int, residual: bool, cast_first: bool, want_weight: bool
) -> None:
    x, weight = torch.empty(2, size, dtype=types[0]), torch.empty(size, dtype=types[1])
    other = x if residual else None
    norm_in_triton(x, other, weight, 1e-6, cast_first)
    norm_gradients_in_triton(x, other, x, weight, 1e-6, want_weight)


def _launch_gate(dtype: torch.dtype, size: int) -> None:
    gate_up = torch.empty(2, 2 * size, dtype=dtype)
    swiglu_gradient_in_triton(swiglu_in_triton(gate_up), gate_up)


def _launch_merge(dtype: torch.dtype, dim: int) -> None:
    out = torch.empty(2, 4, dim, dtype=dtype)
    lse = torch.empty(4, 2, dtype=accumulation_dtype(out))
    merge_in_triton(out, lse, out, lse)


def _is_rotary(values: Mapping[str, Any]) -> bool:
    query_heads, kv_heads, dim = values["heads"]
    fits = fits_registers(query_heads, kv_heads, dim, values["dtype"])
    return fits and (values["norms"] != "none" or not values["want_norms"])


def _launch_rotary(
    dtype: torch.dtype, heads: tuple[int, int, int], norms: str, shared_angles: bool, want_norms: bool
) -> None:
    query_heads, kv_heads, dim = heads
    qkv = torch.empty(2, (query_heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.empty(2, dim // 2 if shared_angles else dim)
    q_norm, k_norm = (
        None if norms == "none" else torch.empty(dim * (count if norms == "all heads" else 1), dtype=dtype)
        for count in (query_heads, kv_heads)
    )
    q, k, v = rotary_in_triton(qkv, angles, angles, query_heads, kv_heads, q_norm, k_norm, 1e-6)
    kept = None if q_norm is None else qkv
    rotary_gradients_in_triton(q, k, v, kept, angles, angles, q_norm, k_norm, 1e-6, want_norms, want_norms)


def main() -> None:
    """Prints the table."""
    titles = f"{'registers':>9} {'shared':>6} {'stack':>5} {'spilled':>7}"
    print(f"{'kernel':<20} {'sm':>3} {'warps':>5} {titles}  configuration")
    for line in table():
        print(
            f"{line.configuration.kernel:<20} {line.architecture:>3} {line.configuration.warps:>5} "
            f"{line.registers:>9} {line.shared:>6} {line.stack:>5} {line.spilled:>7}  {line.configuration.describe()}"
        )


if __name__ == "__main__":
    main()
