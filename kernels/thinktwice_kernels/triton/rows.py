"""Kernels over rows of logits: statistics in one read, the gradient in one read and one write.

A program walks over one row, or over its share of one, in steps of [VECTORS, LANES, WIDTH] logits: each lane, a thread,
reads vectors of WIDTH. It keeps a maximum and sums of its own, so that no step waits for other threads; they meet once,
at the end. Arithmetic is in TYPE, fp32 or float64; scalars of a row are in float64.

Letters: t rows, V vocabulary, m rows with a gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import SHAPES, accumulation_dtype, launch, steps_and_splits
from thinktwice_kernels.rows import Head
from thinktwice_kernels.triton.numerics import FAR_BELOW, INFINITY, LOG2_E, number, soft_cap

# From here on e^x is 0 in fp32 and float64.
_LOG_NOTHING = tl.constexpr(-1e3)


@triton.jit
def temperature_of(row, temperatures_ptr, temperature):
    """In float64; NaN where it makes no distribution."""
    tau = number(temperature, tl.float64)
    if temperatures_ptr is not None:
        tau = tl.load(temperatures_ptr + row).to(tl.float64)
    return tl.where(tau > 0, tau, float("nan"))


@triton.jit
def load_logits(row_ptr, bias_ptr, columns, mask, softcap, TYPE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits after bias and soft cap, -inf outside the mask, and the soft cap's derivative."""
    values = tl.load(row_ptr + columns, mask=mask, other=-INFINITY).to(TYPE)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(TYPE)
    slopes = values
    if SOFTCAP:
        values, slopes = soft_cap(values, number(softcap, TYPE))
        values = tl.where(mask, values, -INFINITY)
    return values, slopes


@triton.jit
def _finite_shift(highest):
    """The maximum, or 0 where that is -inf, whose difference from itself would be NaN."""
    return tl.where(highest == -INFINITY, 0.0, highest)


@triton.jit
def _moved(highest, total, moment, shift, factor, MOMENT: tl.constexpr):
    """Sums of e^(z - highest) and (z - highest) e^(z - highest) as ones with `shift`; `factor` is log2(e) / tau."""
    step = highest - shift
    scale = tl.exp2(step * factor)
    if MOMENT:
        moment = (moment + total * tl.maximum(step, FAR_BELOW)) * scale
    return total * scale, moment


@triton.jit
def _merged(highest, total, moment, factor, MOMENT: tl.constexpr):
    """One maximum and two sums from those of all lanes."""
    top = tl.max(highest, 0)
    shift = _finite_shift(top)
    total, moment = _moved(highest, total, moment, shift, factor, MOMENT)
    return top, tl.sum(total, 0), tl.sum(moment, 0) if MOMENT else top


@triton.jit
def _write_statistics(
    row,
    row_ptr,  # of the logits
    target,
    bias_ptr,
    softcap,
    size,
    tau,
    top,
    total,
    moment,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    TYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    inside = (target >= 0) & (target < size)
    chosen, _ = load_logits(row_ptr, bias_ptr, target, inside, softcap, TYPE, SOFTCAP)
    chosen = tl.where(inside, chosen, float("nan")).to(tl.float64)
    shift = _finite_shift(top.to(tl.float64))
    log_total = tl.log(total.to(tl.float64))
    tl.store(logps_ptr + row, (chosen - shift) / tau - log_total)
    tl.store(lse_ptr + row, shift / tau + log_total)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_total - moment.to(tl.float64) / total.to(tl.float64) / tau)


@triton.jit(
    do_not_specialize=["steps"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "temperatures_ptr",
        "logps_ptr",
        "lse_ptr",
        "entropy_ptr",
        "partials_ptr",
    ],
)
def row_statistics(
    logits_ptr,  # [t, V]
    stride,  # from row to row
    targets_ptr,  # [t]
    bias_ptr,  # [V] or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    logps_ptr,  # [t]
    lse_ptr,  # [t]
    entropy_ptr,  # [t] or None
    partials_ptr,  # [t, programs of a row, 3] or None: one program has all of the row
    size,  # V
    steps,  # of a program
    TYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    MOMENT: tl.constexpr = entropy_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_ptr = logits_ptr + row * stride
    tau = temperature_of(row, temperatures_ptr, temperature)
    factor = ((1.0 / tau) * LOG2_E).to(TYPE)

    BLOCK: tl.constexpr = VECTORS * LANES * WIDTH
    vectors = tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    offsets = vectors[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    highest = tl.full((LANES,), -INFINITY, TYPE)
    total = tl.zeros((LANES,), TYPE)
    moment = tl.zeros((LANES,), TYPE)
    first = split * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(size, BLOCK))):
        columns = step * BLOCK + offsets
        values, _ = load_logits(row_ptr, bias_ptr, columns, columns < size, softcap, TYPE, SOFTCAP)
        now = tl.maximum(highest, tl.max(tl.max(values, 2), 0))
        shift = _finite_shift(now)
        total, moment = _moved(highest, total, moment, shift, factor, MOMENT)
        difference = values - shift[None, :, None]
        weights = tl.exp2(difference * factor)
        total += tl.sum(tl.sum(weights, 2), 0)
        if MOMENT:
            moment += tl.sum(tl.sum(weights * tl.maximum(difference, FAR_BELOW), 2), 0)
        highest = now

    top, total, moment = _merged(highest, total, moment, factor, MOMENT)
    if partials_ptr is None:
        target = tl.load(targets_ptr + row)
        _write_statistics(
            row, row_ptr, target, bias_ptr, softcap, size, tau, top, total, moment,
            logps_ptr, lse_ptr, entropy_ptr, TYPE, SOFTCAP,
        )  # fmt: skip
    else:
        own_ptr = partials_ptr + (row * tl.num_programs(1) + split) * 3
        tl.store(own_ptr, top)
        tl.store(own_ptr + 1, total)
        if MOMENT:
            tl.store(own_ptr + 2, moment)


@triton.jit(
    do_not_specialize=["splits"],
    do_not_specialize_on_alignment=[
        "logits_ptr",
        "targets_ptr",
        "bias_ptr",
        "temperatures_ptr",
        "logps_ptr",
        "lse_ptr",
        "entropy_ptr",
        "partials_ptr",
    ],
)
def combine_statistics(
    partials_ptr,  # [t, splits, 3]
    splits,  # at most BLOCK
    logits_ptr,  # [t, V]
    stride,
    targets_ptr,  # [t]
    bias_ptr,  # [V] or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    logps_ptr,  # [t]
    lse_ptr,  # [t]
    entropy_ptr,  # [t] or None
    size,  # V
    TYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MOMENT: tl.constexpr = entropy_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    tau = temperature_of(row, temperatures_ptr, temperature)
    parts = tl.arange(0, BLOCK)
    there = parts < splits
    part_ptrs = partials_ptr + (row * splits + parts) * 3
    highest = tl.load(part_ptrs, mask=there, other=-INFINITY)
    total = tl.load(part_ptrs + 1, mask=there, other=0.0)
    moment = total
    if MOMENT:
        moment = tl.load(part_ptrs + 2, mask=there, other=0.0)
    top, total, moment = _merged(highest, total, moment, ((1.0 / tau) * LOG2_E).to(TYPE), MOMENT)
    target = tl.load(targets_ptr + row)
    _write_statistics(
        row, logits_ptr + row * stride, target, bias_ptr, softcap, size, tau, top, total, moment,
        logps_ptr, lse_ptr, entropy_ptr, TYPE, SOFTCAP,
    )  # fmt: skip


@triton.jit
def _write_gradient(
    row_ptr,
    out_ptr,
    target,
    bias_ptr,
    softcap,
    size,
    tau,
    lse,
    entropy,
    d_logp,
    d_entropy,
    first,  # step
    last,  # step
    TYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one row; all scalars are float64."""
    # Differences from the log-sum-exp are taken before they are scaled: the product of a large logit and 1 / tau
    # would be rounded to more than the difference can bear.
    shift = (lse * tau).to(TYPE)
    factor = ((1.0 / tau) * LOG2_E).to(TYPE)
    inside = (target >= 0) & (target < size)
    flow = (tl.where(inside | (d_logp == 0), d_logp, float("nan")) / tau).to(TYPE)
    chosen = tl.where(inside, target, -1).to(tl.int32)  # as wide as the columns: each is compared with it
    for step in range(first, last):
        columns = step * BLOCK + tl.arange(0, BLOCK)
        mask = columns < size
        values, slopes = load_logits(row_ptr, bias_ptr, columns, mask, softcap, TYPE, SOFTCAP)
        difference = values - shift
        p = tl.exp2(difference * factor)
        gradient = tl.where(columns == chosen, flow, 0.0)
        if ENTROPY:
            log_p = tl.maximum(difference * (1.0 / tau).to(TYPE), _LOG_NOTHING)
            gradient -= p * (flow + (d_entropy / tau).to(TYPE) * (log_p + entropy.to(TYPE)))
        else:
            gradient -= p * flow
        if SOFTCAP:
            gradient *= slopes
        tl.store(out_ptr + columns, gradient, mask=mask)


@triton.jit(
    do_not_specialize=["steps"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "temperatures_ptr",
        "lse_ptr",
        "entropy_ptr",
        "d_logps_ptr",
        "d_entropy_ptr",
        "rows_ptr",
    ],
)
def row_gradient(
    logits_ptr,  # [t, V]
    stride,
    targets_ptr,  # [t]
    bias_ptr,  # [V] or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    lse_ptr,  # [t]
    entropy_ptr,  # [t] or None
    d_logps_ptr,  # [t] or None
    d_entropy_ptr,  # [t] or None
    rows_ptr,  # [m] or None
    out_ptr,  # [m, V], or [t, V] if IN_PLACE
    out_stride,
    size,  # V
    steps,  # of a program
    TYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row
    if rows_ptr is not None:
        row = tl.load(rows_ptr + out_row)
        if IN_PLACE:
            out_row = row
    out_ptr += out_row * out_stride
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(size, BLOCK))

    d_logp = tl.full((), 0.0, tl.float64)
    if d_logps_ptr is not None:
        d_logp = tl.load(d_logps_ptr + row).to(tl.float64)
    d_entropy = tl.full((), 0.0, tl.float64)
    entropy = d_entropy
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row).to(tl.float64)
        entropy = tl.load(entropy_ptr + row).to(tl.float64)
    if (d_logp == 0) & (d_entropy == 0):
        zeros = tl.zeros((BLOCK,), TYPE)
        for step in range(first, last):
            columns = step * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + columns, zeros, mask=columns < size)
    else:
        _write_gradient(
            logits_ptr + row * stride,
            out_ptr,
            tl.load(targets_ptr + row),
            bias_ptr,
            softcap,
            size,
            temperature_of(row, temperatures_ptr, temperature),
            tl.load(lse_ptr + row).to(tl.float64),
            entropy,
            d_logp,
            d_entropy,
            first,
            last,
            TYPE,
            SOFTCAP,
            d_entropy_ptr is not None,
            BLOCK,
        )


def row_statistics_in_triton(
    logits: Tensor,  # [t, V]
    targets: Tensor,  # [t] int64
    head: Head,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`rows.row_statistics`."""
    rows, size = logits.shape
    dtype = accumulation_dtype(logits)
    logps, lse = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(2))
    entropy = torch.empty_like(lse) if want_entropy else None
    shape, most = SHAPES["row_statistics"], SHAPES["combine_statistics"].block
    lanes = shape.lanes(logits.itemsize)
    steps, splits = steps_and_splits(rows, -(-size // (shape.vectors * lanes)), logits.device, most)
    width = 16 // logits.itemsize
    partials = torch.empty(rows, splits, 3, dtype=dtype, device=logits.device) if splits > 1 else None
    shared = {
        **_row_arguments(logits, targets, head),
        "logps_ptr": logps,
        "lse_ptr": lse,
        "entropy_ptr": entropy,
        "partials_ptr": partials,
    }
    own = {"steps": steps, "VECTORS": shape.vectors, "LANES": lanes // width, "WIDTH": width}
    launch(row_statistics, "row_statistics", (rows, splits), logits.device, shared | own)
    if partials is not None:
        own = {"splits": splits, "BLOCK": most}
        launch(combine_statistics, "combine_statistics", (rows,), logits.device, shared | own)
    return logps, lse, entropy


def row_gradient_in_triton(
    logits: Tensor,  # [t, V]
    targets: Tensor,  # [t] int64
    head: Head,
    lse: Tensor,  # [t]
    entropy: Tensor | None,  # [t]
    d_logps: Tensor | None,  # [t]
    d_entropy: Tensor | None,  # [t]
    rows: Tensor | None,  # [m] int64
    out: Tensor,  # [m, V], or `logits`
) -> None:
    """`rows.row_gradient`."""
    count = logits.shape[0] if rows is None else rows.numel()
    shape = SHAPES["row_gradient"]
    block = shape.vectors * shape.lanes(logits.itemsize)
    steps, splits = steps_and_splits(count, -(-logits.shape[1] // block), logits.device, logits.shape[1])
    arguments = {
        **_row_arguments(logits, targets, head),
        "lse_ptr": lse.contiguous(),
        "entropy_ptr": None if entropy is None or d_entropy is None else entropy.contiguous(),
        "d_logps_ptr": None if d_logps is None else d_logps.contiguous(),
        "d_entropy_ptr": None if d_entropy is None else d_entropy.contiguous(),
        "rows_ptr": None if rows is None else rows.contiguous(),
        "out_ptr": out,
        "out_stride": row_stride(out),
        "steps": steps,
        "IN_PLACE": out.data_ptr() == logits.data_ptr() and rows is not None,
        "BLOCK": block,
    }
    launch(row_gradient, "row_gradient", (count, splits), logits.device, arguments)


def _row_arguments(logits: Tensor, targets: Tensor, head: Head) -> dict[str, Any]:
    dtype = accumulation_dtype(logits)
    return {
        "logits_ptr": logits,
        "stride": row_stride(logits),
        "targets_ptr": targets.contiguous(),
        "bias_ptr": None if head.bias is None else head.bias.to(dtype).contiguous(),
        **temperature_parameters(head),
        "softcap": head.softcap or 0.0,
        "size": logits.shape[1],
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "SOFTCAP": head.softcap is not None,
    }


def temperature_parameters(head: Head) -> dict[str, Any]:
    """One number, or one of each row, as kernels take it."""
    if isinstance(head.temperature, Tensor):
        return {"temperatures_ptr": head.temperature.contiguous(), "temperature": 1.0}
    return {"temperatures_ptr": None, "temperature": head.temperature}


def row_stride(matrix: Tensor) -> int:
    """The stride of a single row says nothing, but would count as another case to compile for."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
