"""Decoding with a prefix shared by a group against decoding each sequence alone: the same bits, one reading of it."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinktwice_fast.model import csrc
from thinktwice_fast.model.paged import PagedKVCache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Decoding:
    """One query per sequence over a cache in which the members of a group hold the same first blocks."""

    q: Tensor  # [N, Hq, D]
    k_cache: Tensor  # [B, Hkv, bs, D]
    v_cache: Tensor  # [B, Hkv, bs, D]
    block_tables: Tensor  # int32 [N, M]
    context_lens: Tensor  # int32 [N]
    group_offsets: Tensor  # int32 [groups + 1]
    shared_blocks: Tensor  # int32 [groups]

    def alone(self, window: int = 0) -> Tensor:
        starts = torch.arange(len(self.q) + 1, dtype=torch.int32, device=self.q.device)
        tables = (self.block_tables, self.context_lens, starts)
        return csrc.paged_attention(self.q, self.k_cache, self.v_cache, *tables, 0.3, window)

    def grouped(self, window: int = 0) -> Tensor:
        tables = (self.block_tables, self.context_lens, self.group_offsets, self.shared_blocks)
        return csrc.grouped_decode_attention(self.q, self.k_cache, self.v_cache, *tables, 0.3, window)


def decoding(
    prompts: list[int],  # tokens of each group's prompt
    responses: list[list[int]],  # tokens of each member after it, at least 1
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Decoding:
    """Prompts are prefilled and forked, so that their whole blocks are shared; memory that nobody wrote is NaN."""
    random = torch.Generator().manual_seed(seed)
    needed = sum(-(-prompt // block_size) for prompt in prompts) + sum(
        -(-n // block_size) + 1 for members in responses for n in members
    )
    cache = PagedKVCache(1, needed, kv_heads, dim, block_size=block_size, dtype=dtype)
    cache.k_cache.fill_(math.nan)
    cache.v_cache.fill_(math.nan)

    def write(handles: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
        plan = cache.extend(handles, counts)
        assert plan is not None
        k, v = (torch.randn(sum(counts), kv_heads, dim, generator=random).to(dtype) for _ in range(2))
        csrc.write_kv(k, v, cache.k_cache[0], cache.v_cache[0], plan.slots)
        return plan.block_tables, plan.context_lens

    handles = []
    for prompt, members in zip(prompts, responses, strict=True):
        handle = cache.prefill()
        write([handle], [prompt])
        handles += [handle, *cache.fork(handle, len(members) - 1)]
    tables, lens = write(handles, [n for members in responses for n in members])
    sizes = torch.tensor([0] + [len(members) for members in responses])
    return Decoding(
        torch.randn(len(handles), kv_heads * group, dim, generator=random).to(dtype),
        cache.k_cache[0],
        cache.v_cache[0],
        tables,
        lens,
        sizes.cumsum(0).to(torch.int32),
        torch.tensor([prompt // block_size for prompt in prompts], dtype=torch.int32),
    )


@settings(max_examples=60)
@given(st.data())
def test_bits_are_those_of_each_sequence_alone(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3), "groups")
    given_ = decoding(
        [data.draw(st.integers(1, 300), "prompt") for _ in range(groups)],
        [data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5), "responses") for _ in range(groups)],
        kv_heads=data.draw(st.integers(1, 3), "kv_heads"),
        group=data.draw(st.sampled_from([1, 2, 3, 8, 40]), "group"),
        dim=data.draw(st.sampled_from([1, 16, 20, 64, 96]), "dim"),
        block_size=data.draw(st.sampled_from([1, 5, 16, 64, 100]), "block_size"),
        dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    window = data.draw(st.sampled_from([0, 0, 1, 20, 64, 130]), "window")
    expected = given_.alone(window)
    assert expected.isfinite().all()
    assert torch.equal(given_.grouped(window), expected)


def test_tables_that_do_not_start_alike_are_refused() -> None:
    """Even where the blocks hold the same keys: only the first member's are read."""
    given_ = decoding([128], [[3, 5, 9]])
    expected = given_.alone()
    first = int(given_.block_tables[0, 0])
    spare = next(iter(set(range(len(given_.k_cache))).difference(given_.block_tables.flatten().tolist())))
    given_.k_cache[spare], given_.v_cache[spare] = given_.k_cache[first], given_.v_cache[first]
    given_.block_tables[1:, 0] = spare
    assert torch.equal(given_.alone(), expected)
    with pytest.raises(RuntimeError, match="sequence 1 does not start with the 8 shared blocks of group 0"):
        given_.grouped()


def test_nothing_shared_and_empty_groups() -> None:
    given_ = decoding([100, 70], [[3, 5], [9]])
    expected = given_.alone()
    given_.shared_blocks.zero_()
    assert torch.equal(given_.grouped(), expected)
    given_.group_offsets = torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)
    given_.shared_blocks = torch.tensor([9, 6, 9, 4], dtype=torch.int32)
    assert torch.equal(given_.grouped(), expected)


def test_threads_do_not_change_bits() -> None:
    before = torch.get_num_threads()
    given_ = decoding([200, 90], [[3, 80, 40, 7], [5] * 40], group=4)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(given_.grouped())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_fake_version_has_the_shape_of_the_real_one() -> None:
    given_ = decoding([40], [[1, 2]])
    tensors = (given_.q, given_.k_cache, given_.v_cache.clone(), given_.block_tables, given_.context_lens)
    torch.library.opcheck(
        csrc.ops.grouped_decode_attention.default, (*tensors, given_.group_offsets, given_.shared_blocks, 1.0)
    )


def test_the_version_in_torch_agrees() -> None:
    given_ = decoding([100, 70], [[3, 5], [9]])
    tables = (given_.block_tables, given_.context_lens, given_.group_offsets, given_.shared_blocks)
    k_cache, v_cache = given_.k_cache.double(), given_.v_cache.double()
    got = csrc._grouped_in_torch(given_.q.double(), k_cache, v_cache, *tables, 0.3, 50)
    torch.testing.assert_close(given_.grouped(50).double(), got, atol=1e-5, rtol=0)


def test_wrong_arguments() -> None:
    given_ = decoding([100, 70], [[3, 5], [9]])
    offsets, shared = given_.group_offsets, given_.shared_blocks
    bad = [
        ({"group_offsets": offsets + 1}, "group_offsets must run from 0 to 3"),
        ({"group_offsets": torch.tensor([0, 9, 3], dtype=torch.int32)}, "group_offsets must not fall"),
        ({"shared_blocks": shared.long()}, "shared_blocks must be a contiguous Int vector"),
        ({"shared_blocks": shared - 5}, "shared_blocks of group 1 is -1"),
        ({"shared_blocks": shared + 1}, "does not start with the 7 shared blocks of group 0"),
        ({"q": given_.q[:2]}, "q has 2 queries for 3 sequences"),
        ({"context_lens": given_.context_lens * 0}, "sequence 0 has 1 queries, a context of 0 tokens"),
        ({"block_tables": given_.block_tables + 100}, "lies outside the cache of"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message):
            Decoding(**{**vars(given_), **change}).grouped()
