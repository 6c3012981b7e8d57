"""Paged attention against dense softmax attention in float64, and what must not change its bits."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.watch import Watch
from thinktwice_fast.model import csrc, reference
from thinktwice_fast.model.paged import PagedKVCache, Plan

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff


def dense_attention(
    q: Tensor,  # [T, Hq, D], the last T of the sequence
    k: Tensor,  # [C, Hkv, D]
    v: Tensor,  # [C, Hkv, D]
    scale: float,
    window: int,
) -> Tensor:  # [T, Hq, D]
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,chd->htc", q, k) * scale
    age = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = age < 0 if not window else (age < 0) | (age >= window)
    return torch.einsum("htc,chd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def tolerance(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Rounding of a score: (D + 3) u sum|q||k| scale; a weight's relative error is twice that, and the weighted mean of
    C values adds (C + 8) u; then the result is rounded to its own type."""
    u = 2.0**-24
    rows = torch.einsum("thd,chd->", q.abs().amax((0, 1))[None, None], k.abs().amax((0, 1))[None, None]).item()
    error = 2 * (q.shape[2] + 3) * rows * scale * u + (len(k) + 8) * u
    return (error + EPS[q.dtype]) * v.abs().max().item() * 1.01


class Setting:
    """Sequences of random length in a cache whose memory starts as NaN, filled in random chunks."""

    def __init__(
        self,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self.random = torch.Generator().manual_seed(seed)
        blocks = sum(-(-n // block_size) for n in lengths)
        self.cache = PagedKVCache(1, blocks, kv_heads, dim, block_size=block_size, dtype=dtype)
        self.cache.k_cache.fill_(math.nan)
        self.cache.v_cache.fill_(math.nan)
        self.q = [torch.randn(n, heads, dim, generator=self.random).to(dtype) for n in lengths]
        self.k = [torch.randn(n, kv_heads, dim, generator=self.random).to(dtype) for n in lengths]
        self.v = [torch.randn(n, kv_heads, dim, generator=self.random).to(dtype) for n in lengths]
        self.handles = [self.cache.prefill() for _ in lengths]
        self.done = [0] * len(lengths)

    def step(self, which: list[int], counts: list[int], window: int = 0) -> tuple[Plan, Tensor, list[Tensor]]:
        plan = self.cache.extend([self.handles[i] for i in which], counts)
        assert plan is not None
        spans = [slice(self.done[i], self.done[i] + n) for i, n in zip(which, counts, strict=True)]
        q, k, v = (
            torch.cat([part[i][span] for i, span in zip(which, spans, strict=True)])
            for part in (self.q, self.k, self.v)
        )
        out = self.cache.attend(0, plan, q, k, v, 0.3, window)
        for i, n in zip(which, counts, strict=True):
            self.done[i] += n
        return plan, q, list(out.split(counts))


def check(setting: Setting, which: list[int], counts: list[int], window: int = 0) -> None:
    plan, q, outs = setting.step(which, counts, window)
    tables = (plan.block_tables, plan.context_lens, plan.cu_seqlens_q)
    k_cache, v_cache = setting.cache.k_cache[0], setting.cache.v_cache[0]
    again = reference.paged_attention(q.double(), k_cache.double(), v_cache.double(), *tables, 0.3, window)
    for i, out, rows in zip(which, outs, again.split(counts), strict=True):
        if not len(out):
            continue
        k, v = setting.k[i][: setting.done[i]], setting.v[i][: setting.done[i]]
        queries = setting.q[i][setting.done[i] - len(out) : setting.done[i]]
        exact = dense_attention(queries, k, v, 0.3, window)
        torch.testing.assert_close(rows, exact, atol=1e-11, rtol=0)
        torch.testing.assert_close(out.double(), exact, atol=tolerance(queries, k, v, 0.3), rtol=0)


@settings(max_examples=60)
@given(st.data())
def test_random_layouts(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3), "kv_heads")
    setting = Setting(
        data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4), "lengths"),
        kv_heads * data.draw(st.sampled_from([1, 2, 3, 5, 8]), "group"),
        kv_heads,
        data.draw(st.sampled_from([1, 7, 16, 20, 32, 64, 80, 96, 128, 256]), "dim"),
        block_size=data.draw(st.sampled_from([1, 5, 16, 64, 100]), "block_size"),
        dtype=data.draw(st.sampled_from(list(EPS)), "dtype"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    window = data.draw(st.sampled_from([0, 0, 1, 20, 64, 130]), "window")
    while any(done < len(q) for done, q in zip(setting.done, setting.q, strict=True)):
        which = [i for i, q in enumerate(setting.q) if setting.done[i] < len(q)]
        counts = [data.draw(st.integers(0, len(setting.q[i]) - setting.done[i])) for i in which]
        counts[0] = max(1, counts[0])
        check(setting, which, counts, window)


@pytest.mark.parametrize("dtype", list(EPS))
def test_bits_depend_on_neither_batch_nor_chunking(dtype: torch.dtype) -> None:
    lengths = [150, 70, 1, 129]
    whole = Setting(lengths, 6, 2, 40, dtype=dtype)
    _, _, expected = whole.step([0, 1, 2, 3], lengths, window=100)
    alone = Setting(lengths, 6, 2, 40, dtype=dtype)
    for i, n in enumerate(lengths):
        cuts = [*range(0, n, 37), n]
        parts = [alone.step([i], [b - a], window=100)[2][0] for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), expected[i])
    decoded = Setting(lengths, 6, 2, 40, dtype=dtype)
    decoded.step([0, 1, 3], [140, 60, 119], window=100)
    for step in range(10):
        _, _, outs = decoded.step([3, 1, 0], [1, 1, 1], window=100)
        for i, start, out in zip([3, 1, 0], [119, 60, 140], outs, strict=True):
            assert torch.equal(out[0], expected[i][start + step])


def test_threads_do_not_change_bits() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(torch.cat(Setting([90, 300, 5], 4, 2, 32).step([0, 1, 2], [90, 300, 5])[2]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_views_are_taken_as_they_are() -> None:
    setting, same = Setting([33], 4, 2, 24), Setting([33], 4, 2, 24)
    expected = setting.step([0], [33])[2][0]
    plan = same.cache.extend(same.handles, [33])
    assert plan is not None
    q, k, v = (part[0].transpose(0, 1).contiguous().transpose(0, 1) for part in (same.q, same.k, same.v))
    assert not q.is_contiguous()
    assert torch.equal(same.cache.attend(0, plan, q, k, v, 0.3), expected)


def mixed(dtype: torch.dtype = torch.float64) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One long prefill, one in its middle, and many sequences that decode; the query, the tables, the right result."""
    lengths = [300, 200, *range(20, 60)]
    counts = [300, 90] + [1] * 40
    setting = Setting(lengths, 6, 2, 16, dtype=torch.float32)
    everything = list(range(len(lengths)))
    setting.step(everything, [n - m for n, m in zip(lengths, counts, strict=True)])
    plan, q, _ = setting.step(everything, counts)
    exact = torch.cat([dense_attention(setting.q[i][-counts[i] :], setting.k[i], setting.v[i], 0.3, 0)
                       for i in everything])  # fmt: skip
    caches = (setting.cache.k_cache[0].to(dtype), setting.cache.v_cache[0].to(dtype))
    return q.to(dtype), (*caches, plan.block_tables, plan.context_lens, plan.cu_seqlens_q), exact


@pytest.mark.parametrize("budget", [1 << 10, 1 << 17, 1 << 28])
def test_the_reference_in_chunks_gives_the_same(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_BYTES", budget)
    q, tables, exact = mixed()
    torch.testing.assert_close(reference.paged_attention(q, *tables, scale=0.3), exact, atol=1e-11, rtol=0)


def test_the_reference_needs_no_more_memory_than_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences padded to the longest query and context would score 42 x 300 x 304 times 6 heads, 92 MB."""
    budget = 1 << 17
    monkeypatch.setattr(reference, "CHUNK_BYTES", budget)
    q, tables, _ = mixed(torch.float32)
    with Watch() as watch:
        reference.paged_attention(q, *tables, scale=0.3)
    # Inputs and output, one sequence's keys and a chunk of scores lie below this.
    assert watch.largest <= max(budget, q.nbytes)


def test_the_reference_waits_for_the_device_once() -> None:
    """A .tolist() is no operator; every other way to a tensor's values is one of these."""
    q, tables, _ = mixed()
    with Watch() as watch:
        reference.paged_attention(q, *tables, scale=0.3)
    assert "index.Tensor" in watch.called
    assert not watch.called & {"_local_scalar_dense.default", "item.default", "nonzero.default"}


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_in_low_precision(dtype: torch.dtype, window: int) -> None:
    """Also rounds its weights, so a result is off by twice the roundoff of the type, relative to the values."""
    q, tables, _ = mixed(dtype)
    wide = (tables[0].double(), tables[1].double(), *tables[2:])
    exact = reference.paged_attention(q.double(), *wide, scale=0.3, window=window)
    got = reference.paged_attention(q, *tables, scale=0.3, window=window)
    largest = tables[1].nan_to_num().abs().max().item()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, atol=3 * EPS[dtype] * largest, rtol=0)


def test_nan_in_a_query_shows() -> None:
    setting = Setting([40], 2, 1, 16)
    setting.q[0][7, 1, 3] = math.nan
    out = setting.step([0], [40])[2][0]
    assert out[7, 1].isnan().all()
    assert out.isnan().sum() == 16


def test_wrong_arguments() -> None:
    q, cache = torch.zeros(2, 4, 16), torch.zeros(3, 2, 16, 16)
    table, lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [20], [0, 2]))
    csrc.paged_attention(q, cache, cache, table, lens, starts, 1.0)
    bad = [
        ((q, cache, cache, table + 2, lens, starts), "block 3 of sequence 0 lies outside the cache of 3 blocks"),
        ((q, cache, cache, table, lens + 20, starts), "a context of 40 tokens and a table of 2 blocks"),
        ((q, cache, cache, table, lens - 19, starts), "has 2 queries, a context of 1 tokens"),
        ((q, cache, cache, table, lens, starts + 1), "cu_seqlens_q must run from 0 to 2"),
        ((q, cache, cache, table, lens.long(), starts), "context_lens must be a contiguous Int vector"),
        ((q[:, :3], cache, cache, table, lens, starts), "3 query heads cannot share 2 KV heads evenly"),
        ((q[..., :8], cache, cache, table, lens, starts), "q must be \\[tokens, heads, 16\\]"),
        ((q.half(), cache, cache, table, lens, starts), "q and the cache must have one type"),
        ((q.double(), cache.double(), cache.double(), table, lens, starts), "type Double is not one of float32"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            csrc.paged_attention(*arguments, 1.0)
