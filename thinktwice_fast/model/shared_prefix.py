"""Attention of a packed row whose segments may continue a shared prefix: the prompt of a group, its responses.

A row is cut into segments, one after another. Each attends causally to itself; one that names a prefix also sees all of
that earlier segment, and its positions count on from it. A response sees its prompt so, and a sequence with nothing to
share is a segment without prefix.

``prefix_attention`` is the C++ extension's (``csrc/cpu/prefix_attention.cpp``); ``in_torch`` says the same in plain
torch, in every type and on every device; ``flash.py`` has it for a GPU.

Letters: T tokens, S segments, Hq / Hkv query / key-value heads, D head size.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from thinktwice_fast.model.csrc import ops

_forward = ops.prefix_attention.default
_backward = ops.prefix_attention_backward.default


def prefix_attention(
    q: Tensor,  # [T, Hq, D], any strides but the last
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    lengths: Tensor,  # int64 [S], tokens of each segment; they add up to T
    prefix: Tensor,  # int64 [S], the earlier segment that each continues, itself without a prefix; -1 = none
    scale: float,
    window: int = 0,  # positions seen by a query, its own included; 0 = all
) -> Tensor:  # [T, Hq, D]
    """Attention of every segment over its prefix and, causally, itself; on the CPU, differentiable once.

    The i-th token of a segment whose prefix has P tokens sits at position p = P + i. It sees the positions
    max(0, p - window + 1) .. p of prefix and segment taken as one sequence:

        out = softmax(scale * q k^T) v

    float32, bfloat16 or float16, computed in float32 over chunks of 64 positions with an online softmax: a row's bits
    are those of ``csrc.paged_attention`` for the same sequence, whatever else the packed row holds. The gradients
    (FlashAttention-2, Dao 2023, algorithm 2) add up in an order that the segments alone decide, so their bits do not
    depend on the number of threads.

    Raises:
        RuntimeError: shapes, types or segments do not match, or a second derivative is asked for.
    """
    return _forward(q, k, v, lengths, prefix, scale, window)[0]


def _forward_fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("prefix_attention has no second derivative: drop create_graph=True")
    if grad is None:
        return (None,) * 7
    if grad.stride(-1) != 1:  # that of a sum is expanded
        grad = grad.contiguous()
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None, None)


torch.library.register_fake("thinktwice::prefix_attention", _forward_fake)
torch.library.register_fake("thinktwice::prefix_attention_backward", _backward_fake)
torch.library.register_autograd("thinktwice::prefix_attention", _gradients, setup_context=_remember)


def in_torch(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    lengths: Sequence[int],  # [S]
    prefix: Sequence[int],  # [S]
    scale: float,
    window: int = 0,
) -> Tensor:  # [T, Hq, D]
    """See ``prefix_attention``; segment by segment, with a mask of its queries by its keys."""
    places = spans(lengths)
    outs = []
    for own, before in zip(places, prefix, strict=True):
        seen = [own] if before < 0 else [places[before], own]
        keys, values = (torch.cat([x[span] for span in seen]).transpose(0, 1)[None] for x in (k, v))
        queries = q[own].transpose(0, 1)[None]  # [1, Hq, Q, D]
        count, total = queries.shape[2], keys.shape[2]
        mask = None
        if before >= 0 or 0 < window < total:
            position = torch.arange(total, device=q.device)
            age = position[total - count :, None] - position
            mask = (age >= 0) & (age < (window or total))
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def spans(lengths: Sequence[int]) -> list[slice]:
    """Where each segment lies in the row."""
    ends = list(accumulate(lengths, initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]
