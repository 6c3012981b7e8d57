"""The product of hidden states and the output embedding whose logits become exponentials before they leave registers.

Persistent programs walk over blocks of the tile. Both factors come as bulk tensor copies, some steps ahead of the
tensor cores; a block's exponentials leave the same way, half of its columns at a time.

Letters: V vocabulary, H hidden size, t rows of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from thinktwice_kernels.launch import launch_warps, processors
from thinktwice_kernels.rows import Head
from thinktwice_kernels.triton.numerics import FAR_BELOW, LOG2_E, number
from thinktwice_kernels.triton.rows import temperature_parameters
from thinktwice_kernels.triton.tokens import any_of

# Blocks of rows that programs take before they go on to the next columns: 4,096 rows of hidden states stay in the
# second-level cache while the weight passes by.
_GROUP = tl.constexpr(32)


@dataclass(frozen=True)
class Block:
    """What a program computes at a time."""

    rows: int
    columns: int
    depth: int  # of the hidden size, a step
    warps: int
    stages: int  # steps whose factors are under way or in use
    ahead: bool  # whether the next block's first factors come while a block's exponentials leave


# By compute capability. A block of 128 x 256 takes 128 registers of each of 256 threads for its sums on Hopper; three
# steps of 48 KiB and half of the block's exponentials on their way out fill the 227 KiB of shared memory. Blackwell has
# memory of its own for the sums; there, looking ahead spills.
BLOCKS = {9: Block(128, 256, 64, 8, 3, True), 10: Block(128, 256, 64, 8, 4, False)}
# Where this has been measured to be faster than what the others use, cuBLAS's product and a pass over its logits: on an
# H200 5.31 ms against 5.70 + 0.99, for 4,096 rows of V 151,936 and H 2,560.
MEASURED_FASTER = frozenset({9})


@triton.jit
def _write_columns(
    logits,  # [ROWS, COLUMNS]
    first,  # row
    column,  # the first
    out_desc,
    shifts,
    factors,
    targets,
    chosen_ptr,
    rows,
    vocabulary,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Exponentials of some columns to the tile, their sums, and the targets' logits that are among them."""
    columns = column + tl.arange(0, COLUMNS)
    row = first + tl.arange(0, ROWS)
    here = (targets >= column) & (targets < tl.minimum(column + COLUMNS, vocabulary)) & (row < rows)
    if any_of(here):
        hit = columns[None, :] == targets[:, None]
        tl.store(chosen_ptr + row, tl.sum(tl.where(hit, logits, 0.0), 1), mask=here)
    if column + COLUMNS > vocabulary:
        logits = tl.where((columns < vocabulary)[None, :], logits, FAR_BELOW)
    difference = logits - shifts[:, None]
    e = tl.exp2(difference * factors[:, None])
    total = tl.sum(e, 1)
    moment = tl.sum(e * difference, 1)
    out_desc.store([first, column], e.to(tl.bfloat16))
    return total, moment


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "temperatures_ptr",
        "shifts_ptr",
        "partials_ptr",
        "chosen_ptr",
    ],
)
def head_exponentials(
    hidden_desc,  # [t, H] bfloat16
    weight_desc,  # [V, H] bfloat16
    out_desc,  # the tile [t, V] bfloat16
    targets_ptr,  # [t]
    temperatures_ptr,  # [t] or None
    temperature: tl.float64,
    shifts_ptr,  # [t]
    partials_ptr,  # [t, blocks of columns, 2]: the sums of e and of e (z - shift)
    chosen_ptr,  # [t]: the target's logit as it was accumulated
    rows,  # t
    vocabulary,  # V
    size,  # H
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    row_blocks = tl.cdiv(rows, ROWS)
    column_blocks = tl.cdiv(vocabulary, COLUMNS)
    in_group = _GROUP * column_blocks
    for block in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=AHEAD):
        group = block // in_group
        height = tl.minimum(row_blocks - group * _GROUP, _GROUP)
        first = (group * _GROUP + block % in_group % height) * ROWS
        column_block = block % in_group // height
        column = column_block * COLUMNS
        logits = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in tl.range(0, size, DEPTH, num_stages=STAGES):
            own = hidden_desc.load([first, start])
            other = weight_desc.load([column, start])
            logits = tl.dot(own, other.T, logits)

        row = first + tl.arange(0, ROWS)
        there = row < rows
        shifts = tl.load(shifts_ptr + row, mask=there, other=0.0)
        targets = tl.load(targets_ptr + row, mask=there, other=-1).to(tl.int32)
        if temperatures_ptr is not None:
            tau = tl.load(temperatures_ptr + row, mask=there, other=1.0).to(tl.float32)
        else:
            tau = tl.zeros((ROWS,), tl.float32) + number(temperature, tl.float64).to(tl.float32)
        factors = LOG2_E / tl.where(tau > 0, tau, float("nan"))
        left, right = logits.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        total, moment = _write_columns(
            left, first, column, out_desc, shifts, factors, targets, chosen_ptr, rows, vocabulary,
            ROWS, HALF,
        )  # fmt: skip
        more_total, more_moment = _write_columns(
            right, first, column + HALF, out_desc, shifts, factors, targets, chosen_ptr, rows,
            vocabulary, ROWS, HALF,
        )  # fmt: skip
        part_ptrs = partials_ptr + (row.to(tl.int64) * column_blocks + column_block) * 2
        tl.store(part_ptrs, total + more_total, mask=there)
        tl.store(part_ptrs + 1, moment + more_moment, mask=there)


def block_for(hidden: Tensor, weight: Tensor, head: Head) -> Block | None:
    """What the device's programs compute at a time, where this product is the faster one and takes these factors.

    What a bias or a soft cap takes would not fit into registers beside the sums.
    """
    capability = torch.cuda.get_device_capability(hidden.device)[0] if hidden.is_cuda else 0
    plain = head.bias is None and head.softcap is None and _is_copied(hidden) and _is_copied(weight)
    return BLOCKS[capability] if capability in MEASURED_FASTER and plain else None


def _is_copied(matrix: Tensor) -> bool:
    """Whether bulk tensor copies can read it: rows of multiples of 16 bytes."""
    return matrix.is_contiguous() and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0


def head_exponentials_in_triton(
    block: Block,
    hidden: Tensor,  # [t, H] bfloat16
    weight: Tensor,  # [V, H] bfloat16
    targets: Tensor,  # [t] int64
    head: Head,  # without bias and soft cap
    shifts: Tensor,  # [t]
    out: Tensor,  # [t, V] bfloat16: the tile
    chosen: Tensor,  # [t]: gets the targets' logits, as they were accumulated
) -> Tensor:  # [t, parts, 2]
    """Fills the tile; the sums of its rows' exponentials, in parts."""
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    parts = triton.cdiv(vocabulary, block.columns)
    partials = torch.empty(rows, parts, 2, dtype=torch.float32, device=hidden.device)
    arguments = {
        "targets_ptr": targets,
        **temperature_parameters(head),
        "hidden_desc": TensorDescriptor.from_tensor(hidden, [block.rows, block.depth]),
        "weight_desc": TensorDescriptor.from_tensor(weight, [block.columns, block.depth]),
        "out_desc": TensorDescriptor.from_tensor(out, [block.rows, block.columns // 2]),
        "shifts_ptr": shifts,
        "partials_ptr": partials,
        "chosen_ptr": chosen,
        "rows": rows,
        "vocabulary": vocabulary,
        "size": size,
        "ROWS": block.rows,
        "COLUMNS": block.columns,
        "DEPTH": block.depth,
        "STAGES": block.stages,
        "AHEAD": block.ahead,
    }
    programs = min(processors(hidden.device), parts * triton.cdiv(rows, block.rows))
    launch_warps(head_exponentials, block.warps, (programs,), hidden.device, arguments)
    return partials
