"""The ops of the C++ extension (``csrc/``): cache writes, paged attention and the sampler.

The library registers them with torch as ``torch.ops.thinktwice.*``; here they are loaded, given fake versions for
``torch.compile`` and, where the library was built without CUDA, the plain-torch versions of ``reference.py`` for
tensors on a GPU. The bookkeeping ops of the cache are wrapped by ``paged.PagedKVCache``.

On a GPU the library's ops do not wait to look at slots, block tables and lengths: a slot or block outside the cache
stops the kernel with a device-side assertion. A head's size must be a multiple of 8, up to 256.

Letters: T tokens, N sequences or rows, Hq / Hkv query / key-value heads, D head size, B blocks of bs tokens,
L layers, V vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinktwice_fast.errors import UserError
from thinktwice_fast.model import lists, reference


def _load() -> None:
    found = sorted(Path(__file__).parent.parent.glob("_csrc*.so"))
    if not found:
        raise UserError("the C++ extension of thinktwice_fast is not built: run `make`")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the C++ extension does not load with torch {torch.__version__} ({reason}): rebuild it with `make`"
        ) from error


_load()
ops = torch.ops.thinktwice
_write_kv = ops.write_kv.default
_rotary_write_kv = ops.rotary_write_kv.default
_copy_blocks = ops.copy_blocks.default
_paged_attention = ops.paged_attention.default
_grouped_decode_attention = ops.grouped_decode_attention.default
_list_parts = ops.list_parts.default
_sample = ops.sample.default
_advance = ops.advance.default


def _grouped_in_torch(
    q: Tensor,  # [N, Hq, D]
    k_cache: Tensor,  # [B, Hkv, bs, D]
    v_cache: Tensor,  # [B, Hkv, bs, D]
    block_tables: Tensor,  # int32 [N, M]
    context_lens: Tensor,  # int32 [N]
    group_offsets: Tensor,  # int32 [groups + 1]
    shared_blocks: Tensor,  # int32 [groups]
    scale: float,
    window: int = 0,
) -> Tensor:  # [N, Hq, D]
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return reference.paged_attention(q, k_cache, v_cache, block_tables, context_lens, starts, scale, window)


def _advance_in_torch(drawn: Tensor | None, logps: Tensor | None, entropies: Tensor | None, *rest: Any) -> None:
    columns = None if drawn is None or logps is None or entropies is None else (drawn, logps, logps, entropies)
    reference.advance(columns, *rest)


_TORCH_VERSIONS = {
    "write_kv": reference.write_kv,
    "rotary_write_kv": reference.rotary_write_kv,
    "copy_blocks": reference.copy_blocks,
    "paged_attention": reference.paged_attention,
    "grouped_decode_attention": _grouped_in_torch,
    "sample": reference.sample,
    "advance": _advance_in_torch,
}


# The ops that run in plain torch on a GPU: all, or none if the library was built with CUDA.
torch_versions = frozenset(
    name
    for name in _TORCH_VERSIONS
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"thinktwice::{name}", "CUDA")
)


def _register_torch_versions() -> torch.library.Library:
    library = torch.library.Library("thinktwice", "IMPL", "CUDA")
    for name in torch_versions:
        library.impl(name, _TORCH_VERSIONS[name])
    return library


def _register_fakes() -> None:
    torch.library.register_fake("thinktwice::write_kv", lambda k, v, k_cache, v_cache, slots: None)
    torch.library.register_fake("thinktwice::rotary_write_kv", lambda *arguments: None)
    torch.library.register_fake("thinktwice::copy_blocks", lambda k_cache, v_cache, pairs: None)
    for name in ("paged_attention", "grouped_decode_attention"):
        torch.library.register_fake(f"thinktwice::{name}", lambda q, *rest, **options: q.new_empty(q.shape))
    torch.library.register_fake("thinktwice::sample", _sample_fake)
    torch.library.register_fake("thinktwice::advance", lambda *arguments: None)


def _sample_fake(logits: Tensor, *rest: object) -> tuple[Tensor, ...]:
    kinds = (torch.int64, torch.float32, torch.float32, torch.float32, torch.int32)
    return tuple(logits.new_empty(logits.shape[0], dtype=kind) for kind in kinds)


_register_fakes()
_library = _register_torch_versions()  # unregisters its ops when collected


# By the status of a row whose option is refused, less one; see csrc/sample_status.h.
_SAMPLE_OPTIONS = (
    ("temperature", "finite and at least 0"),
    ("top_k", "at least 0"),
    ("top_p", "above 0 and at most 1"),
    ("min_p", "from 0 to 1"),
    ("position", "from 0 to 2^32 - 1"),
)
_BAD_LOGITS = len(_SAMPLE_OPTIONS) + 1


class Sampled(NamedTuple):
    """One draw per row."""

    tokens: Tensor  # int64 [N]
    logps: Tensor  # float32 [N], nats, under the distribution it was drawn from
    raw_logps: Tensor  # float32 [N], nats, under softmax(logits / temperature), nothing truncated
    entropies: Tensor  # float32 [N], nats, of softmax(logits / temperature), nothing truncated


class State(NamedTuple):
    """The rows of the state of N sequences that decode without a word from the host."""

    tokens: Tensor  # int64 [N], the last of each, fed next
    positions: Tensor  # int64 [N], of those in their sequences
    draws: Tensor  # int64 [N], how many were drawn already
    left: Tensor  # int64 [N], how many more may be
    slots: Tensor  # int64 [N], where keys and values of ``tokens`` go
    counts: Tensor  # int64 [N], how many were noted down


def write_kv(
    k: Tensor,  # [T, Hkv, D], any strides but the last
    v: Tensor,  # [T, Hkv, D]
    k_cache: Tensor,  # [B, Hkv, bs, D], one layer, written in place
    v_cache: Tensor,  # [B, Hkv, bs, D]
    slots: Tensor,  # int64 [T], block * bs + place in the block
) -> None:
    """Put the keys and values of T tokens into their slots of the cache.

    Raises:
        RuntimeError: shapes or types do not match, or a slot lies outside the cache (nothing is written then).
    """
    _write_kv(k, v, k_cache, v_cache, slots)


def rotary_write_kv(
    q: Tensor,  # [T, Hq, D], any strides but the last; replaced by the result
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    q_norm: Tensor | None,  # [D], or [Hq * D] for one mean over all heads
    k_norm: Tensor | None,  # [D] or [Hkv * D]
    eps: float,
    cos: Tensor | None,  # float32 [P, D], contiguous; None = no rotation
    sin: Tensor | None,  # float32 [P, D]
    positions: Tensor,  # int64 [T], below P
    slots: Tensor,  # int64 [T], block * bs + place in the block
    k_cache: Tensor,  # [B, Hkv, bs, D], one layer, written in place
    v_cache: Tensor,  # [B, Hkv, bs, D]
) -> None:
    """Norm and rotate T tokens' queries in place, and their keys on the way into the cache; ``write_kv`` of the values.

    With 1 and 2 the halves of a head, c and s the rows of ``cos`` and ``sin`` at the token's position:

        x = x / sqrt(mean(x^2) + eps) * norm
        out = [x_1 * c_1 - x_2 * s_1,  x_2 * c_2 + x_1 * s_2]

    as in transformers' ``apply_rotary_pos_emb``, but in float32 throughout, rounded once at the end.

    Raises:
        RuntimeError: shapes or types do not match, or on the CPU a slot or position lies outside cache or tables
            (nothing is written then; on a GPU it stops the kernel).
    """
    _rotary_write_kv(q, k, v, q_norm, k_norm, eps, cos, sin, positions, slots, k_cache, v_cache)


def copy_blocks(
    k_cache: Tensor,  # [L, B, Hkv, bs, D], written in place
    v_cache: Tensor,  # [L, B, Hkv, bs, D]
    pairs: Tensor,  # int64 [M, 2], (from, to) blocks
) -> None:
    """Copy whole blocks in every layer, one pair after the other.

    Raises:
        RuntimeError: shapes or types do not match, or a block lies outside the cache (nothing is copied then).
    """
    _copy_blocks(k_cache, v_cache, pairs)


def paged_attention(
    q: Tensor,  # [T, Hq, D], any strides but the last
    k_cache: Tensor,  # [B, Hkv, bs, D], one layer
    v_cache: Tensor,  # [B, Hkv, bs, D]
    block_tables: Tensor,  # int32 [N, blocks of the longest sequence]
    context_lens: Tensor,  # int32 [N], tokens of each sequence, its new ones included
    cu_seqlens_q: Tensor,  # int32 [N + 1], where each sequence's queries start in q
    scale: float,
    window: int = 0,  # keys a query sees, itself included; 0 = all
    parts: Tensor | None = None,  # of ``list_parts`` for the same lengths; CUDA only; None: listed anew
) -> Tensor:  # [T, Hq, D]
    """Causal attention of each sequence's last tokens over all of it; decoding, prefill or both at once.

    The i-th of n queries of a sequence with context length c sits at position p = c - n + i and sees the keys at
    positions max(0, p - window + 1) .. p:

        out = softmax(scale * q k^T) v

    A row's bits do not depend on the rest of the batch nor on how its sequence was cut into calls. On the CPU it is
    computed in float32 whatever the type of the cache, over chunks of 64 keys with an online softmax. On CUDA so is
    float32; bfloat16 and float16 are multiplied as they are and summed in float32, with weights rounded to their type,
    and splits of 256 keys are merged in their order.

    Raises:
        RuntimeError: shapes, types or lengths do not match, or a block lies outside the cache.
    """
    return _paged_attention(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, window, parts)


def grouped_decode_attention(
    q: Tensor,  # [N, Hq, D], any strides but the last
    k_cache: Tensor,  # [B, Hkv, bs, D], one layer
    v_cache: Tensor,  # [B, Hkv, bs, D]
    block_tables: Tensor,  # int32 [N, blocks of the longest sequence]
    context_lens: Tensor,  # int32 [N], tokens of each sequence, its new one included
    group_offsets: Tensor,  # int32 [groups + 1], where each group's sequences start; from 0 to N
    shared_blocks: Tensor,  # int32 [groups], whole blocks at the start that all sequences of a group hold
    scale: float,
    window: int = 0,  # keys a query sees, itself included; 0 = all
    parts: Tensor | None = None,  # of ``list_parts`` for the same lengths; CUDA only; None: listed anew
) -> Tensor:  # [N, Hq, D]
    """``paged_attention`` of one query per sequence, with the keys that a group shares read once for its members.

    The bits are those of ``paged_attention``: keys count as shared up to a multiple of 64 (CPU) or 256 (CUDA), where
    that cuts a sequence's keys anyway, and the others are read by each member.

    Raises:
        RuntimeError: shapes, types or lengths do not match, a block lies outside the cache, or the tables of a group
            do not start alike (on a GPU this last one is not checked).
    """
    return _grouped_decode_attention(
        q, k_cache, v_cache, block_tables, context_lens, group_offsets, shared_blocks, scale, window, parts
    )


def list_parts(
    q: Tensor,  # [T, Hq, D], of any layer; not read
    k_cache: Tensor,  # [B, Hkv, bs, D], of any layer; not read
    block_tables: Tensor,  # int32 [N, blocks of the longest sequence]
    context_lens: Tensor,  # int32 [N]
    cu_seqlens_q: Tensor | None = None,  # int32 [N + 1]; None = groups are given
    group_offsets: Tensor | None = None,  # int32 [groups + 1]
    shared_blocks: Tensor | None = None,  # int32 [groups]
    window: int = 0,
) -> Tensor:  # int32 [1 + room for them, 4], on the GPU; the first row starts with their number
    """What decoding on a GPU is made of, largest first: one list serves all layers of a step that have one window.

    Raises:
        RuntimeError: shapes or types do not match, or the tensors are not on a GPU.
    """
    return _list_parts(q, k_cache, block_tables, context_lens, cu_seqlens_q, group_offsets, shared_blocks, window)


def sample(
    logits: Tensor,  # [N, V], float32, bfloat16 or float16
    temperature: Tensor,  # float32 [N]; 0 = greedy
    top_k: Tensor,  # int32 [N]; 0 = off
    top_p: Tensor,  # float32 [N], above 0; 1 = off
    min_p: Tensor,  # float32 [N]; 0 = off
    *,
    seed: int,
    sample_ids: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N], from 0 to 2^32 - 1
) -> Sampled:
    """Draw one token per row.

    Tokens rank by probability under softmax(logits / temperature), equal ones by id. Top-k keeps the first k; of
    these, top-p the fewest whose share of the kept mass reaches it; of these, min-p those with at least its share of
    the likeliest token's probability. The draw is argmax_i (logits_i / temperature + g_i) over what is left, with
    Gumbel noise g_i = -ln(-ln(1 - u_i)), computed as argmax_i exp(logits_i / temperature - max) / -ln(1 - u_i);
    the lowest id wins a tie. u_i is word i % 4 of Philox4x32-10 with the counter (i // 4, position, sample id low,
    sample id high) and the key ``seed``, mapped to min((word + 1/2) / 2^32, 1 - 2^-24) in float32: a draw depends
    on its logits, seed, sample id and position, on nothing else. A greedy row takes the first of the likeliest
    tokens, and all its numbers are those of temperature 1 without truncation.

    Raises:
        RuntimeError: a row's logits hold NaN or +inf or nothing finite, an option is out of range, or shapes or types
            do not match.
    """
    options = (temperature, top_k, top_p, min_p)
    (key,) = lists.upload([lists.int64([seed])], logits.device)
    *sampled, statuses = _sample(logits, *options, key, sample_ids, positions)
    _raise_refused(statuses.tolist(), (*options, positions, sample_ids))
    return Sampled(*sampled)


def draw(
    logits: Tensor,  # [N, V]
    temperature: Tensor,  # float32 [N]
    top_k: Tensor,  # int32 [N]
    top_p: Tensor,  # float32 [N]
    min_p: Tensor,  # float32 [N]
    *,
    seed: Tensor,  # int64 [1]
    sample_ids: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N]
) -> Sampled:
    """``sample`` without a look at what came of it: a row that is refused gets the token -1 and NaN.

    Nothing waits for the device, and nothing but tensors goes in, so that a CUDA graph can hold it.
    """
    *sampled, _ = _sample(logits, temperature, top_k, top_p, min_p, seed, sample_ids, positions)
    return Sampled(*sampled)


def advance(
    drawn: Sampled | None,
    stop_ids: Tensor,  # int64, tokens that end a row
    block_tables: Tensor,  # int32 [N, blocks]
    block_size: int,
    spare_slot: int,
    state: Tensor,  # int64 [6, N], any stride of the first dimension; written in place
    context_lens: Tensor,  # int32 [N], written in place
    new_tokens: Tensor,  # int64 [S, N], written in place
    new_logps: Tensor,  # float32 [S, N], nats, written in place
    new_entropies: Tensor,  # float32 [S, N], nats, written in place
) -> None:
    """Between two steps of decoding: note down what N rows drew, and find the places of the tokens that come next.

    The state's rows are ``State``. A row has ended when it has no tokens left to draw, which a stop token or a refused
    draw also brings about. It then keeps its token, position and context length, and its slot is the spare one. What
    the others drew (raw log-probabilities) goes to row ``counts`` of the new tokens, at most S of them.

    Args:
        drawn: None: nothing yet; only slots and context lengths are set, from the positions.
        stop_ids: see above.
        block_tables: of the rows' sequences, with blocks for the tokens to come.
        block_size: tokens per block.
        spare_slot: that nobody reads.
        state, context_lens: of the rows.
        new_tokens, new_logps, new_entropies: what was drawn since the counts were 0.

    Raises:
        RuntimeError: shapes or types do not match.
    """
    columns = (None, None, None) if drawn is None else (drawn.tokens, drawn.raw_logps, drawn.entropies)
    new = (new_tokens, new_logps, new_entropies)
    _advance(*columns, stop_ids, block_tables, block_size, spare_slot, state, context_lens, *new)


def _raise_refused(
    statuses: list[int],  # csrc/sample_status.h
    columns: tuple[Tensor, ...],  # temperature, top_k, top_p, min_p, positions, sample_ids, each [N]
) -> None:
    row = next((row for row, status in enumerate(statuses) if status), None)
    if row is None:
        return
    position, sample_id = (int(column[row]) for column in columns[-2:])
    if statuses[row] == _BAD_LOGITS:
        raise RuntimeError(
            f"sample: logits of row {row} (sample {sample_id}, position {position}) hold NaN or +inf, or nothing but "
            "-inf"
        )
    name, bounds = _SAMPLE_OPTIONS[statuses[row] - 1]
    value = columns[statuses[row] - 1][row].item()
    raise RuntimeError(f"sample: {name} of row {row} is {value:.10g}, must be {bounds}")
