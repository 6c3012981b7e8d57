"""Kernels around a tile of exponentials ``e = exp((z - shift) / tau)`` in bfloat16: see exponentials.py.

One pass turns logits into exponentials and sums of theirs; everything else here is a few numbers a row, but for the
entropy's term, which is a pass over the tile.

Letters: T tokens, V vocabulary, H hidden size, t rows of a tile, n parts that a row's sums lie in.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.exponentials import SUBSET
from thinktwice_kernels.launch import SHAPES, launch
from thinktwice_kernels.rows import Head
from thinktwice_kernels.triton.numerics import FAR_BELOW, INFINITY, LOG2_E, expm1, number, soft_cap
from thinktwice_kernels.triton.rows import load_logits, row_stride, temperature_of, temperature_parameters

_SUBSET = tl.constexpr(SUBSET)
_LOG_SUBSET = tl.constexpr(math.log(SUBSET))
# A log-probability below it says nothing that a shift could use: exponentials span what fp32 does.
_LOWEST = tl.constexpr(-60.0)
_ROWS = tl.constexpr(16)  # of the subset that a program reads at a time


@triton.jit
def _dot(hidden_ptr, hidden_step, weight_ptr, weight_step, size, BLOCK: tl.constexpr):
    """The logit of one row of hidden states and one of the weight, with sums in fp32."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        own = tl.load(hidden_ptr + places * hidden_step, mask=places < size, other=0.0).to(tl.float32)
        other = tl.load(weight_ptr + places * weight_step, mask=places < size, other=0.0).to(tl.float32)
        total += own * other
    return tl.sum(total, 0)


@triton.jit
def capped(values, bias_ptr, columns, inside, softcap, SOFTCAP: tl.constexpr):
    """fp32 accumulators after bias and soft cap, and the soft cap's derivative."""
    if bias_ptr is not None:
        values += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    slopes = values
    if SOFTCAP:
        values, slopes = soft_cap(values, number(softcap, tl.float32))
    return values, slopes


@triton.jit
def _subset_shift(
    hidden_ptr,
    hidden_step,
    weight_ptr,
    weight_stride,
    weight_step,
    bias_ptr,
    softcap,
    tau,
    vocabulary,
    size,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tau times the log-sum-exp of a row's logits, estimated from those of the subset."""
    count = tl.cdiv(vocabulary, _SUBSET)
    highest = tl.full((_ROWS,), -INFINITY, tl.float32)
    total = tl.zeros((_ROWS,), tl.float32)
    for first in range(0, count, _ROWS):
        numbers = first + tl.arange(0, _ROWS)
        there = numbers < count
        columns = numbers.to(tl.int64) * _SUBSET
        sums = tl.zeros((_ROWS,), tl.float32)
        for start in range(0, size, BLOCK):
            places = start + tl.arange(0, BLOCK)
            own = tl.load(hidden_ptr + places * hidden_step, mask=places < size, other=0.0).to(tl.float32)
            offsets = columns[:, None] * weight_stride + places[None, :] * weight_step
            mask = there[:, None] & (places < size)[None, :]
            sums += tl.sum(tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * own[None, :], 1)
        values, _ = capped(sums, bias_ptr, columns, there, softcap, SOFTCAP)
        values = tl.where(there, values, -INFINITY)
        now = tl.maximum(highest, values)
        origin = tl.where(now == -INFINITY, 0.0, now)
        total = total * tl.exp((highest - origin) / tau) + tl.exp((values - origin) / tau)
        highest = now
    top = tl.max(highest, 0)
    origin = tl.where(top == -INFINITY, 0.0, top)
    return origin + tau * (tl.log(tl.sum(total * tl.exp((highest - origin) / tau), 0)) + _LOG_SUBSET)


@triton.jit(
    do_not_specialize_on_alignment=["targets_ptr", "temperatures_ptr", "known_ptr", "subset_ptr", "shifts_ptr"],
)
def row_shifts(
    hidden_ptr,  # [t, H]
    hidden_stride,
    weight_ptr,  # [V, H]
    weight_stride,
    weight_step,
    targets_ptr,  # [t]
    bias_ptr,  # [V] fp32 or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    known_ptr,  # [t] or None: about what the target's log-probability is
    subset_ptr,  # [t]: the subset's log-sum-exp, where nobody knows; or None
    shifts_ptr,  # [t]
    vocabulary,  # V
    size,  # H
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tau = temperature_of(row, temperatures_ptr, temperature).to(tl.float32)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    target = tl.where(inside, target, 0)
    own_ptr = hidden_ptr + row * hidden_stride
    chosen = _dot(own_ptr, 1, weight_ptr + target * weight_stride, weight_step, size, BLOCK)
    chosen, _ = capped(chosen, bias_ptr, target, inside, softcap, SOFTCAP)
    if known_ptr is None:
        shift = tl.maximum(tau * (tl.load(subset_ptr + row) + _LOG_SUBSET), chosen)
    else:
        known = tl.load(known_ptr + row).to(tl.float32)
        shift = chosen - tau * tl.minimum(tl.maximum(known, _LOWEST), 0.0)
        if (known != known) | (tl.abs(known) == INFINITY):
            lse = _subset_shift(
                own_ptr, 1, weight_ptr, weight_stride, weight_step, bias_ptr, softcap, tau, vocabulary, size,
                SOFTCAP, BLOCK,
            )  # fmt: skip
            shift = tl.maximum(lse, chosen)
    tl.store(shifts_ptr + row, shift)


@triton.jit(
    do_not_specialize=["part", "parts"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "temperatures_ptr",
        "shifts_ptr",
        "rows_ptr",
        "partials_ptr",
        "chosen_ptr",
    ],
)
def row_exponentials(
    logits_ptr,  # [t, columns] fp32: of the columns from `first` on
    stride,
    targets_ptr,  # [t]
    bias_ptr,  # [V] fp32 or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    shifts_ptr,  # [t]
    rows_ptr,  # [t] rows of the tile, or None: all
    out_ptr,  # the tile [., V] bfloat16
    out_stride,
    partials_ptr,  # [t, parts, 2]: the sums of e and of e (z - shift)
    chosen_ptr,  # [t]: the target's logit as it was accumulated
    first,
    size,  # columns
    part,
    parts,
    SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    out_row = row
    if rows_ptr is not None:
        out_row = tl.load(rows_ptr + row)
    own_ptr = out_ptr + out_row * out_stride + first
    own_bias_ptr = bias_ptr
    if bias_ptr is not None:
        own_bias_ptr = bias_ptr + first
    shift = tl.load(shifts_ptr + row)
    factor = ((1.0 / temperature_of(row, temperatures_ptr, temperature)) * LOG2_E).to(tl.float32)
    target = tl.load(targets_ptr + row) - first
    if (target >= 0) & (target < size):
        tl.store(chosen_ptr + row, tl.load(row_ptr + target))

    offsets = tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in range(0, size, VECTORS * LANES):
        columns = start + offsets
        values, slopes = load_logits(row_ptr, own_bias_ptr, columns, columns < size, softcap, tl.float32, SOFTCAP)
        difference = values - shift
        e = tl.exp2(difference * factor)
        total += tl.sum(e, 0)
        moment += tl.sum(e * tl.maximum(difference, FAR_BELOW), 0)
        if SOFTCAP:
            e = tl.where(e == 0, 0.0, e * slopes)
        tl.store(own_ptr + columns, e.to(tl.bfloat16), mask=columns < size)
    part_ptr = partials_ptr + (row * parts + part) * 2
    tl.store(part_ptr, tl.sum(total, 0))
    tl.store(part_ptr + 1, tl.sum(moment, 0))


@triton.jit(
    do_not_specialize=["parts"],
    do_not_specialize_on_alignment=[
        "partials_ptr",
        "chosen_ptr",
        "shifts_ptr",
        "targets_ptr",
        "bias_ptr",
        "temperatures_ptr",
        "logps_ptr",
        "sums_ptr",
        "entropy_ptr",
    ],
)
def combine_exponentials(
    partials_ptr,  # [t, parts, 2]
    parts,
    chosen_ptr,  # [t]
    shifts_ptr,  # [t]
    targets_ptr,  # [t]
    bias_ptr,  # [V] fp32 or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    logps_ptr,  # [t]
    sums_ptr,  # [t]
    entropy_ptr,  # [t]
    vocabulary,  # V
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    moment = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        numbers = start + tl.arange(0, BLOCK)
        part_ptrs = partials_ptr + (row * parts + numbers) * 2
        total += tl.load(part_ptrs, mask=numbers < parts, other=0.0).to(tl.float64)
        moment += tl.load(part_ptrs + 1, mask=numbers < parts, other=0.0).to(tl.float64)
    total_sum = tl.sum(total, 0)
    log_total = tl.log(total_sum)
    tau = temperature_of(row, temperatures_ptr, temperature)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    chosen, _ = capped(tl.load(chosen_ptr + row), bias_ptr, target, inside, softcap, SOFTCAP)
    chosen = tl.where(inside, chosen, float("nan")).to(tl.float64)
    tl.store(logps_ptr + row, (chosen - tl.load(shifts_ptr + row).to(tl.float64)) / tau - log_total)
    tl.store(sums_ptr + row, total_sum)
    tl.store(entropy_ptr + row, log_total - tl.sum(moment, 0) / total_sum / tau)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=[
        "chosen_ptr",
        "targets_ptr",
        "bias_ptr",
        "temperatures_ptr",
        "logps_ptr",
        "sums_ptr",
        "d_logps_ptr",
        "scales_ptr",
    ],
)
def finish_rows(
    chosen_ptr,  # [t]
    targets_ptr,  # [t]
    bias_ptr,  # [V] fp32 or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    softcap: tl.float64,
    logps_ptr,  # [t]
    sums_ptr,  # [t]
    d_logps_ptr,  # [t]
    out_ptr,  # the tile [t, V] bfloat16, of which each target's element is written
    out_stride,
    scales_ptr,  # [t]: what the rows are multiplied by to be the gradient of the logits
    rows,  # t
    vocabulary,  # V
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    d_logp = tl.load(d_logps_ptr + row, mask=there, other=0.0).to(tl.float64)
    total = tl.load(sums_ptr + row, mask=there, other=1.0).to(tl.float64)
    tau = tl.full((BLOCK,), 0.0, tl.float64) + number(temperature, tl.float64)
    if temperatures_ptr is not None:
        tau = tl.load(temperatures_ptr + row, mask=there, other=1.0).to(tl.float64)
    tl.store(scales_ptr + row, tl.where(d_logp == 0, 0.0, -d_logp / (tau * total)), mask=there)
    target = tl.load(targets_ptr + row, mask=there, other=-1)
    inside = (target >= 0) & (target < vocabulary)
    # In fp32, not from the rounded exponential: 1 - p of a likely token would be lost in that.
    element = total * expm1(tl.load(logps_ptr + row, mask=there, other=0.0).to(tl.float64))
    if SOFTCAP:
        chosen = tl.load(chosen_ptr + row, mask=there, other=0.0)
        _, slope = capped(chosen, bias_ptr, target, inside, softcap, SOFTCAP)
        element *= slope.to(tl.float64)
    tl.store(out_ptr + row * out_stride + target, element.to(tl.float32).to(tl.bfloat16), mask=inside)


@triton.jit(
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "bias_ptr",
        "temperatures_ptr",
        "shifts_ptr",
        "logps_ptr",
        "sums_ptr",
        "entropy_ptr",
        "d_logps_ptr",
        "d_entropy_ptr",
        "scales_ptr",
    ],
)
def add_entropy(
    hidden_ptr,  # [t, H]
    hidden_stride,
    weight_ptr,  # [V, H]
    weight_stride,
    weight_step,
    targets_ptr,  # [t]
    bias_ptr,  # [V] fp32 or None
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    shifts_ptr,  # [t]
    logps_ptr,  # [t]
    sums_ptr,  # [t]
    entropy_ptr,  # [t]
    d_logps_ptr,  # [t]
    d_entropy_ptr,  # [t]
    out_ptr,  # the tile [t, V] bfloat16, overwritten
    out_stride,
    scales_ptr,  # [t]
    vocabulary,  # V
    size,  # H
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """e becomes S (p (d_logp + d_entropy (log p + entropy)) - d_logp [the target]), the scale -1 / (tau S)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = out_ptr + row * out_stride
    tau = temperature_of(row, temperatures_ptr, temperature)
    d_logp = tl.load(d_logps_ptr + row).to(tl.float64)
    d_entropy = tl.load(d_entropy_ptr + row).to(tl.float64)
    total = tl.load(sums_ptr + row).to(tl.float64)
    entropy = tl.load(entropy_ptr + row).to(tl.float64)
    nothing = (d_logp == 0) & (d_entropy == 0)
    tl.store(scales_ptr + row, tl.where(nothing, 0.0, -1.0 / (tau * total)))
    # p (constant + d_entropy log p), with log p = log e - log S
    slope = d_entropy.to(tl.float32)
    constant = (d_logp + d_entropy * (entropy - tl.log(total))).to(tl.float32)
    half = (0.5 * total).to(tl.float32)
    offsets = tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    likely = tl.full((LANES,), -1, tl.int32)
    for start in range(0, vocabulary, VECTORS * LANES):
        columns = start + offsets
        e = tl.load(row_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        likely = tl.maximum(likely, tl.max(tl.where(e > half, columns, -1), 0))
        e = tl.where(e == 0, 0.0, e * (constant + slope * tl.log(tl.where(e == 0, 1.0, e))))
        tl.store(row_ptr + columns, e.to(tl.bfloat16), mask=columns < vocabulary)
    tl.debug_barrier()  # the two elements below are written once more
    # log p of a token near 1 is lost in the rounded exponential; there is one such token at most.
    top = tl.max(likely, 0)
    if top >= 0:
        dot = _dot(hidden_ptr + row * hidden_stride, 1, weight_ptr + top.to(tl.int64) * weight_stride, weight_step,
                   size, BLOCK)  # fmt: skip
        value, _ = capped(dot, bias_ptr, top, top >= 0, 0.0, False)
        log_p = (value.to(tl.float64) - tl.load(shifts_ptr + row).to(tl.float64)) / tau - tl.log(total)
        element = total * tl.exp(log_p) * (d_logp + d_entropy * (log_p + entropy))
        tl.store(row_ptr + top, element.to(tl.float32).to(tl.bfloat16))
    tl.debug_barrier()
    target = tl.load(targets_ptr + row)
    if (target >= 0) & (target < vocabulary):
        logp = tl.load(logps_ptr + row).to(tl.float64)
        element = total * (d_logp * expm1(logp) + d_entropy * tl.exp(logp) * (logp + entropy))
        tl.store(row_ptr + target, element.to(tl.float32).to(tl.bfloat16))


@triton.jit(
    do_not_specialize_on_alignment=["scales_ptr", "rows_ptr", "out_rows_ptr"],
)
def scale_rows(
    values_ptr,  # [., H]
    stride,
    scales_ptr,  # [m]
    rows_ptr,  # [m]: the rows of the values, or None: 0 to m
    out_ptr,  # [., H] of any floating type
    out_stride,
    out_rows_ptr,  # [m], likewise
    size,  # H
    BLOCK: tl.constexpr,
):
    number_of_row = tl.program_id(0).to(tl.int64)
    row = number_of_row
    out_row = number_of_row
    if rows_ptr is not None:
        row = tl.load(rows_ptr + number_of_row)
    if out_rows_ptr is not None:
        out_row = tl.load(out_rows_ptr + number_of_row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales_ptr + number_of_row)
    values = tl.load(values_ptr + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
    values = tl.where(scale == 0, 0.0, values * scale)  # 0 times what such a row may hold would not be 0
    tl.store(out_ptr + out_row * out_stride + columns, values.to(out_ptr.dtype.element_ty), mask=columns < size)


def row_shifts_in_triton(
    hidden: Tensor,  # [t, H] bfloat16, rows contiguous
    weight: Tensor,  # [V, H] bfloat16
    targets: Tensor,  # [t] int64
    head: Head,
    known: Tensor | None,  # [t]
    subset: Tensor | None,  # [t], without `known`
    shifts: Tensor,  # [t] fp32: the result
) -> None:
    """A number near tau times each row's log-sum-exp."""
    arguments = {
        **_product_arguments(hidden, weight),
        **_head_arguments(targets, head),
        "known_ptr": known,
        "subset_ptr": subset,
        "shifts_ptr": shifts,
        "vocabulary": weight.shape[0],
        "BLOCK": SHAPES["row_shifts"].block,
    }
    launch(row_shifts, "row_shifts", (hidden.shape[0],), hidden.device, arguments)


def row_exponentials_in_triton(
    logits: Tensor,  # [t, columns] fp32
    first: int,  # column of the tile that the logits begin with
    targets: Tensor,  # [t] int64
    head: Head,
    shifts: Tensor,  # [t]
    rows: Tensor | None,  # [t] int64: where in the tile; None: row after row
    out: Tensor,  # [., V] bfloat16: the tile
    partials: Tensor,  # [t, parts, 2]
    part: int,
    chosen: Tensor,  # [t]
) -> None:
    """Fills columns of a tile, one part of its rows' sums, and the targets' logits that are among them."""
    shape = SHAPES["row_exponentials"]
    arguments = {
        **_head_arguments(targets, head),
        "logits_ptr": logits,
        "stride": row_stride(logits),
        "shifts_ptr": shifts,
        "rows_ptr": rows,
        "out_ptr": out,
        "out_stride": out.stride(0),
        "partials_ptr": partials,
        "chosen_ptr": chosen,
        "first": first,
        "size": logits.shape[1],
        "part": part,
        "parts": partials.shape[1],
        "VECTORS": shape.vectors,
        "LANES": shape.lanes(out.itemsize),  # a thread has what it writes as one vector, or sums would cross threads
    }
    launch(row_exponentials, "row_exponentials", (logits.shape[0],), logits.device, arguments)


def combine_exponentials_in_triton(
    partials: Tensor,  # [t, parts, 2]
    chosen: Tensor,  # [t]
    shifts: Tensor,  # [t]
    targets: Tensor,  # [t] int64
    head: Head,
    vocabulary: int,
    logps: Tensor,  # [t]: results, as the next two
    sums: Tensor,  # [t]
    entropy: Tensor,  # [t]
) -> None:
    """Log-probabilities, sums of exponentials and entropies from the parts of rows."""
    arguments = {
        **_head_arguments(targets, head),
        "partials_ptr": partials,
        "parts": partials.shape[1],
        "chosen_ptr": chosen,
        "shifts_ptr": shifts,
        "logps_ptr": logps,
        "sums_ptr": sums,
        "entropy_ptr": entropy,
        "vocabulary": vocabulary,
        "BLOCK": SHAPES["combine_statistics"].block,
    }
    launch(combine_exponentials, "combine_statistics", (partials.shape[0],), partials.device, arguments)


def finish_rows_in_triton(
    out: Tensor,  # [t, V] bfloat16
    chosen: Tensor,  # [t]
    targets: Tensor,  # [t] int64
    head: Head,
    logps: Tensor,  # [t]
    sums: Tensor,  # [t]
    d_logps: Tensor,  # [t]
) -> Tensor:  # [t]
    """Writes the targets' elements; the scales that make a gradient of the rows."""
    rows, block = out.shape[0], SHAPES["finish_rows"].block
    scales = torch.empty(rows, dtype=torch.float32, device=out.device)
    arguments = {
        **_head_arguments(targets, head),
        "chosen_ptr": chosen,
        "logps_ptr": logps,
        "sums_ptr": sums,
        "d_logps_ptr": d_logps,
        "out_ptr": out,
        "out_stride": out.stride(0),
        "scales_ptr": scales,
        "rows": rows,
        "vocabulary": out.shape[1],
        "BLOCK": block,
    }
    launch(finish_rows, "finish_rows", (-(-rows // block),), out.device, arguments)
    return scales


def add_entropy_in_triton(
    out: Tensor,  # [t, V] bfloat16
    hidden: Tensor,  # [t, H] bfloat16, rows contiguous
    weight: Tensor,  # [V, H] bfloat16
    targets: Tensor,  # [t] int64
    head: Head,  # without soft cap
    shifts: Tensor,  # [t]
    logps: Tensor,  # [t]
    sums: Tensor,  # [t]
    entropy: Tensor,  # [t]
    d_logps: Tensor,  # [t]
    d_entropy: Tensor,  # [t]
) -> Tensor:  # [t]
    """`finish_rows_in_triton` with the entropy's term."""
    shape = SHAPES["add_entropy"]
    scales = torch.empty(out.shape[0], dtype=torch.float32, device=out.device)
    arguments = {
        **_product_arguments(hidden, weight),
        "targets_ptr": targets,
        "bias_ptr": head.bias,
        **temperature_parameters(head),
        "shifts_ptr": shifts,
        "logps_ptr": logps,
        "sums_ptr": sums,
        "entropy_ptr": entropy,
        "d_logps_ptr": d_logps,
        "d_entropy_ptr": d_entropy,
        "out_ptr": out,
        "out_stride": out.stride(0),
        "scales_ptr": scales,
        "vocabulary": out.shape[1],
        "VECTORS": shape.vectors,
        "LANES": shape.lanes(out.itemsize),
        "BLOCK": SHAPES["row_shifts"].block,
    }
    launch(add_entropy, "add_entropy", (out.shape[0],), out.device, arguments)
    return scales


def scale_rows_in_triton(
    values: Tensor,  # [., H]
    scales: Tensor,  # [m]
    rows: Tensor | None,  # [m] int64: the rows of the values; None: 0 to m
    out: Tensor,  # [., H]
    out_rows: Tensor | None,  # [m] int64, likewise
) -> None:
    """Rows times their scales; 0 where a scale is 0, whatever the row holds."""
    size, block = values.shape[1], SHAPES["scale_rows"].block
    arguments = {
        "values_ptr": values,
        "stride": row_stride(values),
        "scales_ptr": scales,
        "rows_ptr": rows,
        "out_ptr": out,
        "out_stride": row_stride(out),
        "out_rows_ptr": out_rows,
        "size": size,
        "BLOCK": block,
    }
    launch(scale_rows, "scale_rows", (scales.numel(), -(-size // block)), values.device, arguments)


def _product_arguments(hidden: Tensor, weight: Tensor) -> dict[str, Any]:
    return {
        "hidden_ptr": hidden,
        "hidden_stride": row_stride(hidden),
        "weight_ptr": weight,
        "weight_stride": weight.stride(0),
        "weight_step": weight.stride(1),
        "size": hidden.shape[1],
    }


def _head_arguments(targets: Tensor, head: Head) -> dict[str, Any]:
    return {
        "targets_ptr": targets,
        "bias_ptr": head.bias,
        **temperature_parameters(head),
        "softcap": head.softcap or 0.0,
        "SOFTCAP": head.softcap is not None,
    }
