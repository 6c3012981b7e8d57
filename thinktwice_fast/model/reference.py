"""The ops of ``csrc.py`` in plain torch: what the tests compare with, and what CUDA runs until its kernels land.

Signatures and results are those of the ops; only speed and memory differ, and the order of sums. Letters as there.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHUNK_BYTES = 256 << 20  # of gathered keys and values, or of scores, that exist at a time
SAMPLE_BYTES = 512 << 20  # of temporaries of the sampler, at a time
_ENTRY_BYTES = 80  # of temporaries that one logit costs at the worst moment, measured

_WORD = 0xFFFFFFFF


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See ``csrc.write_kv``."""
    block, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


def rotary_write_kv(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    q_norm: Tensor | None,  # [D] or [Hq * D]
    k_norm: Tensor | None,  # [D] or [Hkv * D]
    eps: float,
    cos: Tensor | None,  # [P, D]
    sin: Tensor | None,  # [P, D]
    positions: Tensor,  # int64 [T]
    slots: Tensor,  # int64 [T]
    k_cache: Tensor,  # [B, Hkv, bs, D]
    v_cache: Tensor,  # [B, Hkv, bs, D]
) -> None:
    """See ``csrc.rotary_write_kv``. Takes float64 too, and then computes in it."""
    tables = None if cos is None or sin is None else (cos[positions][:, None], sin[positions][:, None])  # [T, 1, D]
    q.copy_(_norm_and_rotate(q, q_norm, eps, tables))
    write_kv(_norm_and_rotate(k, k_norm, eps, tables).to(k.dtype), v, k_cache, v_cache, slots)


def _norm_and_rotate(
    x: Tensor,  # [T, H, D]
    norm: Tensor | None,  # [D] or [H * D]
    eps: float,
    tables: tuple[Tensor, Tensor] | None,  # cos and sin, [T, 1, D]
) -> Tensor:  # [T, H, D], float32 or float64
    x = x if x.dtype == torch.float64 else x.float()
    if norm is not None:
        normed = x if norm.numel() == x.shape[2] else x.flatten(1)
        scale = torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
        x = (normed * scale * norm).view_as(x)
    if tables is None:
        return x
    low, high = x.chunk(2, dim=-1)
    return x * tables[0] + torch.cat((-high, low), dim=-1) * tables[1]


def copy_blocks(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    """See ``csrc.copy_blocks``; here no block may be both read and written."""
    source, target = pairs.to(k_cache.device).unbind(1)
    k_cache[:, target] = k_cache[:, source]
    v_cache[:, target] = v_cache[:, source]


def paged_attention(
    q: Tensor,  # [T, Hq, D]
    k_cache: Tensor,  # [B, Hkv, bs, D]
    v_cache: Tensor,  # [B, Hkv, bs, D]
    block_tables: Tensor,  # int32 [N, M]
    context_lens: Tensor,  # int32 [N]
    cu_seqlens_q: Tensor,  # int32 [N + 1]
    scale: float,
    window: int = 0,
) -> Tensor:  # [T, Hq, D]
    """See ``csrc.paged_attention``. Takes float64 too, and then computes in it.

    Products of bfloat16 and float16 are summed in float32, but weights are rounded to the inputs' type before they meet
    the values, as in training's attention. Beyond inputs and output it needs one sequence's keys and values, or
    CHUNK_BYTES of several's, and the scores of a chunk.
    """
    out = q.new_empty(q.shape)
    # One wait for the device; a sequence's own lengths asked for one by one would be as many.
    lengths = torch.cat([context_lens, cu_seqlens_q]).tolist()
    contexts, starts = lengths[: len(context_lens)], lengths[len(context_lens) :]
    single = []
    for n, (start, end) in enumerate(pairwise(starts)):
        if end - start == 1:
            single.append(n)
        elif end > start:
            cached = _gather(
                k_cache, v_cache, block_tables[n : n + 1], torch.arange(contexts[n], device=q.device)[None]
            )
            out[start:end] = _attend_new(q[start:end], *cached, scale, window)
    # Longest first, so that neighbours are alike and little is padded.
    single.sort(key=lambda n: -contexts[n])
    token_bytes = 2 * k_cache[0, :, 0].numel() * k_cache.itemsize
    while single:
        keys = min(contexts[single[0]], window or contexts[single[0]])  # most that a query of these sees
        here = max(1, CHUNK_BYTES // (keys * token_bytes))
        rows, single = torch.tensor(single[:here], device=q.device), single[here:]
        at = cu_seqlens_q[rows].long()
        tables = (k_cache, v_cache, block_tables[rows], context_lens[rows])
        out[at] = _attend_last(q[at], *tables, keys, scale)
    return out


def _attend_last(
    q: Tensor,  # [n, Hq, D], each at the end of its sequence
    k_cache: Tensor,  # [B, Hkv, bs, D]
    v_cache: Tensor,  # [B, Hkv, bs, D]
    block_tables: Tensor,  # int32 [n, M]
    context_lens: Tensor,  # int32 [n]
    keys: int,  # K, most that a query sees
    scale: float,
) -> Tensor:  # [n, Hq, D]
    ends = context_lens[:, None].long()  # [n, 1]
    position = (ends - keys).clamp(min=0) + torch.arange(keys, device=q.device)  # [n, K]
    visible = position < ends
    # Past its end a row reads its last key again: what nobody wrote may be NaN, which no mask takes out of a sum.
    k, v = _gather(k_cache, v_cache, block_tables, position.minimum(ends - 1))
    # The query heads that share a key head stand as its queries, so that no key is repeated.
    queries = q.unflatten(1, (k_cache.shape[1], -1))  # [n, Hkv, G, D]
    return scaled_dot_product_attention(queries, k, v, attn_mask=visible[:, None, None], scale=scale).flatten(1, 2)


def _attend_new(
    q: Tensor,  # [Q, Hq, D], the last Q of a sequence
    k: Tensor,  # [1, Hkv, C, D], all of it
    v: Tensor,  # [1, Hkv, C, D]
    scale: float,
    window: int,
) -> Tensor:  # [Q, Hq, D]
    count, heads, _ = q.shape
    kv_heads, context = k.shape[1:3]
    # In other types the fused kernels do not take grouped heads, and a whole prompt's scores would be built.
    if count == context <= (window or context) and q.itemsize == 2:
        whole = q.transpose(0, 1)[None]
        return scaled_dot_product_attention(whole, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(
            0, 1
        )
    out = torch.empty_like(q)
    step = max(1, CHUNK_BYTES // (heads * context * 4))
    for start in range(0, count, step):
        queries = q[start : start + step]  # [n, Hq, D]
        end = context - count + start + len(queries)  # of the keys that the last of them sees
        first = max(0, end - len(queries) + 1 - window) if window else 0
        position = torch.arange(end - len(queries), end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)
        visible = key <= position  # [n, K]
        if window:
            visible &= key > position - window
        grouped = queries.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, Hkv, G n, D]
        visible = visible.repeat(heads // kv_heads, 1)  # [G n, K]
        attended = scaled_dot_product_attention(
            grouped, k[:, :, first:end], v[:, :, first:end], attn_mask=visible, scale=scale
        )
        out[start : start + step] = attended[0].unflatten(1, (-1, len(queries))).flatten(0, 1).transpose(0, 1)
    return out


def _gather(
    k_cache: Tensor,  # [B, Hkv, bs, D]
    v_cache: Tensor,  # [B, Hkv, bs, D]
    block_tables: Tensor,  # int32 [n, M]
    position: Tensor,  # int64 [n, K], places in each sequence
) -> tuple[Tensor, Tensor]:  # [n, Hkv, K, D] each
    size = k_cache.shape[2]
    block, offset = block_tables.gather(1, position // size).long(), position % size
    return k_cache[block, :, offset].transpose(1, 2), v_cache[block, :, offset].transpose(1, 2)


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 (Salmon et al., SC'11).

    Args:
        counter: four int64 tensors of one shape, each entry a word in [0, 2^32).
        key: two words; as tensors int64 [1].

    Returns:
        Four tensors of random words, in the same form.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around 2^64 as signed numbers; their bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniforms(
    seed: Tensor | int,  # int64 [1] or a number
    sample_ids: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N]
    vocabulary: int,
) -> Tensor:  # float32 [N, V]
    """The numbers in (0, 1) behind the draws of ``csrc.sample``, bit for bit."""
    group = torch.arange(-(-vocabulary // 4), device=sample_ids.device).expand(len(sample_ids), -1)
    columns = (positions & _WORD, sample_ids & _WORD, (sample_ids >> 32) & _WORD)
    counter = (group, *(column[:, None].expand_as(group) for column in columns))
    words = torch.stack(philox4x32_10(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)
    u = (words.flatten(1)[:, :vocabulary].float() + 0.5) * 2.0**-32
    return u.clamp(max=1 - 2.0**-24)


def sample(
    logits: Tensor,  # [N, V]
    temperature: Tensor,  # float32 [N]
    top_k: Tensor,  # int32 [N]
    top_p: Tensor,  # float32 [N]
    min_p: Tensor,  # float32 [N]
    seed: Tensor | int,  # int64 [1] or a number
    sample_ids: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N]
) -> tuple[Tensor, ...]:
    """See ``csrc.sample``; returns tokens, logps, raw_logps, entropies and statuses.

    Rows are taken SAMPLE_BYTES at a time.
    """
    step = max(1, SAMPLE_BYTES // (logits.shape[1] * _ENTRY_BYTES))
    columns = (logits, temperature, top_k, top_p, min_p, sample_ids, positions)
    parts = [
        _sample_rows(*(column[first : first + step] for column in columns), seed=seed)
        for first in range(0, max(len(logits), 1), step)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _sample_rows(
    logits: Tensor,  # [n, V]
    temperature: Tensor,  # float32 [n]
    top_k: Tensor,  # int32 [n]
    top_p: Tensor,  # float32 [n]
    min_p: Tensor,  # float32 [n]
    sample_ids: Tensor,  # int64 [n]
    positions: Tensor,  # int64 [n]
    *,
    seed: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    best = scaled.amax(1, keepdim=True)  # NaN where a row holds one
    refusals = (
        ~((temperature >= 0) & temperature.isfinite()),
        top_k < 0,
        ~((top_p > 0) & (top_p <= 1)),
        ~((min_p >= 0) & (min_p <= 1)),
        (positions < 0) | (positions > _WORD),
        ~best[:, 0].isfinite(),
    )
    statuses = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    for number, refused in reversed([*enumerate(refusals, start=1)]):  # the first that holds is written last
        statuses.masked_fill_(refused, number)
    below = scaled - best
    weights = below.exp()
    allowed = weights * _may_be_drawn(weights, top_k, top_p, min_p)
    score = allowed / -torch.log1p(-uniforms(seed, sample_ids, positions, logits.shape[1]))
    score = torch.where(greedy[:, None], (below == 0).float(), score)
    ids = torch.arange(logits.shape[1], device=logits.device)
    # A refused row may have no best score: any token will do there.
    tokens = torch.where(score == score.amax(1, keepdim=True), ids, len(ids) - 1).amin(1)

    log_total = weights.double().sum(1).log()
    log_mass = torch.where(greedy, log_total, allowed.double().sum(1).log())
    chosen = below.gather(1, tokens[:, None])[:, 0].double()
    moment = (weights.double() * below.clamp(min=-1e4)).sum(1)
    entropy = log_total - moment / weights.double().sum(1)
    numbers = (chosen - log_mass, chosen - log_total, entropy)
    refused = statuses != 0
    logps, raw_logps, entropies = (x.float().masked_fill(refused, torch.nan) for x in numbers)
    return tokens.masked_fill(refused, -1), logps, raw_logps, entropies, statuses


def _may_be_drawn(
    weights: Tensor,  # float32 [N, V], probabilities relative to the likeliest token's
    top_k: Tensor,  # int32 [N]
    top_p: Tensor,  # float32 [N]
    min_p: Tensor,  # float32 [N]
) -> Tensor:  # bool [N, V]
    vocabulary = weights.shape[1]
    ranked, order = weights.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=weights.device)
    kept = rank < torch.where(top_k > 0, top_k, vocabulary)[:, None]
    mass = ranked.double() * kept
    reached = mass.cumsum(1) - mass  # by the tokens before this one
    inside = (reached < top_p.double()[:, None] * mass.sum(1, keepdim=True)) | (top_p == 1)[:, None] | (rank == 0)
    kept &= inside & (ranked >= min_p[:, None])
    return torch.zeros_like(kept).scatter(1, order, kept)


def advance(
    drawn: tuple[Tensor, Tensor, Tensor, Tensor] | None,  # csrc.Sampled
    stop_ids: Tensor,  # int64
    block_tables: Tensor,  # int32 [N, M]
    block_size: int,
    spare_slot: int,
    state: Tensor,  # int64 [6, N]
    context_lens: Tensor,  # int32 [N]
    new_tokens: Tensor,  # int64 [S, N]
    new_logps: Tensor,  # float32 [S, N]
    new_entropies: Tensor,  # float32 [S, N]
) -> None:
    """See ``csrc.advance``."""
    tokens, positions, draws, left, slots, counts = state
    if drawn is not None:
        token, _, logps, entropies = drawn
        noted = (left > 0) & (counts < len(new_tokens))
        for new, values in ((new_tokens, token), (new_logps, logps), (new_entropies, entropies)):
            new[counts[noted], noted.nonzero()[:, 0]] = values[noted]
        ends = (token < 0) | (left == 1) | torch.isin(token, stop_ids)
        goes_on = noted & ~ends
        counts += noted
        draws += noted
        left.copy_(torch.where(noted, (left - 1) * ~ends, left))
        tokens.copy_(torch.where(goes_on, token, tokens))
        positions += goes_on
    block, blocks = positions // block_size, block_tables.shape[1]
    held = block_tables.gather(1, block.clamp(max=blocks - 1)[:, None])[:, 0].long()
    fed = (left > 0) & (block < blocks)
    slots.copy_(torch.where(fed, held * block_size + positions % block_size, spare_slot))
    context_lens.copy_(positions + 1)
