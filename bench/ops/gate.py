"""SwiGLU, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.core.contender import from_project
from bench.ops.layer import Kind, LayerBatch, layer_op
from thinktwice_kernels import reference, swiglu


def call(op: Callable[..., Any], batch: LayerBatch) -> tuple[Tensor, ...]:
    return (op(batch.leaves["gate_up"]),)


def plain(
    gate_up: Tensor,  # [T, twice the inner size]
) -> Tensor:
    gates, up = gate_up.chunk(2, -1)
    return F.silu(gates) * up


def liger(batch: LayerBatch) -> tuple[Tensor, ...]:
    return (from_project("liger_kernel.ops", "LigerFusedGateUpSiLUMulFunction").apply(batch.leaves["gate_up"]),)


GATE = Kind(
    swiglu,
    call,
    reference.swiglu,
    plain,
    liger,
    inputs=lambda rows, sizes: {"gate_up": (rows.tokens, 2 * sizes.inner)},
    outputs=lambda rows, sizes: [(rows.tokens, sizes.inner)],
    moved=lambda rows, sizes: 8 * sizes.inner,  # gate, up, y; gradient of y, gate, up, gradients of both
)
OPS = [layer_op(GATE)]
