"""The policy-gradient loss straight from the last hidden state: loss, metrics and all gradients tile by tile.

A tile of logits becomes log-probabilities, these become the loss and its derivative, and with that the tile becomes
its own gradient, which two products turn into those of hidden states and weight: 6 T V H in all. Rows without signal
never enter a product, rows that the loss clips leave before the last two. In bfloat16 on a GPU a tile of exponentials
takes the place of logits: see exponentials.py.

Where one token's loss depends on its whole sequence, tiles hold whole sequences. A sequence that is longer than a
tile is worked through in pieces, of which all but the last are computed a second time: 8 T V H for those.

Letters: T tokens, S sequences, V vocabulary, H hidden size, N computed tokens, n tokens of a segment.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from thinktwice_kernels.advantages import ADVANTAGE_EPS, check_advantages, group_advantages
from thinktwice_kernels.exponentials import (
    ExponentialTiles,
    KeptTile,
    exponential_rows,
    no_tile,
    row_multiple,
    uses_exponentials,
)
from thinktwice_kernels.launch import (
    accumulation_dtype,
    fake_gradient,
    first_order_only,
    in_triton,
    op,
    uses_triton,
)
from thinktwice_kernels.loss import restrict_to_kept, sequence_loss, with_dropped
from thinktwice_kernels.metrics import PARTIALS, absent_metrics, metrics_of, totals_of
from thinktwice_kernels.options import (
    LossInputs,
    LossKeywords,
    LossOptions,
    ScaleRewards,
    Selection,
    check_cu_seqlens,
    check_normalizer,
    loss_weights,
    prepared_tensors,
    select_tokens_in_torch,
)
from thinktwice_kernels.rows import (
    Head,
    HeadGradients,
    accumulated_logits,
    bytes_per_logit,
    check_head,
    check_targets,
    gradient_dtype,
    head_of,
    hidden_gradient_dtype,
    new_tile,
    row_gradient,
    row_statistics,
    rows_per_tile,
    temperature_arguments,
    tiles,
)
from thinktwice_kernels.segments import Segment, may_lack_gradient, segments_of, uploaded


def linear_grpo_loss(
    hidden: Tensor,  # [T, H], any floating type
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T], integers in [0, V)
    advantages: Tensor | None,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1] int32
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or [T]
    logit_softcap: float | None = None,
    rewards: Tensor | None = None,  # [S]
    group_ids: Tensor | None = None,  # [S]
    scale_rewards: ScaleRewards = "none",
    advantage_eps: float = ADVANTAGE_EPS,
    old_logps: Tensor | None = None,  # [T]
    ref_logps: Tensor | None = None,  # [T]
    rollout_logps: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T], bool or 0/1
    guide_mask: Tensor | None = None,  # [T], bool or 0/1
    normalizer: float | Tensor | None = None,
    memory_budget: int | None = None,
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of `linear_logprobs`, with every gradient computed on the way: backward costs no second forward.

    ``linear_grpo_loss(hidden, weight, targets, advantages, cu_seqlens, epsilon_high=0.28)`` is
    ``grpo_loss(logps, advantages, cu_seqlens, entropy=entropy, epsilon_high=0.28)`` with
    ``logps, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True)``; all options of `grpo_loss` are
    options here, with the same meaning and defaults.

    Logits exist for one tile of tokens at a time and are fp32 accumulators, never rounded to the type of the inputs.
    A token that `grpo_loss` skips costs no matrix product at all, whatever its hidden state holds; a token whose
    objective is clipped leaves before the two products of the gradients. The gradient of the weight adds up in fp32
    over the tiles and is rounded to the weight's type once. Inputs that need no gradient (a frozen weight) cost none;
    under ``torch.no_grad()`` only the loss is computed. Beyond inputs and gradients the memory is that of the tile.

    In bfloat16 on a GPU a tile holds two bytes a logit: exponentials, rounded to bfloat16 once their sums are taken in
    fp32. If one tile is enough, it is kept for the backward pass, and the products of the gradients run there. Clipped
    tokens then leave by blocks of 256.

    Where a token's loss depends on its whole sequence (`importance_sampling_level` "sequence", `rollout_is`
    "sequence-*"), tiles hold whole sequences, and a sequence that is longer than a tile has its logits computed twice.

    A GPU is waited for once, to learn which tokens are skipped and where sequences end; not where none can be skipped
    (no `loss_mask`, and `beta` or `entropy_coef` is not 0) and borders don't matter. In bfloat16, and where tokens may
    be clipped (`old_logps` with the clip objective, `guide_mask`, `rollout_is` "*-mask"), it is waited for once a tile.
    `advantages`, `cu_seqlens` and the masks may lie on the CPU.

    Args:
        hidden: the last hidden state; need not be contiguous.
        weight: the output embedding; a plain tensor: under FSDP2 call this inside the module's forward.
        targets: for tokens that carry no loss any valid id.
        advantages, cu_seqlens, old_logps, ref_logps, rollout_logps, loss_mask, guide_mask, normalizer: see `grpo_loss`.
        bias, temperature, logit_softcap: see `linear_logprobs`.
        rewards, group_ids, scale_rewards, advantage_eps: in place of advantages, see `group_advantages`.
        memory_budget: bytes of logits, with their gradient, that may exist at a time, if one token's fit into them;
            None: 4 GiB on a GPU, 256 MiB on a CPU. Also the number of rows of each matrix product follows from it.

    Returns:
        The loss, without dimensions, fp32 (float64 if `hidden` or `weight` is float64), and the metrics that
        `thinktwice_kernels.METRICS` defines, `entropy` among them.

    Raises:
        ValueError: as `grpo_loss` and `linear_logprobs` do, and for a budget that is not positive.
    """
    parsed = LossOptions(**options)
    tokens, dtype = hidden.shape[0], accumulation_dtype(hidden, weight)
    check_head(hidden, weight, bias, logit_softcap)
    check_targets(targets, tokens, weight.shape[0])
    check_cu_seqlens(cu_seqlens, tokens)
    optional = {
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "loss_mask": loss_mask,
        "guide_mask": guide_mask,
    }
    given = prepared_tensors(optional, targets.shape, parsed, dtype, computed={"entropy"})
    check_advantages(advantages, rewards, group_ids, cu_seqlens, tokens, scale_rewards, advantage_eps)
    check_normalizer(normalizer)
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"memory_budget is {memory_budget}: pass a positive number of bytes, or None")
    if rewards is not None and group_ids is not None:
        advantages = group_advantages(rewards, group_ids, scale_rewards=scale_rewards, eps=advantage_eps)
    assert advantages is not None
    kept = restrict_to_kept(given, cu_seqlens, parsed)
    differentiable = (hidden, weight, bias)
    loss, totals, *_ = _linear_grpo_loss(
        hidden,
        weight,
        bias,
        targets.long(),
        *temperature_arguments(temperature, tokens),
        logit_softcap,
        advantages.detach().to(dtype).contiguous(),
        cu_seqlens.contiguous(),
        loss_weights(
            cu_seqlens,
            given["loss_mask"],
            parsed,
            normalizer,
            hidden.new_empty(tokens, dtype=dtype),
            kept.dropped_sequences,
        ),
        *given.values(),
        parsed.encode(),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable],
        None if memory_budget is None else int(memory_budget),
        not torch.compiler.is_compiling(),  # how many rows a kept tile has is known to no tracer
    )
    absent = absent_metrics({**given, "entropy": hidden}, parsed.rollout_is != "none")
    return loss, metrics_of(with_dropped(totals, kept), loss.dtype, absent)


@op("linear_grpo_loss")
def _linear_grpo_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T] int64
    temperature: float,
    temperatures: Tensor | None,  # [T]
    softcap: float | None,
    advantages: Tensor,  # [S] or [T], here or on the CPU
    cu_seqlens: Tensor,  # [S+1], here or on the CPU
    weights: Tensor,  # [S]
    old_logps: Tensor | None,  # [T]
    ref_logps: Tensor | None,  # [T]
    rollout_logps: Tensor | None,  # [T]
    loss_mask: Tensor | None,  # [T] bool, here or on the CPU
    guide_mask: Tensor | None,  # [T] bool, here or on the CPU
    options: Sequence[float],  # LossOptions.encode()
    wanted: Sequence[bool],  # the gradients of hidden, weight, bias
    memory_budget: int | None,
    keep: bool,  # whether a tile may be kept for the backward pass
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the totals [len(PARTIALS)] float64, and the gradients of hidden, weight (fp32) and bias (fp32).

    Or, in place of these three, a `KeptTile`: exponentials, scales and rows.
    """
    logps = hidden.new_empty(0)  # computed tile by tile
    inputs = LossInputs(
        logps, advantages, cu_seqlens, weights, old_logps, ref_logps, rollout_logps, None, loss_mask, guide_mask
    )
    head = head_of(bias, temperature, temperatures, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        totals, found = _tiled_loss(
            hidden, weight, targets, head, inputs, LossOptions.decode(options), cast(Any, tuple(wanted)),
            memory_budget, keep,
        )  # fmt: skip
    if isinstance(found, KeptTile):
        gradients, tile = HeadGradients(hidden, weight, None, (False,) * 3).result(), found.tensors()
    else:
        gradients, tile = found.result(), no_tile(weight)
    return totals[0].to(accumulation_dtype(hidden, weight), copy=True), totals, *gradients, *tile


@_linear_grpo_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype, softcap = accumulation_dtype(hidden, weight), rest[3]
    options, wanted, _, keep = rest[-4:]
    kept = keep and any(wanted) and uses_exponentials(hidden, weight, softcap, LossOptions.decode(options))
    of_hidden, of_weight, of_bias = (want and not kept for want in wanted)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(PARTIALS), dtype=torch.float64),
        fake_gradient(hidden, of_hidden, hidden_gradient_dtype(hidden, weight)),
        fake_gradient(weight, of_weight, dtype),
        fake_gradient(weight.new_empty(0) if bias is None else bias, of_bias, dtype),
        *no_tile(weight, rows=hidden.shape[0] if kept else 0),
    )


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else each backward pass fills zeros of the shape of every gradient below
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[2:])


@first_order_only
def _linear_loss_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 19
    hidden, weight, bias, *saved = ctx.saved_tensors
    saved, tile = saved[:3], saved[3:]
    if tile[0].numel():
        with torch.autocast(hidden.device.type, enabled=False):
            found = KeptTile.of(tile).gradients(hidden, weight, bias, gradient, ctx.needs_input_grad[:3])
        return *found, *(None,) * 16
    consume = type(gradient) is Tensor and not ctx.creates_graph and not _graph_is_kept()
    scaled = [
        _scaled(tensor, gradient, like.dtype, consume) if want else None
        for tensor, like, want in zip(saved, (hidden, weight, bias), ctx.needs_input_grad, strict=False)
    ]
    return *scaled, *(None,) * 16


_linear_grpo_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)


def _graph_is_kept() -> bool:
    """Whether the running backward pass was asked to retain its graph, so that it may run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype, consume: bool) -> Tensor:
    """The product in the given type; with `consume` in the memory of `gradient` where that can be."""
    if type(by) is Tensor and by.device.type == "cpu" and by == 1:  # a GPU would wait, a tracer's tensors have no value
        # What a graph that runs again hands out must be memory of its own.
        return gradient.to(dtype, copy=not consume)
    if type(by) is not Tensor:
        return (gradient * by).to(dtype)
    out = gradient if consume and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if uses_triton(gradient):
        in_triton("scale").scale_in_triton(gradient, by, out)
    else:
        torch.mul(gradient, by, out=out)
    return out


def _tiled_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T] int64
    head: Head,
    inputs: LossInputs,  # but for logps, which are computed here, and entropy
    options: LossOptions,
    wanted: tuple[bool, bool, bool],  # the gradients of hidden, weight and bias
    budget: int | None,  # bytes of logits and their gradient at a time
    keep: bool,  # whether the tile may be kept for the backward pass
) -> tuple[Tensor, HeadGradients | KeptTile]:
    """Totals of the batch [len(PARTIALS)], and what has the gradients."""
    tokens = select_tokens(_beside(hidden, inputs), hidden.shape[0], options)
    shared = hidden, weight, targets, head, options, wanted, budget, tokens
    work: ExponentialTiles | _Tiles
    if any(wanted) and uses_exponentials(hidden, weight, head.softcap, options):
        step = exponential_rows(weight.shape[0], hidden.device, budget)
        segments = list(segments_of(tokens, options, step, row_multiple(step)))
        work = ExponentialTiles(*shared, keep and len(segments) == 1 and tokens.rows.numel() <= step)
    else:
        work = _Tiles(*shared)
        segments = list(segments_of(tokens, options, work.step, 1))
    parts = [work.segment(*pair) for pair in zip(segments, _offsets(segments, hidden.device), strict=True)]
    totals = totals_of(torch.cat([hidden.new_empty(0, len(PARTIALS), dtype=torch.float64), *parts]))
    totals[PARTIALS.index("tokens")] = tokens.in_loss
    return totals, work.result() or HeadGradients(hidden, weight, head.bias, wanted)


def _beside(hidden: Tensor, inputs: LossInputs) -> LossInputs:
    """The inputs on the device of the hidden states."""
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    moved: Any = {name: uploaded(tensor, hidden.device) for name, tensor in tensors.items()}
    return replace(inputs, **moved)


def select_tokens(inputs: LossInputs, tokens: int, options: LossOptions) -> Selection:
    """The tokens in the loss, without those that have no signal.

    `inputs` are of T = `tokens` tokens, with weights [S]; logps and entropy are not looked at. Where
    `LossOptions.skips_zero_advantages` holds, a token has no signal if its advantage is 0; where the loss needs
    whole sequences, if that of each loss token of its sequence is. A GPU is waited for at most once: for N, unless
    that must be T, and for the borders where they are needed.
    """
    if uses_triton(inputs.weights):
        return in_triton("selection").select_tokens_in_triton(inputs, tokens, options)
    return select_tokens_in_torch(inputs, tokens, options)


def _offsets(segments: list[Segment], device: torch.device) -> Sequence[Tensor]:
    """Each segment's offsets, int32, in one piece of memory."""
    sizes = [len(segment.offsets) for segment in segments]
    offsets = torch.tensor([offset for segment in segments for offset in segment.offsets], dtype=torch.int32)
    return uploaded(offsets, device).split(sizes)


class _Tiles:
    """Works through segments, one tile of logits in memory."""

    def __init__(
        self,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        targets: Tensor,  # [T]
        head: Head,
        options: LossOptions,
        wanted: tuple[bool, bool, bool],
        budget: int | None,
        tokens: Selection,
    ):
        self._hidden, self._weight, self._targets = hidden, weight, targets
        self._head, self._options, self._tokens = head, options, tokens
        self._want_gradient = any(wanted)
        self._dtype, self._out_dtype = accumulation_dtype(hidden, weight), gradient_dtype(hidden, weight)
        self.step = rows_per_tile(weight.shape[0], bytes_per_logit(self._dtype, self._out_dtype), hidden.device, budget)
        capacity = min(self.step, tokens.rows.numel())
        self._buffer = new_tile(hidden, weight, capacity)
        self._out_buffer = self._buffer
        if any(wanted) and self._out_dtype != self._dtype:
            self._out_buffer = hidden.new_empty(capacity, weight.shape[0], dtype=self._out_dtype)
        self._gradients = HeadGradients(hidden, weight, head.bias, wanted)

    def result(self) -> HeadGradients:
        """What holds the gradients."""
        return self._gradients

    def segment(
        self,
        segment: Segment,
        offsets: Tensor,  # the segment's, int32
    ) -> Tensor:
        """Partials [sequences, len(PARTIALS)]; the gradients are added up."""
        count = segment.stop - segment.start
        logps, lse, entropy = (self._hidden.new_empty(count, dtype=self._dtype) for _ in range(3))
        pieces = list(tiles(0, count, self.step))
        logits = self._buffer
        for piece in pieces:
            rows = segment.rows(self._tokens, piece)
            logits = self._logits(rows, piece)
            found = row_statistics(logits, self._targets[rows], self._head.of_rows(rows), True)
            logps[piece], lse[piece] = found[:2]
            entropy[piece] = cast(Tensor, found[2])
        partials, d_logps, d_entropy = sequence_loss(
            segment.inputs(self._tokens.inputs, offsets, logps, entropy),
            self._options,
            self._want_gradient,
            selected=True,
        )
        if not self._want_gradient:
            return partials
        for piece in reversed(pieces):
            live = self._live(d_logps[piece])
            if live is not None and live.numel() == 0:
                continue
            rows = segment.rows(self._tokens, piece)
            if piece is not pieces[-1]:
                logits = self._logits(rows, piece)
            self._add_gradients(
                logits,
                rows,
                live,
                lse[piece],
                entropy[piece],
                d_logps[piece],
                d_entropy[piece] if d_entropy.numel() else None,
            )
        return partials

    def _logits(self, rows: Tensor | slice, piece: slice) -> Tensor:
        return accumulated_logits(self._hidden[rows], self._weight, out=self._buffer[: piece.stop - piece.start])

    def _add_gradients(
        self,
        logits: Tensor,  # [t, V], overwritten
        rows: Tensor | slice,  # the t rows, of the T
        live: Tensor | None,  # those of the t that have a gradient; None: all
        lse: Tensor,  # [t]
        entropy: Tensor,  # [t]
        d_logps: Tensor,  # [t]
        d_entropy: Tensor | None,  # [t]
    ) -> None:
        count = d_logps.numel() if live is None else live.numel()
        d_logits = logits if self._out_dtype == self._dtype else self._out_buffer[:count]
        row_gradient(
            logits, self._targets[rows], self._head.of_rows(rows), lse, entropy, d_logps, d_entropy, live, d_logits
        )
        if live is not None:
            if d_logits is logits:
                d_logits = _compacted(logits, live)
            rows = live + rows.start if isinstance(rows, slice) else rows[live]
        self._gradients.add(d_logits, rows)

    def _live(self, d_logps: Tensor) -> Tensor | None:
        """The rows of a tile with a gradient; None: all. Asking makes a GPU wait, so not where none can lack it."""
        if not may_lack_gradient(self._tokens.inputs, self._options):
            return None
        live = torch.nonzero(d_logps).squeeze(1)
        return None if live.numel() == d_logps.numel() else live


def _compacted(
    tile: Tensor,  # [t, V]
    rows: Tensor,  # [m] int64, rising
) -> Tensor:  # [m, V]
    """The rows moved to the tile's beginning, on a CPU in place: a copy needs the memory of a second tile."""
    if tile.is_cuda:  # where that would be a launch a row
        return tile[rows]
    for position, row in enumerate(rows.tolist()):
        if position != row:
            tile[position] = tile[row]
    return tile[: rows.numel()]
