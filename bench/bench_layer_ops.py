"""The ops of a decoder layer, forward and backward: RMS norm with the residual's addition, SwiGLU, rotary with QK-norm.

Letters: T tokens, H hidden size, F inner size of an MLP, Q / K query / key-value heads, D head size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import OURS, PLAIN, Ceiling, Contender, Op, Outputs
from bench.peers import compiled, from_project, needs
from bench.replay import CLOCK, Measured
from bench.shapes import Case, layer_cases
from thinktwice_kernels import reference, rms_norm, rotary, swiglu

EPS = 1e-6
Kind = Literal["norm", "gate", "rotary"]


@dataclass(frozen=True)
class Sizes:
    inner: int  # F
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


@dataclass(frozen=True)
class LayerBatch:
    leaves: Mapping[str, Tensor]  # by the name of the op's argument
    sizes: Sizes
    cos: Tensor  # fp32 [T, D]
    sin: Tensor  # fp32 [T, D]
    incoming: tuple[Tensor, ...]  # one of each result


Call = Callable[[LayerBatch], tuple[Tensor, ...]]


def layer_batch(kind: Kind, case: Case, device: torch.device) -> LayerBatch:
    sizes, generator = SIZES[case.head], torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tokens, hidden = case.tokens, case.hidden
    inputs: dict[str, tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    if kind == "norm":
        inputs = {"x": (tokens, hidden), "residual": (tokens, hidden), "weight": (hidden,)}
        outputs = [(tokens, hidden)] * 2
    elif kind == "gate":
        inputs, outputs = {"gate_up": (tokens, 2 * sizes.inner)}, [(tokens, sizes.inner)]
    else:
        inputs = {"qkv": (tokens, sizes.width), "q_norm": (sizes.dim,), "k_norm": (sizes.dim,)}
        outputs = [(tokens, count, sizes.dim) for count in (sizes.query_heads, sizes.kv_heads, sizes.kv_heads)]
    leaves = {name: normal(*shape) + (1.0 if len(shape) == 1 else 0.0) for name, shape in inputs.items()}
    frequencies = 1e6 ** (-torch.arange(0, sizes.dim, 2, device=device) / sizes.dim)
    angles = torch.arange(tokens, device=device)[:, None] * frequencies.repeat(2)
    return LayerBatch(
        {name: leaf.to(case.dtype).requires_grad_() for name, leaf in leaves.items()},
        sizes,
        angles.cos(),
        angles.sin(),
        tuple(normal(*shape).to(case.dtype) for shape in outputs),
    )


def outputs_of(call: Call, batch: LayerBatch) -> Outputs:
    results = call(batch)
    incoming = [flow.to(result.dtype) for flow, result in zip(batch.incoming, results, strict=True)]
    gradients = torch.autograd.grad(results, list(batch.leaves.values()), incoming)
    return {f"result {number}": result.detach() for number, result in enumerate(results)} | {
        f"d_{name}": gradient for name, gradient in zip(batch.leaves, gradients, strict=True)
    }


def truth(call: Call, batch: LayerBatch) -> Outputs:
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in batch.leaves.items()}
    return outputs_of(call, LayerBatch(wide, batch.sizes, batch.cos, batch.sin, batch.incoming))


def norm(op: Callable[..., Any], batch: LayerBatch) -> tuple[Tensor, ...]:
    return op(**batch.leaves, eps=EPS)


def liger_norm(batch: LayerBatch) -> tuple[Tensor, ...]:
    x, residual, weight = batch.leaves.values()
    return from_project("liger_kernel.ops", "LigerFusedAddRMSNormFunction").apply(x, residual, weight, EPS)


def gate(op: Callable[..., Any], batch: LayerBatch) -> tuple[Tensor, ...]:
    return (op(batch.leaves["gate_up"]),)


def plain_gate(gate_up: Tensor) -> Tensor:
    gates, up = gate_up.chunk(2, -1)
    return F.silu(gates) * up


def liger_gate(batch: LayerBatch) -> tuple[Tensor, ...]:
    return (from_project("liger_kernel.ops", "LigerFusedGateUpSiLUMulFunction").apply(batch.leaves["gate_up"]),)


def heads(op: Callable[..., Any], batch: LayerBatch) -> tuple[Tensor, ...]:
    counts = {"query_heads": batch.sizes.query_heads, "kv_heads": batch.sizes.kv_heads}
    return op(**batch.leaves, cos=batch.cos, sin=batch.sin, **counts, eps=EPS)


def _split(qkv: Tensor, query_heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(1, (query_heads + 2 * kv_heads, -1)).split([query_heads, kv_heads, kv_heads], 1)


def plain_heads(
    qkv: Tensor,  # [T, (Q + 2 * K) * D]
    q_norm: Tensor,  # [D]
    k_norm: Tensor,  # [D]
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
    query_heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """As transformers does it."""
    q, k, v = _split(qkv, query_heads, kv_heads)
    cos, sin = cos.to(qkv.dtype)[:, None], sin.to(qkv.dtype)[:, None]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        normed = reference.rms_norm(x, weight, eps)
        assert isinstance(normed, Tensor)
        low, high = normed.chunk(2, -1)
        return normed * cos + torch.cat((-high, low), -1) * sin

    return turned(q, q_norm), turned(k, k_norm), v


def liger_heads(batch: LayerBatch) -> tuple[Tensor, ...]:
    """Two norms and a rotation, which takes heads as [1, heads, T, D]."""
    normed = from_project("liger_kernel.ops", "LigerRMSNormFunction").apply
    turned = from_project("liger_kernel.ops", "LigerRopeFunction").apply
    q, k, v = _split(batch.leaves["qkv"], batch.sizes.query_heads, batch.sizes.kv_heads)
    q, k = (normed(x, batch.leaves[name], EPS).transpose(0, 1)[None] for x, name in ((q, "q_norm"), (k, "k_norm")))
    q, k = turned(q, k, batch.cos[None], batch.sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v


def contenders(
    call: Callable[..., tuple[Tensor, ...]], own: Callable[..., Any], plain: Callable[..., Any], liger: Call
) -> dict[str, Contender]:
    def squeezed(batch: LayerBatch) -> tuple[Tensor, ...]:
        return call(compiled(plain), batch)

    return {
        OURS: Contender(partial(outputs_of, partial(call, own))),
        PLAIN: Contender(partial(outputs_of, partial(call, plain))),
        "torch.compile": Contender(partial(outputs_of, squeezed), compiled=True),
        "liger": Contender(partial(outputs_of, liger), needs("liger_kernel", "cuda")),
    }


def moved(kind: Kind, case: Case) -> float:
    """Bytes that forward and backward read and write, each tensor [T, ...] once."""
    sizes = SIZES[case.head]
    elements = {
        "norm": 8 * case.hidden,  # x, residual, y, sum; gradients of y and of the sum, the sum, its gradient
        "gate": 8 * sizes.inner,  # gate, up, y; gradient of y, gate, up, gradients of both
        "rotary": 5 * sizes.width - sizes.kv_heads * sizes.dim,  # the values are not looked at again
    }[kind]
    return float(case.tokens * elements * case.dtype.itemsize)


def _copy(batch: LayerBatch) -> Callable[[], Any]:
    source = next(iter(batch.leaves.values())).detach()
    return partial(torch.empty_like(source).copy_, source)


def _copied(kind: Kind, case: Case) -> float:
    sizes = SIZES[case.head]
    width = {"norm": case.hidden, "gate": 2 * sizes.inner, "rotary": sizes.width}[kind]
    return float(2 * case.tokens * width * case.dtype.itemsize)


def _op(kind: Kind, own: Callable[..., Any], found: dict[str, Contender], definition: Call) -> Op:
    return Op(
        name=own.__name__,
        module=__name__,
        cases=layer_cases,
        inputs=partial(layer_batch, kind),
        truth=partial(truth, definition),
        contenders=found,
        work=partial(moved, kind),
        unit="GB/s",
        ceiling=Ceiling("copy of the input", _copy, partial(_copied, kind)),
        short=True,
    )


OPS = [
    _op(
        "norm",
        rms_norm,
        contenders(norm, rms_norm, reference.rms_norm, liger_norm),
        partial(norm, reference.rms_norm),
    ),
    _op("gate", swiglu, contenders(gate, swiglu, plain_gate, liger_gate), partial(gate, reference.swiglu)),
    _op("rotary", rotary, contenders(heads, rotary, plain_heads, liger_heads), partial(heads, reference.rotary)),
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_layer_ops(benchmark: Any, measured: Measured) -> None:
    measured.replay(benchmark)
