"""What the ops of a decoder layer share in their benchmarks: sizes, inputs, contenders, and a copy as their ceiling.

Letters: T tokens, H hidden size, D head size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.core.ceilings import copy_of
from bench.core.contender import OURS, PLAIN, Contender, Outputs, compiled, needs
from bench.core.op import Case, Ceiling, Op, Size
from bench.ops.inputs import Rows, RowsCase, normals

EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    inner: int  # of an MLP
    query_heads: int
    kv_heads: int
    dim: int

    @property
    def width(self) -> int:
        """Of the product of queries, keys and values."""
        return (self.query_heads + 2 * self.kv_heads) * self.dim


SIZES = {
    "toy layer": Sizes(24, 2, 1, 8),
    "Qwen3-0.6B layer": Sizes(3072, 16, 8, 128),
    "Qwen3-4B layer": Sizes(9728, 32, 8, 128),
}
CASES: dict[Size, list[RowsCase]] = {
    "toy": [Case(Rows("toy layer", 0, 16, 64), only_targets=True, memory=False)],
    "cpu": [Case(Rows("Qwen3-0.6B layer", 0, 1024, 512), memory=False)],
    "gpu": [Case(Rows("Qwen3-4B layer", 0, 2560, tokens), "bf16") for tokens in (8192, 1024)],
}


@dataclass(frozen=True)
class LayerBatch:
    leaves: Mapping[str, Tensor]  # by the name of the op's argument
    sizes: Sizes
    cos: Tensor  # fp32 [T, D]
    sin: Tensor  # fp32 [T, D]
    incoming: tuple[Tensor, ...]  # one of each result


Call = Callable[[LayerBatch], tuple[Tensor, ...]]
Dimensions = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """One op of a layer.

    Args:
        op: ours.
        call: an op of its signature, ours or another, on a batch.
        reference: its definition.
        plain: as it is written without the library.
        liger: on a batch.
        inputs, outputs: sizes of its tensors; the width of the first input, [T, width], is what a copy moves.
        moved: numbers per token that forward and backward read and write, each tensor once.
    """

    op: Callable[..., Any]
    call: Callable[[Callable[..., Any], LayerBatch], tuple[Tensor, ...]]
    reference: Callable[..., Any]
    plain: Callable[..., Any]
    liger: Call
    inputs: Callable[[Rows, Sizes], dict[str, Dimensions]]
    outputs: Callable[[Rows, Sizes], list[Dimensions]]
    moved: Callable[[Rows, Sizes], int]


def outputs_of(call: Call, batch: LayerBatch) -> Outputs:
    results = call(batch)
    incoming = [flow.to(result.dtype) for flow, result in zip(batch.incoming, results, strict=True)]
    gradients = torch.autograd.grad(results, list(batch.leaves.values()), incoming)
    return {f"result {number}": result.detach() for number, result in enumerate(results)} | {
        f"d_{name}": gradient for name, gradient in zip(batch.leaves, gradients, strict=True)
    }


def layer_op(kind: Kind) -> Op:
    def own(op: Callable[..., Any]) -> Call:
        return partial(kind.call, op)

    def numbers(case: RowsCase) -> float:
        return float(case.shape.tokens * kind.moved(case.shape, SIZES[case.shape.head]) * case.dtype.itemsize)

    def copied(case: RowsCase) -> float:
        width = next(iter(kind.inputs(case.shape, SIZES[case.shape.head]).values()))[1]
        return float(2 * case.shape.tokens * width * case.dtype.itemsize)

    return Op(
        name=kind.op.__name__,
        cases=CASES,
        inputs=partial(_batch, kind),
        truth=partial(_truth, own(kind.reference)),
        contenders={
            OURS: Contender(partial(outputs_of, own(kind.op))),
            PLAIN: Contender(partial(outputs_of, own(kind.plain))),
            "torch.compile": Contender(lambda batch: outputs_of(own(compiled(kind.plain)), batch), compiled=True),
            "liger": Contender(partial(outputs_of, kind.liger), needs("liger_kernel", "cuda")),
        },
        work=numbers,
        unit="GB/s",
        ceiling=Ceiling("copy of the input", lambda batch: copy_of(next(iter(batch.leaves.values()))), copied),
        short=True,
    )


def _batch(kind: Kind, case: RowsCase, device: torch.device) -> LayerBatch:
    sizes, (normal, _) = SIZES[case.shape.head], normals(device)
    leaves = {
        name: normal(*shape) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in kind.inputs(case.shape, sizes).items()
    }
    frequencies = 1e6 ** (-torch.arange(0, sizes.dim, 2, device=device) / sizes.dim)
    angles = torch.arange(case.shape.tokens, device=device)[:, None] * frequencies.repeat(2)
    return LayerBatch(
        {name: leaf.to(case.dtype).requires_grad_() for name, leaf in leaves.items()},
        sizes,
        angles.cos(),
        angles.sin(),
        tuple(normal(*shape).to(case.dtype) for shape in kind.outputs(case.shape, sizes)),
    )


def _truth(call: Call, batch: LayerBatch) -> Outputs:
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in batch.leaves.items()}
    return outputs_of(call, LayerBatch(wide, batch.sizes, batch.cos, batch.sin, batch.incoming))
