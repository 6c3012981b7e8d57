"""The paged cache: whatever is extended, forked and released, a sequence reads back as if it had its own memory."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thinktwice_fast.model import csrc, reference
from thinktwice_fast.model.paged import PagedKVCache

LAYERS, HEADS, DIM = 2, 2, 4


class CacheMachine(RuleBasedStateMachine):
    """Every sequence beside a plain list of the numbers written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(LAYERS, 12, HEADS, DIM, block_size=3)
        self.written: dict[int, list[int]] = {}
        self.held: dict[int, int] = {}  # blocks, those taken ahead among them
        self.next_number = 1

    @rule()
    def prefill(self) -> None:
        handle = self.cache.prefill()
        assert handle not in self.written
        self.written[handle], self.held[handle] = [], 0

    def draw_growth(self, data: st.DataObject) -> tuple[list[int], list[int], int]:
        """Handles, by how many tokens each is to grow, and the blocks that this takes."""
        handles = data.draw(st.lists(st.sampled_from(sorted(self.written)), unique=True, min_size=1, max_size=5))
        counts = [data.draw(st.integers(0, 7)) for _ in handles]
        wanted = [-(-(len(self.written[handle]) + more) // 3) for handle, more in zip(handles, counts, strict=True)]
        return handles, counts, sum(max(0, n - self.held[h]) for n, h in zip(wanted, handles, strict=True))

    def hold(self, handles: list[int], counts: list[int]) -> None:
        for handle, more in zip(handles, counts, strict=True):
            self.held[handle] = max(self.held[handle], -(-(len(self.written[handle]) + more) // 3))

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def take_ahead(self, data: st.DataObject) -> None:
        handles, counts, needed = self.draw_growth(data)
        free = self.cache.free_blocks
        blocks = self.cache.take_ahead(handles, counts)
        assert (blocks is None) == (needed > free)
        assert self.cache.free_blocks == (free if blocks is None else free - needed)
        if blocks is not None:
            self.hold(handles, counts)
            for row, handle in zip(blocks.tables.tolist(), handles, strict=True):
                assert row[: self.held[handle]] == self.cache.blocks(handle)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        handles = data.draw(st.lists(st.sampled_from(sorted(self.written)), unique=True, max_size=3))
        self.cache.trim(handles)
        self.held.update((handle, -(-len(self.written[handle]) // 3)) for handle in handles)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        handles, counts, needed = self.draw_growth(data)
        lengths = [len(self.written[handle]) for handle in handles]
        free = self.cache.free_blocks
        plan = self.cache.extend(handles, counts)
        assert (plan is None) == (needed > free)
        assert self.cache.free_blocks == (free if plan is None else free - needed)
        if plan is None:
            return
        self.hold(handles, counts)
        assert plan.context_lens.tolist() == [n + more for n, more in zip(lengths, counts, strict=True)]
        assert plan.cu_seqlens_q.diff().tolist() == counts
        assert plan.positions.tolist() == [p for n, m in zip(lengths, counts, strict=True) for p in range(n, n + m)]
        numbers = list(range(self.next_number, self.next_number + sum(counts)))
        self.next_number += sum(counts)
        rows = torch.tensor(numbers, dtype=torch.float32)[:, None, None] + torch.rand(HEADS, DIM) * 0
        for layer in range(LAYERS):
            k_cache, v_cache = self.cache.k_cache[layer], self.cache.v_cache[layer]
            csrc.write_kv(rows + 0.25 * layer, -rows, k_cache, v_cache, plan.slots)
        for handle, count in zip(handles, counts, strict=True):
            self.written[handle] += numbers[:count]
            del numbers[:count]

    @precondition(lambda self: self.written)
    @rule(data=st.data(), n=st.integers(0, 4))
    def fork(self, data: st.DataObject, n: int) -> None:
        handle = data.draw(st.sampled_from(sorted(self.written)))
        if len(self.written[handle]) % 3 and n > self.cache.free_blocks:
            with pytest.raises(RuntimeError, match=r"only \d+ are free"):
                self.cache.fork(handle, n)
            return
        children = self.cache.fork(handle, n)
        assert len(set(children) - set(self.written)) == n
        self.written.update((child, list(self.written[handle])) for child in children)
        self.held.update((child, -(-len(self.written[handle]) // 3)) for child in children)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        handles = data.draw(st.lists(st.sampled_from(sorted(self.written)), unique=True, max_size=3))
        self.cache.release(handles)
        for handle in handles:
            del self.written[handle], self.held[handle]
            with pytest.raises(ValueError, match="was released before"):
                self.cache.release([handle])

    @invariant()
    def reads_back(self) -> None:
        counts = [0] * self.cache.num_blocks
        for handle, numbers in self.written.items():
            blocks = self.cache.blocks(handle)
            assert self.cache.length(handle) == len(numbers) and len(blocks) == self.held[handle]
            for block in blocks:
                counts[block] += 1
            expected = torch.tensor(numbers, dtype=torch.float32)
            for layer in range(LAYERS):
                k = self.cache.k_cache[layer, blocks].transpose(1, 2).flatten(0, 1)[: len(numbers)]
                v = self.cache.v_cache[layer, blocks].transpose(1, 2).flatten(0, 1)[: len(numbers)]
                assert (k == expected[:, None, None] + 0.25 * layer).all() and (v == -expected[:, None, None]).all()
        assert counts == self.cache.ref_counts()
        assert self.cache.free_blocks == counts.count(0)

    def teardown(self) -> None:
        self.cache.release(list(self.written))
        assert self.cache.free_blocks == self.cache.num_blocks
        self.cache.close()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30)


def test_stale_sequences_are_refused() -> None:
    cache = PagedKVCache(1, 8, 1, 4, block_size=4)
    cache.policy_version = 1
    old, new = cache.prefill(), cache.prefill()
    assert cache.version(old) == -1
    cache.extend([old], [5])
    cache.policy_version = 2
    with pytest.raises(RuntimeError, match=r"written by policy version 1 and cannot be extended under version 2"):
        cache.extend([new, old], [1, 1])
    assert cache.length(new) == 0 and cache.length(old) == 5
    cache.extend([new], [1])
    assert cache.version(new) == 2 and cache.version(old) == 1 and cache.version(cache.fork(old, 1)[0]) == 1


def test_misuse_names_the_handle() -> None:
    cache = PagedKVCache(1, 4, 1, 4)
    handle = cache.prefill()
    for call in (lambda: cache.release([12345]), lambda: cache.fork(-1, 2), lambda: cache.extend([12345], [1])):
        with pytest.raises(ValueError, match="unknown sequence handle"):
            call()
    with pytest.raises(ValueError, match="named twice in one call"):
        cache.release([handle, handle])
    with pytest.raises(ValueError, match="cannot extend a sequence of 0 tokens by -1"):
        cache.extend([handle], [-1])
    with pytest.raises(RuntimeError, match="counts has 2 entries, expected 1"):
        cache.extend([handle], [1, 2])
    cache.release([handle])
    reused = cache.prefill()
    with pytest.raises(ValueError, match="was released before"):
        cache.extend([handle], [1])
    assert cache.length(reused) == 0
    cache.close()
    with pytest.raises(RuntimeError, match="does not exist or was closed"):
        cache.prefill()
    with pytest.raises(ValueError, match="at least one block"):
        PagedKVCache(1, 0, 1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_and_copy_equal_the_reference(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    caches = [torch.zeros(2, 9, 3, 5, 10, dtype=dtype) for _ in range(4)]
    fused = torch.randn(20, 3, 2, 10, generator=random).to(dtype)
    k, v = fused[:, :, 0], fused[:, :, 1]
    slots = torch.randperm(45, generator=random)[:20]
    pairs = torch.tensor([[0, 8], [3, 7]])
    for module, (k_cache, v_cache) in ((csrc, caches[:2]), (reference, caches[2:])):
        module.write_kv(k, v, k_cache[1], v_cache[1], slots)
        module.copy_blocks(k_cache, v_cache, pairs)
    assert caches[0].any() and torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_wrong_writes_change_nothing() -> None:
    k_cache, v_cache = torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 3, 8)
    rows = torch.ones(2, 2, 8)
    bad = [
        ((rows, rows, k_cache, v_cache, torch.tensor([0, 12])), "slot 12 of token 1 lies outside the cache of 12"),
        ((rows, rows, k_cache, v_cache, torch.tensor([-1, 0])), "slot -1 of token 0"),
        ((rows[:1], rows, k_cache, v_cache, torch.tensor([0, 1])), r"k is \[1, 2, 8\], expected \[2, 2, 8\]"),
        ((rows.half(), rows, k_cache, v_cache, torch.tensor([0, 1])), "of the cache's type Float"),
        ((rows, rows, k_cache, v_cache[:3], torch.tensor([0, 1])), "equal in shape and type"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            csrc.write_kv(*arguments)
    with pytest.raises(RuntimeError, match="block 4 lies outside the cache of 4 blocks"):
        csrc.copy_blocks(k_cache[None], v_cache[None], torch.tensor([[0, 4]]))
    assert not k_cache.any() and not v_cache.any()
