"""Which decoding sequences a plan puts together, and that attention then has the bits it has without."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinktwice_fast.model import paged
from thinktwice_fast.model.paged import PagedKVCache, Plan

BLOCK = 16


def decode(cache: PagedKVCache, handles: list[int]) -> Plan:
    plan = cache.extend(handles, [1] * len(handles))
    assert plan is not None
    return plan


def forks(cache: PagedKVCache, prompts: list[int], members: list[int]) -> list[int]:
    """Sequences of a prompt each and its forks, one after another."""
    handles = []
    for length, count in zip(prompts, members, strict=True):
        prompt = cache.prefill()
        plan = cache.extend([prompt], [length])
        assert plan is not None
        handles += [prompt, *cache.fork(prompt, count - 1)]
    return handles


def groups(plan: Plan) -> tuple[list[int], list[int]] | None:
    if plan.group_offsets is None or plan.shared_blocks is None:
        return None
    return plan.group_offsets.tolist(), plan.shared_blocks.tolist()


def test_neighbours_with_a_long_enough_prefix_are_a_group() -> None:
    cache = PagedKVCache(1, 100, 1, 4)
    handles = forks(cache, [70, 63, 64, 300, 20], [3, 2, 2, 1, 4])
    # 70 tokens share 4 blocks of 16 = 64 keys; 63 share 48, too few; what shares nothing stands together.
    assert groups(decode(cache, handles)) == ([0, 3, 5, 7, 12], [4, 0, 4, 0])
    assert groups(decode(cache, handles[::-1])) == ([0, 5, 7, 9, 12], [0, 4, 0, 4])
    assert groups(decode(cache, handles[:2])) == ([0, 2], [4])
    assert groups(decode(cache, [handles[0], handles[3], handles[1]])) is None


def test_only_decoding_sequences_are_grouped() -> None:
    cache = PagedKVCache(1, 100, 1, 4)
    handles = forks(cache, [100], [3])
    for counts in ([1, 1, 2], [2, 2, 2], [1, 0, 1]):
        plan = cache.extend(handles, counts)
        assert plan is not None and groups(plan) is None
    assert groups(decode(cache, handles)) == ([0, 3], [6])
    assert groups(decode(cache, [])) is None


def test_it_can_be_left_out() -> None:
    cache = PagedKVCache(1, 100, 1, 4, group_attention=False)
    assert groups(decode(cache, forks(cache, [100], [3]))) is None


def test_a_fork_of_a_fork_shares_more() -> None:
    """The first two decide how much; who shares less with them stands apart."""
    cache = PagedKVCache(1, 100, 1, 4)
    first, second = forks(cache, [64], [2])
    assert cache.extend([second], [64]) is not None
    third = cache.fork(second, 1)[0]
    assert groups(decode(cache, [second, third, first])) == ([0, 2, 3], [8, 0])
    assert groups(decode(cache, [first, second, third])) == ([0, 3], [4])


@settings(max_examples=40)
@given(st.data())
def test_attention_has_the_bits_it_has_without(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    prompts = [data.draw(st.integers(1, 300)) for _ in range(count)]
    members = [data.draw(st.integers(1, 5)) for _ in range(count)]
    window = data.draw(st.sampled_from([0, 0, 40, 1000]))
    outs = []
    for group_attention in (True, False):
        random = torch.Generator().manual_seed(0)
        cache = PagedKVCache(1, 100, 2, 8, group_attention=group_attention)
        cache.k_cache.copy_(torch.randn(cache.k_cache.shape, generator=random))
        cache.v_cache.copy_(torch.randn(cache.v_cache.shape, generator=random))
        plan = decode(cache, forks(cache, prompts, members))
        q, k, v = (torch.randn(sum(members), heads, 8, generator=random) for heads in (4, 2, 2))
        outs.append(cache.attend(0, plan, q, k, v, 0.3, window))
    assert torch.equal(*outs)


@pytest.mark.parametrize("window", [0, 100, 111, 112])
def test_shared_keys_are_read_together_unless_a_window_may_hide_them(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    counted = Mock(wraps=paged.grouped_decode_attention)
    monkeypatch.setattr(paged, "grouped_decode_attention", counted)
    cache = PagedKVCache(1, 20, 1, 8)
    cache.k_cache.zero_()
    cache.v_cache.zero_()
    plan = decode(cache, forks(cache, [100], [2]))  # 7 blocks of 16 hold up to 112 keys
    q, k = torch.randn(2, 2, 8), torch.randn(2, 1, 8)
    cache.attend(0, plan, q, k, k, 0.3, window)
    assert counted.call_count == (window in (0, 112))
