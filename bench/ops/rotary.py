"""Rotary position embedding with QK-norm, forward and backward.

Letters: T tokens, Q / K query / key-value heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.core.contender import from_project
from bench.ops.layer import EPS, Kind, LayerBatch, layer_op
from thinktwice_kernels import reference, rotary


def call(op: Callable[..., Any], batch: LayerBatch) -> tuple[Tensor, ...]:
    counts = {"query_heads": batch.sizes.query_heads, "kv_heads": batch.sizes.kv_heads}
    return op(**batch.leaves, cos=batch.cos, sin=batch.sin, **counts, eps=EPS)


def _split(qkv: Tensor, query_heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(1, (query_heads + 2 * kv_heads, -1)).split([query_heads, kv_heads, kv_heads], 1)


def plain(
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


def liger(batch: LayerBatch) -> tuple[Tensor, ...]:
    """Two norms and a rotation, which takes heads as [1, heads, T, D]."""
    normed = from_project("liger_kernel.ops", "LigerRMSNormFunction").apply
    turned = from_project("liger_kernel.ops", "LigerRopeFunction").apply
    q, k, v = _split(batch.leaves["qkv"], batch.sizes.query_heads, batch.sizes.kv_heads)
    q, k = (normed(x, batch.leaves[name], EPS).transpose(0, 1)[None] for x, name in ((q, "q_norm"), (k, "k_norm")))
    q, k = turned(q, k, batch.cos[None], batch.sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v


ROTARY = Kind(
    rotary,
    call,
    reference.rotary,
    plain,
    liger,
    inputs=lambda rows, sizes: {"qkv": (rows.tokens, sizes.width), "q_norm": (sizes.dim,), "k_norm": (sizes.dim,)},
    outputs=lambda rows, sizes: [
        (rows.tokens, count, sizes.dim) for count in (sizes.query_heads, sizes.kv_heads, sizes.kv_heads)
    ],
    moved=lambda rows, sizes: 5 * sizes.width - sizes.kv_heads * sizes.dim,  # the values are not looked at again
)
OPS = [layer_op(ROTARY)]
