"""Which tokens the fused loss computes, one after another with what it needs of each: `linear_loss.select_tokens`.

Two launches. The first counts the computed tokens of each sequence; the second gives each sequence a program, which
finds from the counts where its tokens go and writes them there, in order.

Letters: T tokens, S sequences, N computed tokens.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.launch import SHAPES, launch
from thinktwice_kernels.options import LossInputs, LossOptions, Selection
from thinktwice_kernels.triton.tokens import in_loss_of, mask_bytes, of_tokens

# What `select_tokens` gives for each computed token.
_SELECTED = ("advantages", "weights", "old_logps", "ref_logps", "rollout_logps", "guide_mask")


@triton.jit
def _own_advantage(advantages_ptr, sequence, PER_TOKEN: tl.constexpr):
    """The sequence's, where there is one to a sequence."""
    if PER_TOKEN:
        return tl.full((), 0.0, tl.float64)
    else:
        return tl.load(advantages_ptr + sequence).to(tl.float64)


@triton.jit
def _total(numbers_ptr, count, BLOCK: tl.constexpr):
    """The sum of the first `count` numbers."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, count, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        total += tl.load(numbers_ptr + positions, mask=positions < count, other=0)
    return tl.sum(total, 0)


@triton.jit
def _move(values_ptr, out_ptr, tokens, places, computed):
    """Optional values of the computed tokens to their places."""
    if values_ptr is not None:
        tl.store(out_ptr + places, tl.load(values_ptr + tokens, mask=computed, other=0), mask=computed)


@triton.jit(
    do_not_specialize=["sequences"],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr",
        "advantages_ptr",
        "loss_mask_ptr",
        "guide_mask_ptr",
        "counts_ptr",
    ],
)
def count_tokens(
    cu_seqlens_ptr,  # [S+1]
    advantages_ptr,  # [S] or [T]
    loss_mask_ptr,  # [T] bytes or None
    guide_mask_ptr,  # [T] bytes or None
    counts_ptr,  # [3, S] int32: computed, in the loss, and, if COMPAT, guided among these
    sequences,  # S
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    SKIP: tl.constexpr,  # a token with advantage 0 adds nothing
    WHOLE: tl.constexpr,  # unless another one of its sequence has another advantage
    COMPAT: tl.constexpr,  # one guided token makes its sequence guided
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    own_advantage = _own_advantage(advantages_ptr, sequence, ADVANTAGE_PER_TOKEN)
    in_loss_count = tl.zeros((BLOCK,), tl.int32)
    signal_count = tl.zeros((BLOCK,), tl.int32)
    guided_count = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        in_loss = in_loss_of(loss_mask_ptr, tokens, tokens < end)
        advantages = of_tokens(advantages_ptr, tokens, in_loss, own_advantage, ADVANTAGE_PER_TOKEN)
        in_loss_count += in_loss.to(tl.int32)
        signal_count += (advantages != 0).to(tl.int32)
        if COMPAT:
            guided_count += (tl.load(guide_mask_ptr + tokens, mask=in_loss, other=0) != 0).to(tl.int32)

    in_loss_total = tl.sum(in_loss_count, 0)
    computed_total = in_loss_total
    if SKIP:
        computed_total = tl.sum(signal_count, 0)
        if WHOLE:
            computed_total = tl.where(computed_total > 0, in_loss_total, 0)
    tl.store(counts_ptr + sequence, computed_total)
    tl.store(counts_ptr + sequences + sequence, in_loss_total)
    if COMPAT:
        tl.store(counts_ptr + 2 * sequences + sequence, tl.sum(guided_count, 0))


@triton.jit(
    do_not_specialize=["sequences"],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr",
        "advantages_ptr",
        "weights_ptr",
        "old_logps_ptr",
        "ref_logps_ptr",
        "rollout_logps_ptr",
        "loss_mask_ptr",
        "guide_mask_ptr",
        "counts_ptr",
        "numbers_ptr",
        "rows_ptr",
        "advantages_out_ptr",
        "weights_out_ptr",
        "old_logps_out_ptr",
        "ref_logps_out_ptr",
        "rollout_logps_out_ptr",
        "guide_mask_out_ptr",
    ],
)
def compact_tokens(
    cu_seqlens_ptr,  # [S+1]
    advantages_ptr,  # [S] or [T]
    weights_ptr,  # [S]
    old_logps_ptr,  # [T] or None
    ref_logps_ptr,  # [T] or None
    rollout_logps_ptr,  # [T] or None
    loss_mask_ptr,  # [T] bytes or None
    guide_mask_ptr,  # [T] bytes or None
    counts_ptr,  # [3, S], from count_tokens
    numbers_ptr,  # [S+2] int64: cu_seqlens of the computed tokens, then how many tokens are in the loss
    rows_ptr,  # [T] int64; of this and what follows the first N are written
    advantages_out_ptr,  # [T]
    weights_out_ptr,  # [T]
    old_logps_out_ptr,  # [T] or None, and so on
    ref_logps_out_ptr,
    rollout_logps_out_ptr,
    guide_mask_out_ptr,
    sequences,  # S; the grid has one program more, which writes the totals
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    SKIP: tl.constexpr,
    WHOLE: tl.constexpr,
    COMPAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    place = _total(counts_ptr, sequence, BLOCK)
    tl.store(numbers_ptr + sequence, place)
    if sequence == sequences:
        tl.store(numbers_ptr + sequences + 1, _total(counts_ptr + sequences, sequences, BLOCK))
    else:
        begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
        own_advantage = _own_advantage(advantages_ptr, sequence, ADVANTAGE_PER_TOKEN)
        weight = tl.load(weights_ptr + sequence)
        any_computed = tl.load(counts_ptr + sequence) > 0
        any_guided = any_computed
        if COMPAT:
            any_guided = tl.load(counts_ptr + 2 * sequences + sequence) > 0
        for start in range(begin, end, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            computed = in_loss_of(loss_mask_ptr, tokens, tokens < end)
            advantages = of_tokens(advantages_ptr, tokens, computed, own_advantage, ADVANTAGE_PER_TOKEN)
            if SKIP:
                computed = computed & (any_computed if WHOLE else advantages != 0)
            counted = computed.to(tl.int32)
            places = place + tl.cumsum(counted, 0) - 1
            tl.store(rows_ptr + places, tokens, mask=computed)
            tl.store(advantages_out_ptr + places, advantages, mask=computed)
            tl.store(weights_out_ptr + places, tl.zeros((BLOCK,), weight.dtype) + weight, mask=computed)
            _move(old_logps_ptr, old_logps_out_ptr, tokens, places, computed)
            _move(ref_logps_ptr, ref_logps_out_ptr, tokens, places, computed)
            _move(rollout_logps_ptr, rollout_logps_out_ptr, tokens, places, computed)
            if COMPAT:
                tl.store(guide_mask_out_ptr + places, computed & any_guided, mask=computed)
            else:
                _move(guide_mask_ptr, guide_mask_out_ptr, tokens, places, computed)
            place += tl.sum(counted, 0)


def select_tokens_in_triton(inputs: LossInputs, tokens: int, options: LossOptions) -> Selection:
    """`linear_loss.select_tokens`."""
    numbers, rows, moved = compacted(inputs, tokens, options)
    borders = numbers[:-1].tolist() if options.needs_borders() else None
    computed = tokens
    if borders is not None:
        computed = borders[-1]
    elif options.skips_zero_advantages() or inputs.loss_mask is not None:
        computed = int(numbers[-2])
    compact: Any = {name: None if values is None else values[:computed] for name, values in moved.items()}
    kept = replace(inputs, cu_seqlens=numbers[:-1], loss_mask=None, **compact)
    return Selection(rows[:computed], computed == tokens, numbers[-1], kept, borders)


def compacted(inputs: LossInputs, tokens: int, options: LossOptions) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """What `select_tokens` gives, before anyone knows the number N of computed tokens.

    The offsets of their sequences, with the number of loss tokens behind these, [S+2] int64; the computed tokens and
    what the loss needs of each, of which the first N of T are written.
    """
    assert inputs.advantages is not None
    device, sequences = inputs.weights.device, inputs.cu_seqlens.numel() - 1
    numbers = torch.empty(sequences + 2, dtype=torch.int64, device=device)
    rows = torch.empty(tokens, dtype=torch.int64, device=device)
    given = {name: getattr(inputs, name) for name in _SELECTED}
    moved = {
        name: None if x is None else torch.empty(tokens, dtype=x.dtype, device=device) for name, x in given.items()
    }
    shared = {
        "cu_seqlens_ptr": inputs.cu_seqlens,
        "advantages_ptr": inputs.advantages,
        "loss_mask_ptr": mask_bytes(inputs.loss_mask),
        "guide_mask_ptr": mask_bytes(inputs.guide_mask),
        "counts_ptr": torch.empty(3, sequences, dtype=torch.int32, device=device),
        "sequences": sequences,
        "ADVANTAGE_PER_TOKEN": inputs.advantages.numel() != sequences,
        "SKIP": options.skips_zero_advantages(),
        "WHOLE": options.needs_whole_sequences(),
        "COMPAT": inputs.guide_mask is not None and options.released_code_compat,
        "BLOCK": SHAPES["select_tokens"].block,
    }
    own = {
        **{f"{name}_ptr": values for name, values in given.items()},
        **{f"{name}_out_ptr": values for name, values in moved.items()},
        "guide_mask_out_ptr": mask_bytes(moved["guide_mask"]),
        "numbers_ptr": numbers,
        "rows_ptr": rows,
    }
    launch(count_tokens, "select_tokens", (sequences,), device, shared)
    launch(compact_tokens, "select_tokens", (sequences + 1,), device, own | shared)
    return numbers, rows, moved
