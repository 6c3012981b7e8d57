"""Rows of logits: how many exist at a time, the products around them, their log-probabilities and gradients.

What `linear_logprobs` and `linear_grpo_loss` share. The matrix products are torch's; the arithmetic on a row is C++
(csrc/loss/rows.cpp) on the CPU and Triton (triton/rows.py) on CUDA, in fp32, or in float64 for float64.

Letters: T tokens, V vocabulary, H hidden size, t rows of a tile of logits, m of them that have a gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinktwice_kernels.launch import accumulation_dtype, in_triton, op_in_cpp, uses_triton

# Bytes of logits and of their gradient. A GPU wants matrix products of thousands of rows; a CPU wants some hundreds,
# because each product also reads or writes the whole weight once.
DEFAULT_BUDGET = {"cpu": 256 << 20, "cuda": 4 << 30}
# Rows of a low-precision weight that are widened at a time where the device cannot accumulate in fp32 itself.
WIDENED_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """How a row of logits becomes a distribution: softmax of ``softcap(logits + bias) / temperature``."""

    bias: Tensor | None = None  # [V], any floating type
    temperature: float | Tensor = 1.0  # a number, or [t]
    softcap: float | None = None

    def of_rows(self, rows: Tensor | slice) -> "Head":
        """That of some of the rows."""
        if isinstance(self.temperature, float):
            return self
        return Head(self.bias, self.temperature[rows], self.softcap)


def head_of(bias: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float | None) -> Head:
    """The temperature is the tensor where there is one."""
    return Head(bias, temperature if temperatures is None else temperatures, softcap)


def row_statistics(
    logits: Tensor,  # [t, V], any floating type, last dimension contiguous
    targets: Tensor,  # [t] int64; one out of range gives NaN
    head: Head,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of the target, log-sum-exp, and entropy in nats of each row, in the accumulation type.

    NaN or +inf in a row gives NaN in that row's results; -inf is a token that cannot be drawn.
    """
    if uses_triton(logits):
        return in_triton("rows").row_statistics_in_triton(logits, targets, head, want_entropy)
    statistics = _in_cpp(logits, "row_statistics")
    logps, lse, entropy = statistics(logits, targets.contiguous(), *_encoded(head, logits), want_entropy)
    return logps, lse, entropy if want_entropy else None


def row_gradient(
    logits: Tensor,  # [t, V], as above
    targets: Tensor,  # [t] int64
    head: Head,
    lse: Tensor,  # [t], from row_statistics
    entropy: Tensor | None,  # [t], likewise; needed with d_entropy
    d_logps: Tensor | None,  # [t]
    d_entropy: Tensor | None,  # [t]
    rows: Tensor | None,  # [m] int64, rising: the rows to compute; None: all
    out: Tensor,  # [m, V], any floating type: row i gets the gradient of row rows[i]; or `logits` itself:
    # then row rows[i] is overwritten in its place
) -> None:
    """The gradient with respect to the logits as given; 0 in all of a row whose incoming gradients are 0."""
    if uses_triton(logits):
        in_triton("rows").row_gradient_in_triton(logits, targets, head, lse, entropy, d_logps, d_entropy, rows, out)
        return
    numbers = [None if x is None else x.double().contiguous() for x in (lse, entropy, d_logps, d_entropy)]
    rows = None if rows is None else rows.contiguous()
    gradient = _in_cpp(logits, "row_gradient")
    gradient(logits, targets.contiguous(), *_encoded(head, logits), *numbers, rows, out)


def _in_cpp(logits: Tensor, name: str) -> Any:
    if logits.device.type != "cpu":
        raise RuntimeError(
            f"thinktwice_kernels has no kernels for {logits.device.type}: move the tensors to the CPU or CUDA, or use "
            "thinktwice_kernels.reference"
        )
    return op_in_cpp("thinktwice_loss", name)


def _encoded(head: Head, logits: Tensor) -> tuple[Tensor | None, Tensor, float]:
    bias = None if head.bias is None else head.bias.to(accumulation_dtype(logits)).contiguous()
    temperature = head.temperature
    temperature = temperature.double().contiguous() if isinstance(temperature, Tensor) else _as_tensor(temperature)
    return bias, temperature, head.softcap or 0.0


@lru_cache
def _as_tensor(number: float) -> Tensor:  # [1] float64
    with torch.inference_mode(False):
        return torch.tensor([number], dtype=torch.float64, device="cpu")


def rows_per_tile(vocabulary: int, bytes_per_logit: int, device: torch.device, budget: int | None = None) -> int:
    """How many rows of logits fit into the budget (None: the device's default); at least one."""
    return max(1, tile_budget(device, budget) // max(1, vocabulary * bytes_per_logit))


def tile_budget(device: torch.device, budget: int | None) -> int:
    """Bytes of logits and their gradient that may exist at a time: the budget, or the device's default."""
    return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"]) if budget is None else budget


def tiles(start: int, stop: int, rows: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of at most `rows` that cover start to stop, as equal as they can be.

    All but the last are of a multiple of `multiple` rows, which `rows` is one of.
    """
    units = -(-(stop - start) // multiple)
    pieces = -(-units * multiple // rows)
    for piece in range(pieces):
        yield slice(
            start + units * piece // pieces * multiple,
            min(start + units * (piece + 1) // pieces * multiple, stop),
        )


def new_tile(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Memory for the logits of that many rows."""
    return hidden.new_empty(rows, weight.shape[0], dtype=accumulation_dtype(hidden, weight))


def bytes_per_logit(dtype: torch.dtype, out_dtype: torch.dtype) -> int:
    """Of a logit and its gradient, which overwrites it where the types are one."""
    return dtype.itemsize + (0 if out_dtype == dtype else out_dtype.itemsize)


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
            self._add_to_weight(d_logits, hidden[rows])
        if self._bias.numel():
            self._bias += d_logits.sum(0, dtype=self._bias.dtype)

    def add_scaled(
        self,
        d_logits: Tensor,  # [m, V] bfloat16, where Triton computes, as `hidden` and `weight`
        scales: Tensor,  # [m] fp32: what its rows are to be multiplied by
        rows: Tensor | slice,  # as above
    ) -> None:
        """`add` of rows times their scales, without a pass over them."""
        hidden, weight = self._inputs
        if self._wanted[0]:
            write_hidden_gradient(self._hidden, d_logits, scales, rows, weight)
        if self._wanted[1]:
            self._add_to_weight(d_logits, scaled_rows(hidden, scales, rows))
        if self._bias.numel():
            self._bias += scaled_sum(d_logits, scales)

    def _add_to_weight(self, d_logits: Tensor, hidden: Tensor) -> None:
        add_product(self._weight, d_logits, hidden, beta=int(self._weight_is_set))
        self._weight_is_set = True

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


def add_product(
    total: Tensor,  # [V, H], fp32 or float64: becomes beta * total + outputs.T @ hidden
    outputs: Tensor,  # [m, V], gradients
    hidden: Tensor,  # [m, H]
    beta: int,  # 0: whatever `total` held before is not read
) -> None:
    """Add up the gradient of a weight from those of its outputs; sums in the type of the total."""
    if _is_native(outputs, hidden):
        torch.addmm(total, outputs.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(outputs.t().to(total.dtype), hidden.to(total.dtype), beta=beta)


def write_hidden_gradient(
    out: Tensor,  # [T, H] bfloat16, of which these rows are written
    d_logits: Tensor,  # [m, V] bfloat16
    scales: Tensor,  # [m] fp32
    rows: Tensor | slice,  # m of the T
    weight: Tensor,  # [V, H] bfloat16
) -> None:
    """The gradient of hidden states from rows of d_logits that are to be multiplied by their scales."""
    total = product(d_logits, weight, torch.float32)
    if isinstance(rows, slice):
        in_triton("exponentials").scale_rows_in_triton(total, scales, None, out[rows], None)
    else:
        in_triton("exponentials").scale_rows_in_triton(total, scales, None, out, rows)


def scaled_rows(
    hidden: Tensor,  # [T, H]
    scales: Tensor,  # [m] fp32
    rows: Tensor | slice,  # m of the T
) -> Tensor:  # [m, H]
    """Rows times their scales; 0 where a scale is 0, whatever the row holds."""
    if isinstance(rows, slice):
        hidden, rows = hidden[rows], slice(None)
    if hidden.stride(1) != 1:
        hidden, rows = hidden[rows].contiguous(), slice(None)
    out = hidden.new_empty(scales.numel(), hidden.shape[1])
    places = None if isinstance(rows, slice) else rows
    in_triton("exponentials").scale_rows_in_triton(hidden, scales, places, out, None)
    return out


def scaled_sum(
    d_logits: Tensor,  # [m, V] bfloat16
    scales: Tensor,  # [m] fp32
) -> Tensor:  # [V] fp32
    """The sum of the rows times their scales."""
    high = scales.to(d_logits.dtype)
    parts = torch.stack([high, (scales - high).to(d_logits.dtype)])  # in 16 of fp32's 24 bits
    return product(parts, d_logits, torch.float32).sum(0)


def product(
    a: Tensor,  # [m, k] bfloat16
    b: Tensor,  # [k, n] bfloat16
    dtype: torch.dtype,
) -> Tensor:  # [m, n]
    """Sums in fp32, rounded to `dtype` at the end."""
    if not _is_native(a, b):
        return (a.float() @ b.float()).to(dtype)
    return a @ b if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)


def _is_native(*tensors: Tensor) -> bool:
    """Whether the device's products take these low-precision tensors and give the fp32 accumulators."""
    kinds = {tensor.dtype for tensor in tensors}
    return all(tensor.is_cuda for tensor in tensors) and kinds in ({torch.bfloat16}, {torch.float16})


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None) -> None:
    """Raise ValueError unless these are [T, H], [V, H], [V] and a positive number."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}: pass [T, H] and [V, H]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}: pass [V], here [{weight.shape[0]}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap is {softcap}: pass a positive number, or None for no cap")
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        raise ValueError(
            "hidden or weight is a sharded DTensor: call this inside the forward of the module that FSDP2 wraps, where "
            "the weight is whole, or pass weight.full_tensor()"
        )


def check_targets(targets: Tensor, tokens: int, vocabulary: int) -> None:
    """Raise ValueError unless these are T integers; on the CPU, unless each is in [0, V)."""
    if targets.shape != (tokens,):
        raise ValueError(f"targets has shape {list(targets.shape)}: pass one token id per row, [{tokens}]")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets has type {targets.dtype}: pass integer token ids")
    # On a GPU this look would wait for the device; there a wrong id gives NaN. A tracer's tensors have no values.
    looked_at = type(targets) is Tensor and targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and tokens:
        low, high = map(int, targets.aminmax())
        if not 0 <= low <= high < vocabulary:
            raise ValueError(
                f"targets lie between {low} and {high}: pass ids from 0 to {vocabulary - 1}, and for tokens without "
                "loss any of these"
            )


def temperature_arguments(temperature: float | Tensor, tokens: int) -> tuple[float, Tensor | None]:
    """The number, or 1 and a tensor [T], as the ops take them. Raises ValueError."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: pass a positive number")
        return float(temperature), None
    if temperature.requires_grad:
        raise ValueError("temperature wants a gradient, and none is computed for it: pass temperature.detach()")
    if temperature.dim() == 0:
        temperature = temperature.expand(tokens)
    if temperature.shape != (tokens,):
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}: pass a number or one value per row, [{tokens}]"
        )
    return 1.0, temperature.to(accumulation_dtype(temperature)).contiguous()
