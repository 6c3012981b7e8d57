"""From the joint product of queries, keys and values to what attention takes: split, normed, rotated.

    q, k, v = split(qkv);   rotate(norm(q)), rotate(norm(k)), v
    rotate(x) = (low cos_low - high sin_low, high cos_high + low sin_high)   of a head's halves low and high

RMS norms over each head or over all of them; rotary positions (Su et al. 2021, arXiv 2104.09864).

Letters: T tokens, Q / K query / key-value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels import native
from thinktwice_kernels.launch import accumulation_dtype, fake_gradient, first_order_only, op, uses_triton
from thinktwice_kernels.norm import norm_gradients_in_torch, rms_norm_reference
from thinktwice_kernels.triton.rotary import fits_registers, rotary_gradients_in_triton, rotary_in_triton


def rotary(
    qkv: Tensor,  # [T, (Q + 2 * K) * D], a token's queries, keys and values; any floating type
    cos: Tensor,  # [T, D] or [T, D / 2], any floating type; best fp32
    sin: Tensor,  # likewise
    *,
    query_heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,  # [D] or [Q * D]
    k_norm: Tensor | None = None,  # [D] or [K * D]
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # [T, Q, D], [T, K, D], [T, K, D]
    """Queries and keys, normed (where there are norms) and rotated, and the values: heads as attention takes them.

    The arithmetic is fp32 whatever the type of `qkv` (float64 for float64), rounded once. Forward and backward take
    one pass over memory each: the gradient of `qkv` is written whole, never as zero-filled slices that are added up.
    That is why the values come from here and are no view of `qkv`. Copying them costs a tenth to a third of the pass;
    in return nothing keeps `qkv` for the backward pass where there are no norms. A token's result does not depend on
    the other tokens. The gradient cannot be differentiated again: that raises a RuntimeError.

    Args:
        qkv: [T, (Q + 2 * K) * D].
        cos: cosines of the tokens' angles, [T, D] as transformers' rotary embeddings give them, whose row holds those
            of the halves one after another, or [T, D / 2], the same for both halves. No gradient flows to them.
        sin: sines, likewise.
        query_heads: Q.
        kv_heads: K.
        q_norm: weight of the queries' RMS norm: D elements norm each head (Qwen3), Q * D all heads together (OLMo).
        k_norm: weight of the keys' RMS norm, likewise. Frozen weights cost no gradient.
        eps: of the norms; added to the mean of the squares.

    Returns:
        q [T, Q, D], k [T, K, D], v [T, K, D], contiguous, in the type of `qkv`.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    dim = _checked_head_size(qkv, cos, sin, query_heads, kv_heads)
    for name, norm, heads in (("q_norm", q_norm, query_heads), ("k_norm", k_norm, kv_heads)):
        if norm is not None and (norm.dim() != 1 or len(norm) not in (dim, heads * dim)):
            raise ValueError(
                f"{name} has shape {list(norm.shape)}: pass [{dim}] to norm each head, [{heads * dim}] to norm all "
                "heads together"
            )
    return _rotary(qkv, cos, sin, query_heads, kv_heads, q_norm, k_norm, eps)


def rotary_reference(
    qkv: Tensor,  # [T, (Q + 2 * K) * D]
    cos: Tensor,  # [T, D] or [T, D / 2]
    sin: Tensor,  # likewise
    *,
    query_heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,  # [D] or [Q * D]
    k_norm: Tensor | None = None,  # [D] or [K * D]
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary`, arguments and results alike, in plain torch; inputs are not checked."""
    q, k, v = _split(qkv, query_heads, kv_heads)
    tables = _tables(cos, sin, qkv)
    q, k = (_rotate(_normed(x, norm, eps), *tables).to(qkv.dtype) for x, norm in ((q, q_norm), (k, k_norm)))
    return q, k, v


@op("rotary")
def _rotary(
    qkv: Tensor,  # [T, (Q + 2 * K) * D]
    cos: Tensor,  # [T, D] or [T, D / 2]
    sin: Tensor,  # likewise
    query_heads: int,
    kv_heads: int,
    q_norm: Tensor | None,  # [D] or [Q * D]
    k_norm: Tensor | None,  # [D] or [K * D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Q, D], k and v [T, K, D]."""
    dim = qkv.shape[1] // (query_heads + 2 * kv_heads)
    if uses_triton(qkv) and fits_registers(query_heads, kv_heads, dim, qkv.dtype):
        return rotary_in_triton(qkv, cos, sin, query_heads, kv_heads, q_norm, k_norm, eps)
    if native.computes(qkv, q_norm, k_norm):
        tables = cos.float().contiguous(), sin.float().contiguous()
        norms = native.contiguous(q_norm), native.contiguous(k_norm)
        return native.layer_op("rotary")(qkv.contiguous(), *tables, query_heads, kv_heads, *norms, eps)
    q, k, v = rotary_reference(
        qkv, cos, sin, query_heads=query_heads, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
    )
    return q.contiguous(), k.contiguous(), v.clone(memory_format=torch.contiguous_format)


@op("rotary_backward")
def _rotary_backward(
    d_q: Tensor,  # [T, Q, D]
    d_k: Tensor,  # [T, K, D]
    d_v: Tensor,  # [T, K, D]
    qkv: Tensor | None,  # [T, (Q + 2 * K) * D]; needed where there are norms
    cos: Tensor,  # [T, D] or [T, D / 2]
    sin: Tensor,  # likewise
    q_norm: Tensor | None,  # [D] or [Q * D]
    k_norm: Tensor | None,  # [D] or [K * D]
    eps: float,
    want_q_norm: bool,
    want_k_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `qkv`, `q_norm` and `k_norm` in their types; [0] for a norm whose gradient is not wanted."""
    arguments = d_q, d_k, d_v, qkv, cos, sin, q_norm, k_norm, eps, want_q_norm, want_k_norm
    if uses_triton(d_q) and fits_registers(d_q.shape[1], d_k.shape[1], d_q.shape[2], d_q.dtype):
        return rotary_gradients_in_triton(*arguments)
    if native.computes(d_q, q_norm, k_norm):
        tables = cos.float().contiguous(), sin.float().contiguous()
        inputs = native.contiguous(qkv), *tables, native.contiguous(q_norm), native.contiguous(k_norm)
        flows = d_q.contiguous(), d_k.contiguous(), d_v.contiguous()
        return native.layer_op("rotary_backward")(*flows, *inputs, eps, want_q_norm, want_k_norm)
    return rotary_gradients_in_torch(*arguments)


@_rotary.register_fake
def _(qkv: Tensor, cos: Any, sin: Any, query_heads: int, kv_heads: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dim = qkv.shape[0], qkv.shape[1] // (query_heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(tokens, heads, dim) for heads in (query_heads, kv_heads, kv_heads))
    return q, k, v


@_rotary_backward.register_fake
def _(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Any,
    qkv: Any,
    cos: Any,
    sin: Any,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: Any,
    want_q_norm: bool,
    want_k_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_qkv = d_q.new_empty(d_q.shape[0], (d_q.shape[1] + 2 * d_k.shape[1]) * d_q.shape[2])
    d_q_norm, d_k_norm = (
        d_q.new_empty(0) if norm is None else fake_gradient(norm, wanted, norm.dtype)
        for norm, wanted in ((q_norm, want_q_norm), (k_norm, want_k_norm))
    )
    return d_qkv, d_q_norm, d_k_norm


def _checked_head_size(qkv: Tensor, cos: Tensor, sin: Tensor, query_heads: int, kv_heads: int) -> int:
    """D. Raises ValueError."""
    heads = query_heads + 2 * kv_heads
    if qkv.dim() != 2 or query_heads < 1 or kv_heads < 1 or qkv.shape[1] % heads or qkv.shape[1] // heads % 2:
        raise ValueError(
            f"qkv has shape {list(qkv.shape)} for {query_heads} query and {kv_heads} key-value heads: pass "
            "[T, (Q + 2 * K) * D] with an even D"
        )
    if not (qkv.is_floating_point() and cos.is_floating_point() and sin.is_floating_point()):
        raise ValueError(f"qkv, cos, sin have types {qkv.dtype}, {cos.dtype}, {sin.dtype}: pass floating-point tensors")
    tokens, dim = qkv.shape[0], qkv.shape[1] // heads
    if cos.shape != sin.shape or (cos.shape != (tokens, dim) and cos.shape != (tokens, dim // 2)):
        raise ValueError(
            f"cos has shape {list(cos.shape)}, sin {list(sin.shape)}: pass one row per token, [{tokens}, {dim}] or "
            f"[{tokens}, {dim // 2}]"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos or sin wants a gradient, and none is computed for it: pass cos.detach(), sin.detach()")
    return dim


def _split(qkv: Tensor, query_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, Q, D], [T, K, D], [T, K, D]."""
    heads = qkv.unflatten(1, (query_heads + 2 * kv_heads, -1))
    q, k, v = heads.split([query_heads, kv_heads, kv_heads], 1)
    return q, k, v


def _tables(cos: Tensor, sin: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """[T, 1, D] or [T, 1, D / 2] each, in the type to compute in."""
    dtype = accumulation_dtype(like)
    return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """[T, heads, D] in the type to compute in, normed over as many elements as the weight has."""
    wide = x.to(accumulation_dtype(x))
    if norm is None:
        return wide
    y = rms_norm_reference(wide.flatten(1).unflatten(1, (-1, len(norm))), norm.to(wide.dtype), eps)
    assert isinstance(y, Tensor)
    return y.reshape(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    (cos_low, cos_high), (sin_low, sin_high) = (_halves(table, low.shape[-1]) for table in (cos, sin))
    return torch.cat([low * cos_low - high * sin_low, high * cos_high + low * sin_high], -1)


def _rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_rotate`."""
    low, high = x.chunk(2, -1)
    (cos_low, cos_high), (sin_low, sin_high) = (_halves(table, low.shape[-1]) for table in (cos, sin))
    return torch.cat([low * cos_low + high * sin_high, high * cos_high - low * sin_low], -1)


def _halves(table: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """A table's part for the lower and the upper half of a head."""
    return table[..., :half], table[..., -half:]


def rotary_gradients_in_torch(
    d_q: Tensor,  # [T, Q, D]
    d_k: Tensor,  # [T, K, D]
    d_v: Tensor,  # [T, K, D]
    qkv: Tensor | None,  # [T, (Q + 2 * K) * D]
    cos: Tensor,  # [T, D] or [T, D / 2]
    sin: Tensor,  # likewise
    q_norm: Tensor | None,  # [D] or [Q * D]
    k_norm: Tensor | None,  # [D] or [K * D]
    eps: float,
    want_q_norm: bool,
    want_k_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_rotary_backward` gives."""
    tables = _tables(cos, sin, d_q)
    q, k, _ = (None,) * 3 if qkv is None else _split(qkv, d_q.shape[1], d_k.shape[1])
    of_q, d_q_norm = _heads_gradient(d_q, q, tables, q_norm, eps, want_q_norm)
    of_k, d_k_norm = _heads_gradient(d_k, k, tables, k_norm, eps, want_k_norm)
    return torch.cat([of_q, of_k, d_v.flatten(1)], 1), d_q_norm, d_k_norm


def _heads_gradient(
    flow: Tensor,  # [T, heads, D]
    x: Tensor | None,  # [T, heads, D]; needed with a norm
    tables: tuple[Tensor, Tensor],
    norm: Tensor | None,
    eps: float,
    want_norm: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the heads, [T, heads * D], and of the norm, [0] where it is not wanted."""
    dtype = accumulation_dtype(flow)
    back, d_norm = _rotate_back(flow.to(dtype), *tables), flow.new_empty(0)
    if norm is not None:
        assert x is not None
        back_rows, x_rows = (part.reshape(-1, len(norm)) for part in (back, x.to(dtype)))
        back, d_norm = norm_gradients_in_torch(back_rows, None, x_rows, norm.to(dtype), eps, want_norm)
        d_norm = d_norm.to(norm.dtype)
    return back.reshape(flow.shape).flatten(1).to(flow.dtype), d_norm


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, _, _, q_norm, k_norm, ctx.eps = inputs
    kept = None if q_norm is None and k_norm is None else qkv
    ctx.save_for_backward(kept, cos, sin, q_norm, k_norm)


@first_order_only
def _backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
    qkv, cos, sin, q_norm, k_norm = ctx.saved_tensors
    wanted = ctx.needs_input_grad[5:7]
    d_qkv, *d_norms = _rotary_backward(d_q, d_k, d_v, qkv, cos, sin, q_norm, k_norm, ctx.eps, *wanted)
    of_q_norm, of_k_norm = (d_norm if want else None for d_norm, want in zip(d_norms, wanted, strict=True))
    return d_qkv, None, None, None, None, of_q_norm, of_k_norm, None


_rotary.register_autograd(_backward, setup_context=_setup)
