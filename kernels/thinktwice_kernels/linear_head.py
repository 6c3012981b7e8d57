"""`linear_logprobs` tile by tile: forward, and backward by computing each tile of logits again.

Letters: T tokens, V vocabulary, H hidden size, m rows with a gradient.
"""

import torch
from torch import Tensor

from thinktwice_kernels.backends import Head, backend_of
from thinktwice_kernels.packed import accumulation_dtype
from thinktwice_kernels.products import HeadGradients, accumulated_logits, gradient_dtype
from thinktwice_kernels.tiles import rows_per_tile, tiles


def of_rows(head: Head, rows: Tensor | slice) -> Head:
    """The head of some of the rows."""
    if isinstance(head.temperature, float):
        return head
    return Head(head.bias, head.temperature[rows], head.softcap)


def logprobs_forward(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T] int64
    head: Head,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], log-sum-exp [T], and entropy [T] or, unwanted, [0]."""
    tokens, dtype = hidden.shape[0], accumulation_dtype(hidden, weight)
    logps, lse = (hidden.new_empty(tokens, dtype=dtype) for _ in range(2))
    entropy = hidden.new_empty(tokens if want_entropy else 0, dtype=dtype)
    backend = backend_of(hidden)
    step = rows_per_tile(weight.shape[0], dtype.itemsize, hidden.device)
    buffer = new_tile(hidden, weight, min(step, tokens))
    for rows in tiles(0, tokens, step):
        logits = accumulated_logits(hidden[rows], weight, out=buffer[: rows.stop - rows.start])
        logps[rows], lse[rows], tile_entropy = backend.row_statistics(
            logits, targets[rows], of_rows(head, rows), want_entropy
        )
        if tile_entropy is not None:
            entropy[rows] = tile_entropy
    return logps, lse, entropy


def logprobs_backward(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T] int64
    head: Head,
    lse: Tensor,  # [T]
    entropy: Tensor | None,  # [T], needed with d_entropy
    d_logps: Tensor | None,  # [T]
    d_entropy: Tensor | None,  # [T]
    wanted: tuple[bool, bool, bool],  # the gradients of hidden, weight and bias
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden [T, H], weight [V, H] and bias [V], as `HeadGradients.result` gives them.

    Rows without incoming gradient cost nothing.
    """
    gradients = HeadGradients(hidden, weight, head.bias, wanted)
    flows = [gradient != 0 for gradient in (d_logps, d_entropy) if gradient is not None]
    if not flows:
        return gradients.result()
    active = torch.nonzero(torch.stack(flows).any(0)).squeeze(1)
    backend = backend_of(hidden)
    dtype, out_dtype = accumulation_dtype(hidden, weight), gradient_dtype(hidden, weight)
    step = rows_per_tile(weight.shape[0], bytes_per_logit(dtype, out_dtype), hidden.device)
    buffer = new_tile(hidden, weight, min(step, active.numel()))
    for piece in tiles(0, active.numel(), step):
        rows: Tensor | slice = piece if active.numel() == hidden.shape[0] else active[piece]
        logits = accumulated_logits(hidden[rows], weight, out=buffer[: piece.stop - piece.start])
        d_logits = logits if out_dtype == dtype else torch.empty_like(logits, dtype=out_dtype)
        backend.row_gradient(
            logits,
            targets[rows],
            of_rows(head, rows),
            lse[rows],
            None if entropy is None else entropy[rows],
            None if d_logps is None else d_logps[rows],
            None if d_entropy is None else d_entropy[rows],
            None,
            d_logits,
        )
        gradients.add(d_logits, rows)
    return gradients.result()


def new_tile(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Memory for the logits of that many rows."""
    return hidden.new_empty(rows, weight.shape[0], dtype=accumulation_dtype(hidden, weight))


def bytes_per_logit(dtype: torch.dtype, out_dtype: torch.dtype) -> int:
    """Of a logit and its gradient, which overwrites it where the types are one."""
    return dtype.itemsize + (0 if out_dtype == dtype else out_dtype.itemsize)
