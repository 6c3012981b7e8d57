"""The matrix products of an output layer: logits from hidden states, and the gradients back.

Letters: T tokens, V vocabulary, H hidden size, t rows of a tile.
"""

import torch
from torch import Tensor

from thinktwice_kernels.packed import accumulation_dtype
from thinktwice_kernels.tiles import tiles

# Rows of a low-precision weight that are widened at a time where the device cannot accumulate in fp32 itself.
WIDENED_ROWS = 8192


def accumulated_logits(
    hidden: Tensor,  # [t, H]
    weight: Tensor,  # [V, H]
    out: Tensor | None = None,  # [t, V], fp32 or float64
) -> Tensor:  # [t, V], fp32 or float64
    """The accumulators of ``hidden @ weight.T``, not rounded to the type of the inputs."""
    dtype = accumulation_dtype(hidden, weight)
    if out is None:
        out = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=dtype)
    if _is_native(hidden, weight):
        torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
    elif weight.dtype == dtype:
        torch.mm(hidden.to(dtype), weight.t(), out=out)
    else:
        wide = hidden.to(dtype)
        for rows in tiles(0, weight.shape[0], WIDENED_ROWS):
            out[:, rows] = wide @ weight[rows].to(dtype).t()
    return out


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which the gradient of the logits enters the products: the inputs' own where that is bfloat16.

    float16 is left out: gradients of 1e-7 a token are below what it can hold.
    """
    if _is_native(hidden, weight) and weight.dtype == torch.bfloat16:
        return torch.bfloat16
    return accumulation_dtype(hidden, weight)


def hidden_gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The hidden states' own type, but for float16, in which a gradient is kept only once it has been scaled."""
    return accumulation_dtype(hidden, weight) if hidden.dtype == torch.float16 else hidden.dtype


class HeadGradients:
    """The gradients of hidden states, weight and bias, added up over tiles; what is not wanted stays empty, [0].

    The weight's and the bias's add up in fp32 (float64 if an input is). Rows that no tile adds are 0.
    """

    def __init__(
        self,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        wanted: tuple[bool, bool, bool],  # of these three
    ):
        dtype = accumulation_dtype(hidden, weight)
        self._inputs = hidden, weight
        self._wanted = wanted
        of_hidden = hidden_gradient_dtype(hidden, weight)
        self._hidden = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=of_hidden)
        self._weight = weight.new_empty(weight.shape if wanted[1] else 0, dtype=dtype)
        self._bias = weight.new_zeros(weight.shape[0] if wanted[2] and bias is not None else 0, dtype=dtype)
        self._weight_is_set = False

    def add(
        self,
        d_logits: Tensor,  # [m, V], in `gradient_dtype`
        rows: Tensor | slice,  # m of the T rows, no row twice and none that was added before
    ) -> None:
        hidden, weight = self._inputs
        if self._wanted[0]:
            self._hidden[rows] = _hidden_gradient(d_logits, weight).to(self._hidden.dtype)
        if self._wanted[1]:
            _add_product(self._weight, d_logits, hidden[rows], beta=int(self._weight_is_set))
            self._weight_is_set = True
        if self._bias.numel():
            self._bias += d_logits.sum(0, dtype=self._bias.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden [T, H] in `hidden_gradient_dtype`; of weight [V, H] and bias [V] in the type they add up in."""
        if not self._weight_is_set:
            self._weight.zero_()
        return self._hidden, self._weight, self._bias


def _hidden_gradient(
    d_logits: Tensor,  # [m, V]
    weight: Tensor,  # [V, H]
) -> Tensor:  # [m, H]
    if d_logits.dtype == weight.dtype:
        return d_logits @ weight
    gradient = d_logits.new_zeros(d_logits.shape[0], weight.shape[1])
    for rows in tiles(0, weight.shape[0], WIDENED_ROWS):
        gradient.addmm_(d_logits[:, rows], weight[rows].to(d_logits.dtype))
    return gradient


def _add_product(
    total: Tensor,  # [V, H], fp32 or float64: becomes beta * total + d_logits.T @ hidden
    d_logits: Tensor,  # [m, V]
    hidden: Tensor,  # [m, H]
    beta: int,  # 0: whatever `total` held before is not read
) -> None:
    if d_logits.dtype == total.dtype:
        total.addmm_(d_logits.t(), hidden.to(total.dtype), beta=beta)
    else:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)


def _is_native(*tensors: Tensor) -> bool:
    """Whether the device's products take these low-precision tensors and give the fp32 accumulators."""
    kinds = {tensor.dtype for tensor in tensors}
    return all(tensor.is_cuda for tensor in tensors) and kinds in ({torch.bfloat16}, {torch.float16})
