"""Which tokens a loss computes, in plain torch: what the CPU runs, and what a kernel that finds them must give.

Letters: T tokens, S sequences, N computed tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from thinktwice_kernels.backends import LossInputs, Selection
from thinktwice_kernels.options import LossOptions
from thinktwice_kernels.packed import Sequences


def select_tokens(inputs: LossInputs, tokens: int, options: LossOptions) -> Selection:
    """`Backend.select_tokens`."""
    assert inputs.advantages is not None
    sequences = Sequences(inputs.cu_seqlens, tokens)
    mask = inputs.loss_mask
    if mask is None:
        mask = torch.ones(tokens, dtype=torch.bool, device=inputs.weights.device)
    advantages = inputs.advantages
    if advantages.numel() == sequences.count:
        advantages = sequences.spread(advantages)
    computed = mask
    if options.skips_zero_advantages():
        computed = mask & (advantages != 0)
        if options.needs_whole_sequences():
            computed = mask & sequences.any(computed)
    guided = inputs.guide_mask
    if guided is not None:
        guided = guided & mask
        if options.released_code_compat:
            guided = sequences.any(guided)
    rows = torch.nonzero(computed).squeeze(1)
    everything = rows.numel() == tokens

    def of_computed(values: Tensor | None) -> Tensor | None:
        return values if values is None or everything else values.index_select(0, rows)

    weights = sequences.spread(inputs.weights)
    cu_seqlens = torch.searchsorted(rows, sequences.offsets)
    compact = replace(
        inputs,
        advantages=of_computed(advantages),
        weights=weights if everything else weights.index_select(0, rows),
        cu_seqlens=cu_seqlens,
        old_logps=of_computed(inputs.old_logps),
        ref_logps=of_computed(inputs.ref_logps),
        rollout_logps=of_computed(inputs.rollout_logps),
        guide_mask=of_computed(guided),
        loss_mask=None,
    )
    borders = cu_seqlens.tolist() if options.needs_borders() else None
    return Selection(rows, everything, mask.sum(), compact, borders)
