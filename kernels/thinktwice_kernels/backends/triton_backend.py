"""The backend in Triton (triton_kernels/): checks nothing, chooses grids and launches.

Letters: T tokens, S sequences, V vocabulary, t rows of a tile of logits, m of them that have a gradient.
"""

import math
from dataclasses import replace
from typing import Any, get_args

import torch
import triton.language as tl
from torch import Tensor

from thinktwice_kernels.backends import PARTIALS, Head, LossInputs, Selection
from thinktwice_kernels.options import KlEstimator, LossOptions, PolicyLoss, ScaleRewards
from thinktwice_kernels.packed import accumulation_dtype
from thinktwice_kernels.triton_kernels.advantages import group_advantages as _group_advantages
from thinktwice_kernels.triton_kernels.launch import SHAPES, launch, steps_and_splits
from thinktwice_kernels.triton_kernels.rows import combine_statistics
from thinktwice_kernels.triton_kernels.rows import row_gradient as _row_gradient
from thinktwice_kernels.triton_kernels.rows import row_statistics as _row_statistics
from thinktwice_kernels.triton_kernels.scale import scale as _scale
from thinktwice_kernels.triton_kernels.selection import compact_tokens, count_tokens
from thinktwice_kernels.triton_kernels.sequence import sequence_loss as _sequence_loss

_SCALES = get_args(ScaleRewards)
# What `select_tokens` gives for each computed token.
_SELECTED = ("advantages", "weights", "old_logps", "ref_logps", "rollout_logps", "guide_mask")


def row_statistics(
    logits: Tensor,  # [t, V]
    targets: Tensor,  # [t] int64
    head: Head,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Backend.row_statistics`."""
    rows, size = logits.shape
    dtype = accumulation_dtype(logits)
    logps, lse = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(2))
    entropy = torch.empty_like(lse) if want_entropy else None
    shape, most = SHAPES["row_statistics"], SHAPES["combine_statistics"].block
    lanes = shape.lanes(logits.itemsize)
    steps, splits = steps_and_splits(rows, -(-size // (shape.vectors * lanes)), logits.device, most)
    partials = torch.empty(rows, splits, 3, dtype=dtype, device=logits.device) if splits > 1 else None
    shared = {
        **_row_arguments(logits, targets, head),
        "logps_ptr": logps,
        "lse_ptr": lse,
        "entropy_ptr": entropy,
        "partials_ptr": partials,
    }
    own = {"steps": steps, "VECTORS": shape.vectors, "LANES": lanes}
    launch(_row_statistics, "row_statistics", (rows, splits), logits.device, shared | own)
    if partials is not None:
        own = {"splits": splits, "BLOCK": most}
        launch(combine_statistics, "combine_statistics", (rows,), logits.device, shared | own)
    return logps, lse, entropy


def row_gradient(
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
    """`Backend.row_gradient`."""
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
        "out_stride": _row_stride(out),
        "steps": steps,
        "IN_PLACE": out.data_ptr() == logits.data_ptr() and rows is not None,
        "BLOCK": block,
    }
    launch(_row_gradient, "row_gradient", (count, splits), logits.device, arguments)


def _row_arguments(logits: Tensor, targets: Tensor, head: Head) -> dict[str, Any]:
    dtype = accumulation_dtype(logits)
    per_row = isinstance(head.temperature, Tensor)
    return {
        "logits_ptr": logits,
        "stride": _row_stride(logits),
        "targets_ptr": targets.contiguous(),
        "bias_ptr": None if head.bias is None else head.bias.to(dtype).contiguous(),
        "temperatures_ptr": head.temperature.contiguous() if isinstance(head.temperature, Tensor) else None,
        "temperature": 1.0 if per_row else head.temperature,
        "softcap": head.softcap or 0.0,
        "size": logits.shape[1],
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "SOFTCAP": head.softcap is not None,
    }


def _row_stride(matrix: Tensor) -> int:
    """The stride of a single row says nothing, but would count as another case to compile for."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def select_tokens(inputs: LossInputs, tokens: int, options: LossOptions) -> Selection:
    """`Backend.select_tokens`."""
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
        "loss_mask_ptr": _bytes(inputs.loss_mask),
        "guide_mask_ptr": _bytes(inputs.guide_mask),
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
        "guide_mask_out_ptr": _bytes(moved["guide_mask"]),
        "numbers_ptr": numbers,
        "rows_ptr": rows,
    }
    launch(count_tokens, "select_tokens", (sequences,), device, shared)
    launch(compact_tokens, "select_tokens", (sequences + 1,), device, own | shared)
    return numbers, rows, moved


def sequence_loss(inputs: LossInputs, options: LossOptions, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.sequence_loss`."""
    logps = inputs.logps
    tokens, sequences = logps.numel(), inputs.cu_seqlens.numel() - 1
    partials = torch.empty(sequences, len(PARTIALS), dtype=torch.float64, device=logps.device)
    want_entropy = want_gradient and options.entropy_coef != 0
    d_logps = torch.empty(tokens if want_gradient else 0, dtype=logps.dtype, device=logps.device)
    d_entropy = torch.empty(tokens if want_entropy else 0, dtype=logps.dtype, device=logps.device)
    arguments = {
        **_token_arguments(inputs),
        **_option_arguments(inputs, options),
        "partials_ptr": partials,
        "d_logps_ptr": d_logps if want_gradient else None,
        "d_entropy_ptr": d_entropy if want_entropy else None,
        "sequences": sequences,
        "BLOCK": SHAPES["sequence_loss"].block,
    }
    launch(_sequence_loss, "sequence_loss", (sequences,), logps.device, arguments)
    return partials, d_logps, d_entropy


def scale(values: Tensor, by: Tensor, out: Tensor) -> None:
    """`Backend.scale`."""
    shape = SHAPES["scale"]
    lanes = shape.lanes(values.itemsize)
    arguments = {
        "values_ptr": values,
        "by_ptr": by,
        "out_ptr": out,
        "size": values.numel(),
        "TYPE": tl.float64 if accumulation_dtype(values, by) == torch.float64 else tl.float32,
        "VECTORS": shape.vectors,
        "LANES": lanes,
    }
    launch(_scale, "scale", (-(-values.numel() // (shape.vectors * lanes)),), values.device, arguments)


def group_advantages(
    rewards: Tensor,  # [S]
    group_ids: Tensor,  # [S] int64
    scale_rewards: ScaleRewards,
    eps: float,
) -> Tensor:  # [S]
    """`Backend.group_advantages`."""
    out = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    arguments = {
        "rewards_ptr": rewards.contiguous(),
        "group_ids_ptr": group_ids.contiguous(),
        "out_ptr": out,
        "count": rewards.numel(),
        "eps": eps,
        "scale": _SCALES.index(scale_rewards),
        "BLOCK": SHAPES["group_advantages"].block,
    }
    launch(_group_advantages, "group_advantages", (rewards.numel(),), rewards.device, arguments)
    return out


def _token_arguments(inputs: LossInputs) -> dict[str, Any]:
    fused = inputs.advantages is None
    sequences = inputs.cu_seqlens.numel() - 1
    return {
        "cu_seqlens_ptr": inputs.cu_seqlens,
        "logps_ptr": inputs.logps,
        "advantages_ptr": inputs.advantages,
        "rewards_ptr": inputs.rewards if fused else None,
        "group_ids_ptr": inputs.group_ids if fused else None,
        "weights_ptr": inputs.weights,
        "old_logps_ptr": inputs.old_logps,
        "ref_logps_ptr": inputs.ref_logps,
        "rollout_logps_ptr": inputs.rollout_logps,
        "entropy_ptr": inputs.entropy,
        "loss_mask_ptr": _bytes(inputs.loss_mask),
        "guide_mask_ptr": _bytes(inputs.guide_mask),
        "ADVANTAGE_PER_TOKEN": inputs.advantages is not None and inputs.advantages.numel() != sequences,
        "WEIGHT_PER_TOKEN": inputs.weights.numel() != sequences,
    }


def _option_arguments(inputs: LossInputs, options: LossOptions) -> dict[str, Any]:
    """Numbers as numbers; modes, each a kernel of its own, by their position among the choices, where they matter."""
    ceiling = options.dual_clip if options.dual_clip is not None else options.delta
    guided = inputs.guide_mask is not None
    return {
        "epsilon_low": options.epsilon_low,
        "epsilon_high": options.epsilon_high,
        "ceiling": math.inf if ceiling is None else ceiling,
        "temperature_pos": options.sapo_temperature_pos,
        "temperature_neg": options.sapo_temperature_neg,
        "rollout_floor": options.rollout_is_floor or 0.0,
        "rollout_cap": options.rollout_is_cap,
        "beta": options.beta,
        "entropy_coef": options.entropy_coef,
        "advantage_eps": inputs.advantage_eps,
        "scale_rewards": _SCALES.index(inputs.scale_rewards),
        "POLICY": get_args(PolicyLoss).index(options.policy_loss),
        "SEQUENCE_RATIO": options.importance_sampling_level == "sequence",
        "ROLLOUT_IS": options.rollout_is != "none",
        "SEQUENCE_ROLLOUT": options.rollout_is.startswith("sequence"),
        "TRUNCATE": options.rollout_is.endswith("truncate"),
        "FALLBACK": guided and options.guide_fallback == "clip",
        "COMPAT": guided and options.released_code_compat,
        "KL": get_args(KlEstimator).index(options.kl_estimator),
        "USE_KL": options.beta != 0,
        "USE_ENTROPY": options.entropy_coef != 0,
    }


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
