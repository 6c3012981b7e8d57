"""Inputs for the ops of a decoder layer, and results held against float64; for the CPU, the interpreter and a GPU.

Letters: T tokens, R rows, H elements of a norm, F elements of a gate, Q / K query / key-value heads, D head size;
of a merge Q queries, H heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.kernels.accuracy import Tensors, assert_accurate, error, normal, poisoned_memory
from thinktwice_kernels import merge_attention, reference, rms_norm, rotary, swiglu

EPS = 1e-5
Op = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """What an op is called with."""

    op: Op
    definition: Op
    plain: Op  # as models do it, in the type of the inputs
    leaves: Mapping[str, Tensor]  # float64; what gets a gradient
    options: Mapping[str, Any] = field(default_factory=dict)


def norm_case(*shape: int, residual: bool = False, cast_first: bool = True) -> Case:
    leaves = {"x": 3 * normal(*shape), "weight": 1 + 0.3 * normal(shape[-1], seed=1)}
    if residual:
        leaves["residual"] = normal(*shape, seed=2)
    definition = reference.rms_norm  # as transformers' modules have it, in their type too
    return Case(rms_norm, definition, definition, leaves, {"eps": EPS, "cast_first": cast_first})


def gate_case(*shape: int) -> Case:
    return Case(swiglu, reference.swiglu, plain_gate, {"gate_up": 3 * normal(*shape)})


def rotary_case(tokens: int, heads: tuple[int, int, int], norms: str = "none", shared_angles: bool = False) -> Case:
    """`heads` are Q, K and D. The angles of a head's halves differ: each must be taken from its own place."""
    query_heads, kv_heads, dim = heads
    leaves = {"qkv": 2 * normal(tokens, (query_heads + 2 * kv_heads) * dim)}
    for name, count in (("q_norm", query_heads), ("k_norm", kv_heads)):
        if norms != "none":
            leaves[name] = 1 + 0.3 * normal(dim * (count if norms == "all heads" else 1), seed=count)
    cos, sin = normal(2, tokens, dim // 2 if shared_angles else dim, seed=3)
    options = {"cos": cos, "sin": sin, "query_heads": query_heads, "kv_heads": kv_heads, "eps": EPS}
    return Case(rotary, reference.rotary, plain_rotary, leaves, options)


def plain_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def plain_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_heads: int,
    kv_heads: int,
    eps: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers' attentions do it, the tables rounded to the type of the rest."""
    q, k, v = qkv.unflatten(1, (query_heads + 2 * kv_heads, -1)).split([query_heads, kv_heads, kv_heads], 1)
    q, k = (
        x if norm is None else reference.rms_norm(x.flatten(1).unflatten(1, (-1, len(norm))), norm, eps).view(x.shape)  # type: ignore
        for x, norm in ((q, q_norm), (k, k_norm))
    )
    double = 1 if cos.shape[1] == q.shape[2] else 2
    cos, sin = (table.repeat(1, double).to(qkv.dtype) for table in (cos, sin))
    return *apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1), v


CASES = {
    "norm": norm_case(37, 96),
    "norm, two elements": norm_case(5, 2),
    "norm, odd": norm_case(3, 7, 33, cast_first=False),
    "norm, wide": norm_case(3, 5120),
    "norm of a vector": norm_case(40),
    "norm, one row": norm_case(1, 64, residual=True),
    "norm, no rows": norm_case(0, 64, residual=True),
    "add and norm": norm_case(37, 96, residual=True),
    "add and norm, cast last": norm_case(2, 9, 40, residual=True, cast_first=False),
    "gate": gate_case(37, 96),
    "gate, odd": gate_case(2, 3, 14),
    "gate, wide": gate_case(3, 2 * 2500),
    "gate, no rows": gate_case(0, 12),
    "rotary": rotary_case(11, (6, 2, 12)),
    "rotary, shared angles": rotary_case(11, (4, 4, 16), shared_angles=True),
    "rotary, each head normed": rotary_case(11, (6, 2, 12), "each head"),
    "rotary, all heads normed": rotary_case(11, (6, 2, 12), "all heads", shared_angles=True),
    "rotary, one token": rotary_case(1, (3, 1, 6), "each head"),
    "rotary, no tokens": rotary_case(0, (3, 1, 6), "all heads"),
    "rotary, wide": rotary_case(5, (16, 8, 64), "each head"),
}


def run(function: Op, case: Case, dtype: torch.dtype, device: torch.device, values: Mapping[str, Tensor]) -> Tensors:
    """Outputs and gradients for leaves of these values in this type; the angles are fp32, or float64 with those."""
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in values.items()}
    wide = torch.promote_types(dtype, torch.float32)
    options = {name: x.to(device, wide) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    found = function(**leaves, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    incoming = [normal(*x.shape, seed=7 + i).to(device, dtype) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return {f"output {i}": x.detach() for i, x in enumerate(outputs)} | {
        f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def check(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """fp32 below 1e-5; narrow types no more than twice as far from float64 as what plain torch makes of them."""
    rounded = {name: x.to(dtype).double() for name, x in case.leaves.items()}
    want = run(case.definition, case, torch.float64, torch.device("cpu"), rounded)
    with poisoned_memory(device):
        got = run(case.op, case, dtype, device, rounded)
    assert {name: (x.shape, dtype) for name, x in want.items()} == {name: (x.shape, x.dtype) for name, x in got.items()}
    narrow = dtype.itemsize < 4
    assert_accurate(got, want, run(case.plain, case, dtype, torch.device("cpu"), rounded) if narrow else None)
    assert dtype != torch.float64 or all(error(got[name], value) < 1e-12 for name, value in want.items())


def check_merge(dtype: torch.dtype, device: torch.device, dim: int = 24) -> None:
    """Of queries that have other keys or none, and of rows that lie further apart, held against the definition."""
    queries, heads = 37, 3
    out, other = normal(2, queries, heads, dim).to(dtype).double()
    lse, other_lse = 20 * normal(2, heads, queries, seed=1)
    other_lse[0, :5], other_lse[2, 30:] = torch.inf, -torch.inf
    none = other_lse.isinf()
    both = torch.stack([lse, other_lse.masked_fill(none, -torch.inf)])
    weights = both.softmax(0).transpose(1, 2)[..., None]
    want = {"out": weights[0] * out + weights[1] * other, "lse": both.logsumexp(0)}
    other.masked_fill_(none.T[..., None], torch.nan)  # not looked at
    kind = torch.promote_types(dtype, torch.float32)
    wide = torch.zeros(queries, 2, heads, dim, dtype=dtype, device=device)
    row = torch.zeros(heads, queries + 3, dtype=kind, device=device)
    got = {"out": wide[:, 1].copy_(out), "lse": row[:, 3:].copy_(lse)}
    merge_attention(got["out"], got["lse"], other.to(device, dtype), other_lse.to(device, kind))
    assert not wide[:, 0].any() and not row[:, :3].any()
    assert torch.equal(got["out"].cpu()[none.T], out.to(dtype)[none.T])
    assert torch.equal(got["lse"].cpu()[none], lse.to(kind)[none])
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
    assert error(got["out"].cpu(), want["out"]) < limit[dtype] and error(got["lse"].cpu(), want["lse"]) < limit[kind]
