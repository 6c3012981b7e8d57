"""RMS norm with the residual's addition, forward and backward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.core.contender import from_project
from bench.ops.layer import EPS, Kind, LayerBatch, layer_op
from thinktwice_kernels import reference, rms_norm


def call(op: Callable[..., Any], batch: LayerBatch) -> tuple[Tensor, ...]:
    return op(**batch.leaves, eps=EPS)


def liger(batch: LayerBatch) -> tuple[Tensor, ...]:
    x, residual, weight = batch.leaves.values()
    return from_project("liger_kernel.ops", "LigerFusedAddRMSNormFunction").apply(x, residual, weight, EPS)


NORM = Kind(
    rms_norm,
    call,
    reference.rms_norm,
    reference.rms_norm,
    liger,
    inputs=lambda rows, sizes: {
        "x": (rows.tokens, rows.hidden),
        "residual": (rows.tokens, rows.hidden),
        "weight": (rows.hidden,),
    },
    outputs=lambda rows, sizes: [(rows.tokens, rows.hidden)] * 2,
    # x, residual, y, sum; gradients of y and of the sum, the sum, its gradient
    moved=lambda rows, sizes: 8 * rows.hidden,
)
OPS = [layer_op(NORM)]
