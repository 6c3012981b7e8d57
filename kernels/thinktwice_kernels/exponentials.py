"""A tile of exponentials in place of logits: how `linear_grpo_loss` computes in bfloat16 on a GPU.

With a number near a row's log-sum-exp known beforehand, its shift, logits need not be kept until they are all there:
as soon as one is accumulated, ``e = exp((z - shift) / tau)`` goes to a tile in bfloat16, with its sum S over the row in
fp32. Then log p of the target is (z - shift) / tau - log S, all from fp32, and the gradient of the logits is the tile
itself, times one number per row, once the target's own element is S (p - 1):

    d_logits = s e,  s = -d_logp / (tau S);   d_hidden = s (e W);   d_weight = e^T (s h)

so that no pass over the tile comes before the products, and rounding costs each probability 2^-9 of itself, however
large the logits are. A shift comes from a log-probability that is about the current one (the old policy's, the
rollout's or the reference's), else from every 64th logit. A row whose sum is out of bounds all the same has its logits
computed once more, as `row_statistics` takes them, and with that an exact shift.

A single tile is kept, with its scales, for the backward pass, which then has the incoming gradient to put into s and
gives the weight's gradient in its own type. The products of several are added up in fp32 in the forward pass.

Letters: T tokens, N computed tokens, V vocabulary, H hidden size, n tokens of a segment, t rows of a tile, m of them
that enter the products of the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thinktwice_kernels.launch import in_triton, uses_triton
from thinktwice_kernels.loss import sequence_loss
from thinktwice_kernels.options import LossOptions, Selection
from thinktwice_kernels.rows import (
    Head,
    HeadGradients,
    accumulated_logits,
    product,
    row_statistics,
    rows_per_tile,
    scaled_rows,
    scaled_sum,
    tile_budget,
    tiles,
    write_hidden_gradient,
)
from thinktwice_kernels.segments import Segment, may_lack_gradient, uploaded

# Rows of a tile: cuBLAS is at its best with multiples of this, and gains nothing from more than that.
ROW_MULTIPLE = 256
LARGEST_TILE = 12_288
# Of the budget, for fp32 logits on their way to the tile: of 4 GiB 256 MiB, 15 waves of programs a product.
_LOGITS_SHARE = 16
_COLUMN_MULTIPLE = 256
# Rows of the tile begin on multiples of 128 bytes.
_STRIDE_MULTIPLE = 64
# Every so many rows of the weight stand for all of them where nobody knows a row's log-probability.
SUBSET = 64
# Sums of a row between which its exponentials and what is computed from them keep their digits.
_SMALLEST_SUM, _LARGEST_SUM = 4.248354255291589e-18, 2.3538526683702e17  # e^-40, e^40


def uses_exponentials(hidden: Tensor, weight: Tensor, softcap: float | None, options: LossOptions) -> bool:
    """Whether this is the way to the gradients of these: bfloat16 where Triton computes.

    fp16 could not hold the exponentials, and fp32 would round them to less than its own. The entropy's term is a
    function of an exponential, which the derivative of a soft cap has been multiplied into.
    """
    low = hidden.dtype == weight.dtype == torch.bfloat16
    return low and uses_triton(hidden) and (softcap is None or options.entropy_coef == 0)


def exponential_rows(vocabulary: int, device: torch.device, budget: int | None) -> int:
    """Rows of a tile, at most: a multiple of `ROW_MULTIPLE` where the budget has room for that."""
    whole = tile_budget(device, budget)
    rows = min(rows_per_tile(_stride(vocabulary), 2, device, whole - whole // _LOGITS_SHARE), LARGEST_TILE)
    return rows if rows < ROW_MULTIPLE else rows // ROW_MULTIPLE * ROW_MULTIPLE


def row_multiple(step: int) -> int:
    """Of which a tile's rows are one, where it may have `step` at most."""
    return ROW_MULTIPLE if step >= ROW_MULTIPLE else 1


@dataclass(frozen=True)
class KeptTile:
    """What the backward pass makes the gradients of."""

    exponentials: Tensor  # [m, V] bfloat16
    scales: Tensor  # [m] fp32
    rows: Tensor | slice  # m of the T, no row twice; or the first m

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "KeptTile":
        """The tile that `tensors` took apart."""
        exponentials, scales, rows = tensors
        return KeptTile(exponentials, scales, rows if rows.numel() else slice(0, scales.numel()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Exponentials, scales, and rows, [0] where they are the first m."""
        rows = self.rows if isinstance(self.rows, Tensor) else self.scales.new_empty(0, dtype=torch.int64)
        return self.exponentials, self.scales, rows

    def gradients(
        self,
        hidden: Tensor,  # [T, H] bfloat16
        weight: Tensor,  # [V, H] bfloat16
        bias: Tensor | None,  # [V]
        by: Tensor,  # the gradient of the loss, without dimensions
        wanted: Sequence[bool],  # the gradients of these three
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`by` times the gradients, in the types of the inputs."""
        scales = self.scales * by
        of_hidden = of_weight = of_bias = None
        if wanted[0]:
            of_hidden = hidden.new_zeros(hidden.shape)
            write_hidden_gradient(of_hidden, self.exponentials, scales, self.rows, weight)
        if wanted[1]:
            of_weight = product(self.exponentials.t(), scaled_rows(hidden, scales, self.rows), weight.dtype)
        if wanted[2] and bias is not None:
            of_bias = scaled_sum(self.exponentials, scales).to(bias.dtype)
        return of_hidden, of_weight, of_bias


def no_tile(
    weight: Tensor,  # [V, H]
    rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`KeptTile.tensors` of no rows; or what those of so many may look like to a tracer."""
    exponentials = new_tile(weight, rows)
    return exponentials, weight.new_empty(rows, dtype=torch.float32), weight.new_empty(0, dtype=torch.int64)


def new_tile(
    weight: Tensor,  # [V, H]
    rows: int,
) -> Tensor:  # [rows, V] bfloat16
    """Memory for a tile."""
    return weight.new_empty(rows, _stride(weight.shape[0]), dtype=torch.bfloat16)[:, : weight.shape[0]]


def _stride(vocabulary: int) -> int:
    """From row to row of a tile."""
    return -(-vocabulary // _STRIDE_MULTIPLE) * _STRIDE_MULTIPLE


class _Rows:
    """What is known of the n rows of a segment, each [n] fp32."""

    def __init__(self, count: int, device: torch.device):
        self.logps, self.sums, self.entropy, self.shifts, self.chosen = torch.empty(5, count, device=device)


class ExponentialTiles:
    """Works through segments, one tile of exponentials in memory."""

    def __init__(
        self,
        hidden: Tensor,  # [T, H] bfloat16
        weight: Tensor,  # [V, H] bfloat16
        targets: Tensor,  # [T]
        head: Head,
        options: LossOptions,
        wanted: tuple[bool, bool, bool],  # the gradients of hidden, weight and bias: one at least
        budget: int | None,
        tokens: Selection,
        keep: bool,  # the tile, which is then the only one
    ):
        self._hidden, self._weight, self._targets = hidden, weight, targets
        bias = None if head.bias is None else head.bias.float().contiguous()
        self._head, self._options, self._tokens = replace(head, bias=bias), options, tokens
        self._step = exponential_rows(weight.shape[0], hidden.device, budget)
        self._tile = new_tile(weight, min(self._step, tokens.rows.numel()))
        self._logit_bytes = tile_budget(hidden.device, budget) // _LOGITS_SHARE
        self._kept: KeptTile | None = None
        self._sums = None if keep else HeadGradients(hidden, weight, head.bias, wanted)

    def result(self) -> KeptTile | HeadGradients | None:
        """What holds the gradients; None: all are 0."""
        return self._sums or self._kept

    def segment(
        self,
        segment: Segment,
        offsets: Tensor,  # the segment's, int32
    ) -> Tensor:
        """Partials [sequences, len(PARTIALS)]; what the gradients are made of goes to `result`."""
        count = segment.stop - segment.start
        pieces = list(tiles(0, count, self._step, row_multiple(self._step)))
        rows = _Rows(count, self._hidden.device)
        for piece in pieces:
            self._fill(segment, piece, rows, anew=True)
        inputs = segment.inputs(self._tokens.inputs, offsets, rows.logps, rows.entropy)
        partials, d_logps, d_entropy = sequence_loss(inputs, self._options, True, selected=True)
        bad, live = self._looked_at(rows, d_logps)
        if bad.numel():
            self._mend(segment, pieces, rows, bad)
            partials, d_logps, d_entropy = sequence_loss(inputs, self._options, True, selected=True)
            _, live = self._looked_at(rows, d_logps)
        for piece in reversed(pieces):
            alive = None if live is None else live[piece]
            if alive is not None and not alive.any():
                continue
            if piece is not pieces[-1]:
                self._fill(segment, piece, rows, anew=False)
            scales = self._finish(segment, piece, rows, d_logps, d_entropy)
            mended = _inside(bad, piece)
            if mended.numel():
                mended = uploaded(mended, scales.device)
                self._tile[mended[scales[mended] == 0]] = 0  # 0 times what these may hold would not be 0
            self._add_gradients(segment.rows(self._tokens, piece), scales, alive)
        return partials

    def _hidden_rows(self, segment: Segment, piece: slice) -> Tensor:
        """The hidden states [t, H] of a piece, with contiguous rows."""
        hidden = self._hidden[segment.rows(self._tokens, piece)]
        return hidden if hidden.stride(1) == 1 else hidden.contiguous()

    def _row_arguments(self, segment: Segment, piece: slice) -> tuple[Tensor, Head]:
        """The targets [t] of a piece, and the head of its rows."""
        which = segment.rows(self._tokens, piece)
        return self._targets[which].contiguous(), self._head.of_rows(which)

    def _fill(self, segment: Segment, piece: slice, rows: _Rows, anew: bool) -> None:
        """Fills the tile; `anew`: finds the shifts first, and afterwards what the sums say."""
        hidden, (targets, head) = self._hidden_rows(segment, piece), self._row_arguments(segment, piece)
        kernels = in_triton("exponentials")
        shifts, chosen = rows.shifts[piece], rows.chosen[piece]
        if anew:
            known = self._known(slice(segment.start + piece.start, segment.start + piece.stop))
            subset = None if known is not None else self._subset_lse(hidden, targets, head)
            kernels.row_shifts_in_triton(hidden, self._weight, targets, head, known, subset, shifts)
        partials = self._exponentials(hidden, targets, head, shifts, chosen)
        if anew:
            found = rows.logps[piece], rows.sums[piece], rows.entropy[piece]
            kernels.combine_exponentials_in_triton(
                partials, chosen, shifts, targets, head, self._weight.shape[0], *found
            )

    def _known(self, computed: slice) -> Tensor | None:
        """Log-probabilities of the targets that are about the current ones."""
        inputs = self._tokens.inputs
        for logps in (inputs.old_logps, inputs.rollout_logps, inputs.ref_logps):
            if logps is not None:
                return logps[computed]
        return None

    def _subset_lse(self, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:  # [t]
        """The log-sum-exp of every 64th logit."""
        logits = accumulated_logits(hidden, self._weight[::SUBSET])
        bias = None if head.bias is None else head.bias[::SUBSET].contiguous()
        return row_statistics(logits, torch.zeros_like(targets), replace(head, bias=bias), False)[1]

    def _exponentials(
        self,
        hidden: Tensor,  # [t, H]
        targets: Tensor,  # [t]
        head: Head,
        shifts: Tensor,  # [t]
        chosen: Tensor,  # [t]: gets the targets' logits, as they were accumulated
    ) -> Tensor:  # [t, parts, 2]
        """Fills the tile; the sums of its rows, in parts. Where logits take their way through memory, it is fp32 ones
        of some columns at a time."""
        count, vocabulary = hidden.shape[0], self._weight.shape[0]
        fused = in_triton("head_product")
        block = fused.block_for(hidden, self._weight, head)
        if block is not None:
            tile = self._tile[:count]
            return fused.head_exponentials_in_triton(block, hidden, self._weight, targets, head, shifts, tile, chosen)
        most = max(self._logit_bytes // (4 * count) // _COLUMN_MULTIPLE, 1) * _COLUMN_MULTIPLE
        parts = list(tiles(0, vocabulary, most, _COLUMN_MULTIPLE))
        partials = hidden.new_empty(count, len(parts), 2, dtype=torch.float32)
        memory = hidden.new_empty(count * min(most, vocabulary), dtype=torch.float32)
        for part, columns in enumerate(parts):
            width = columns.stop - columns.start
            logits = memory[: count * width].view(count, width)
            accumulated_logits(hidden, self._weight[columns], out=logits)
            in_triton("exponentials").row_exponentials_in_triton(
                logits, columns.start, targets, head, shifts, None, self._tile, partials, part, chosen
            )
        return partials

    def _looked_at(self, rows: _Rows, d_logps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows whose sum is out of bounds, and flags [n] of those with a gradient (None: all), on the CPU.

        A GPU is waited for, once for both.
        """
        within = (rows.sums >= _SMALLEST_SUM) & (rows.sums <= _LARGEST_SUM)
        if not may_lack_gradient(self._tokens.inputs, self._options):
            return torch.nonzero(~within.cpu()).squeeze(1), None
        flags = torch.stack([within, d_logps != 0]).cpu()
        return torch.nonzero(~flags[0]).squeeze(1), flags[1]

    def _mend(self, segment: Segment, pieces: list[slice], rows: _Rows, bad: Tensor) -> None:
        """Computes rows once more from logits; those of the last piece are rewritten in the tile."""
        for piece in pieces:
            own = _inside(bad, piece)
            for some in own.split(max(1, self._logit_bytes // (4 * self._weight.shape[0]))):
                self._mend_rows(segment, piece, rows, uploaded(some, rows.sums.device), piece is pieces[-1])

    def _mend_rows(self, segment: Segment, piece: slice, rows: _Rows, some: Tensor, rewrite: bool) -> None:
        """`_mend` of rows [m] of a piece."""
        targets, head = self._row_arguments(segment, piece)
        targets, head = targets[some], head.of_rows(some)
        logits = accumulated_logits(self._hidden_rows(segment, piece)[some], self._weight)
        logps, lse, entropy = row_statistics(logits, targets, head, True)
        assert entropy is not None
        shifts = (lse * head.temperature).float()
        places = some + piece.start
        rows.logps[places], rows.entropy[places], rows.shifts[places], rows.sums[places] = logps, entropy, shifts, 1.0
        if rewrite:
            partials, chosen = torch.empty(some.numel(), 1, 2, device=some.device), torch.empty_like(shifts)
            in_triton("exponentials").row_exponentials_in_triton(
                logits, 0, targets, head, shifts, some, self._tile, partials, 0, chosen
            )

    def _finish(self, segment: Segment, piece: slice, rows: _Rows, d_logps: Tensor, d_entropy: Tensor) -> Tensor:  # [t]
        """Makes the filled tile the gradient of the logits, but for the scales that it gives."""
        targets, head = self._row_arguments(segment, piece)
        tile = self._tile[: targets.numel()]
        kernels, logps, sums = in_triton("exponentials"), rows.logps[piece], rows.sums[piece]
        if d_entropy.numel() == 0:
            return kernels.finish_rows_in_triton(tile, rows.chosen[piece], targets, head, logps, sums, d_logps[piece])
        return kernels.add_entropy_in_triton(
            tile, self._hidden_rows(segment, piece), self._weight, targets, head, rows.shifts[piece], logps, sums,
            rows.entropy[piece], d_logps[piece], d_entropy[piece],
        )  # fmt: skip

    def _add_gradients(
        self,
        which: Tensor | slice,  # the t rows of the tile, of the T
        scales: Tensor,  # [t]
        alive: Tensor | None,  # [t] bool on the CPU: those that have a gradient; None: all
    ) -> None:
        if alive is not None:
            which, scales = self._compacted(which, scales, alive)
        tile = self._tile[: scales.numel()]
        if self._sums is None:
            self._kept = KeptTile(tile, scales, which)
        else:
            self._sums.add_scaled(tile, scales, which)

    def _compacted(
        self, which: Tensor | slice, scales: Tensor, alive: Tensor
    ) -> tuple[Tensor | slice, Tensor]:  # [m] each
        """Moves rows with a gradient into the places of such without, where the products get shorter by that."""
        units = -(-int(alive.sum()) // ROW_MULTIPLE)
        count = units * ROW_MULTIPLE
        if count >= alive.numel():
            return which, scales
        sources = torch.nonzero(alive[count:]).squeeze(1) + count
        gaps = torch.nonzero(~alive[:count]).squeeze(1)[: sources.numel()]
        order = torch.arange(count).index_copy(0, gaps, sources)
        moves = uploaded(torch.cat([order, gaps, sources]), scales.device)
        order, gaps, sources = moves.split([count, gaps.numel(), gaps.numel()])
        together = max(1, self._logit_bytes // (2 * self._weight.shape[0]))
        for into, out_of in zip(gaps.split(together), sources.split(together), strict=True):
            self._tile[into] = self._tile[out_of]
        return order + which.start if isinstance(which, slice) else which[order], scales[order]


def _inside(
    places: Tensor,  # [.] int64, of a segment
    piece: slice,
) -> Tensor:
    """Those that lie in the piece, counted from its start."""
    return places[(places >= piece.start) & (places < piece.stop)] - piece.start
