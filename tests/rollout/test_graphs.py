"""Decoding through captured steps: the logits of the plain forward pass, whatever size of graph a batch falls into.

On the CPU a recording of the ops that ran stands for the CUDA graph: it repeats them on the same memory, without
Python, and refuses what no graph can hold.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.lent_memory import Lent
from tests.small_models import FAMILIES, VOCABULARY, own_model
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.paged import LentMemory, PagedKVCache, Plan
from thinktwice_fast.model.policy import Policy, attention_heads, linear_head
from thinktwice_fast.rollout.graphs import GraphRunner, Shape, block_buckets, group_room, row_buckets

# They make the host wait for values, or bring values from it.
UNFIT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::lift_fresh"}
MAX_TOKENS = 600


class Recording(TorchDispatchMode):
    """Keeps every op that runs with the tensors it had."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in UNFIT, f"no graph can hold {func._schema.name}"
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Recorder:
    """Stands for ``CudaCapture``."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        with Recording() as recording:
            step()
        return recording.replay


class Pair:
    """A captured and a plain way through one model, each with its own cache."""

    def __init__(
        self,
        family: str = "qwen3",
        max_sequences: int = 40,
        device: str = "cpu",
        capture: Any = None,
        memory: Callable[[int], LentMemory] | None = None,
    ):
        model = own_model(family).to(device).requires_grad_(False)
        _, _, dim = attention_heads(model)
        self.caches = [
            PagedKVCache(3, 300, 2, dim, spare_blocks=spare, memory=own, device=device)
            for spare, own in ((1, memory), (0, None))
        ]
        for cache in self.caches:
            cache.k_cache.zero_()
            cache.v_cache.zero_()
        self.policy = Policy(model)
        self.runner = GraphRunner(self.policy, self.caches[0], max_sequences, MAX_TOKENS, capture)
        self.device = torch.device(device)
        self.random = torch.Generator().manual_seed(0)

    def prompts(self, lengths: list[int], members: list[int]) -> list[int]:
        """Sequences that share a prompt each; handles are the same in both caches."""
        handles = []
        for length, count in zip(lengths, members, strict=True):
            handle, _ = (cache.prefill() for cache in self.caches)
            self.check([handle], [length])
            forked, _ = (cache.fork(handle, count - 1) for cache in self.caches)
            handles += [handle, *forked]
        return handles

    def check(self, handles: list[int], counts: list[int], last: list[int] | None = None) -> Plan:
        """Both ways, with their logits compared; gives the plan of the captured one."""
        tokens = torch.randint(VOCABULARY, (sum(counts),), generator=self.random).tolist()
        last = list(range(len(tokens))) if last is None else last
        plans = [cache.extend(handles, counts) for cache in self.caches]
        assert plans[0] is not None and plans[1] is not None
        got = self.runner.logits(tokens, plans[0], last)
        with torch.inference_mode():
            expected = self.policy(
                torch.tensor(tokens, device=self.device), plans[1].positions, PagedAttention(self.caches[1], plans[1]),
                torch.tensor(last, device=self.device), linear_head,
            )  # fmt: skip
        assert got.shape == expected.shape and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        return plans[0]


def test_captured_steps_outlive_memory_that_was_lent() -> None:
    recorder = Recorder()
    pair = Pair(capture=recorder, memory=Lent)
    lent = pair.caches[0]
    for _ in range(3):
        lent.take_memory()
        lent.k_cache[:, 300:], lent.v_cache[:, 300:] = 0, 0  # what rows that are left over read is finite
        handles = pair.prompts([70, 20], [3, 2])
        pair.check(handles, [1] * 5)
        with pytest.raises(AssertionError, match="would be lost"):
            lent.lend_memory()
        for cache in pair.caches:
            cache.release(handles)
        lent.lend_memory()
    assert recorder.captured == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_give_the_logits_of_a_forward_pass(family: str) -> None:
    """Batches that shrink and grow, over several sizes of graphs, each captured once and replayed."""
    recorder = Recorder()
    pair = Pair(family, capture=recorder)
    handles = pair.prompts([70, 20, 130, 3], [3, 2, 4, 1])
    for n in (10, 10, 9, 7, 10, 3, 1, 1, 8):
        pair.check(handles[:n], [1] * n)
    shapes = {shape.rows for shape in pair.runner._graphs}
    assert shapes == {1, 4, 8, 16} and recorder.captured == len(pair.runner._graphs) == 4


def test_a_sequence_grows_through_the_sizes_of_tables() -> None:
    pair = Pair(capture=Recorder())
    handles = pair.prompts([250], [2])
    for _ in range(10):
        pair.check(handles, [1, 1])
    pair.check(handles, [260, 3])
    pair.check(handles, [1, 1])
    assert list(pair.runner._graphs) == [Shape(2, 16, True), Shape(2, 32, True), Shape(2, 38, True)]


def test_rows_left_over_touch_nothing() -> None:
    pair = Pair(capture=Recorder())
    handles = pair.prompts([40], [5])
    pair.check(handles, [1] * 5)
    before = [cache.clone() for cache in (pair.caches[0].k_cache, pair.caches[0].v_cache)]
    plan = pair.check(handles[:3], [1] * 3)
    written = set((plan.slots // 16).tolist())
    for old, new in zip(before, (pair.caches[0].k_cache, pair.caches[0].v_cache), strict=True):
        changed = (old != new).flatten(2).any(2)[0].nonzero().flatten().tolist()
        assert written <= set(changed) <= written | set(pair.caches[0].spare_blocks)


def test_groups_that_change_and_rows_that_are_left_over() -> None:
    """The buffers of one graph hold fewer groups after more, and none that remain of before."""
    pair = Pair(max_sequences=8, capture=Recorder())
    handles = pair.prompts([70, 100, 5, 64], [2, 2, 1, 2])
    for n in (7, 4, 5, 7, 2):
        plan = pair.check(handles[:n], [1] * n)
        assert plan.shared_blocks is not None
    alone = [handles[0], handles[2], handles[4]]
    pair.check(alone, [1] * 3)
    assert set(pair.runner._graphs) == {
        Shape(8, 16, True), Shape(4, 16, True), Shape(2, 16, True), Shape(4, 16, False)
    }  # fmt: skip


def test_other_batches_run_as_they_come() -> None:
    recorder = Recorder()
    pair = Pair(max_sequences=4, capture=recorder)
    handles = pair.prompts([30, 590], [5, 1])
    pair.check(handles[:2], [1, 7])  # a chunk of a prompt among them
    pair.check(handles[:5], [1] * 5)  # more than max_sequences
    pair.check(handles[:2], [3, 2], last=[2, 4])
    pair.check(handles[4:], [1, 19])  # longer than max_tokens from here on
    pair.check(handles[4:], [1, 1])
    assert recorder.captured == 0
    pair.check(handles[:3], [1, 1, 1], last=[0, 2])
    assert recorder.captured == 1


def test_changed_weights_are_read_at_the_next_replay() -> None:
    pair = Pair(capture=Recorder())
    handles = pair.prompts([30], [2])
    pair.check(handles, [1, 1])
    with torch.no_grad():
        for parameter in pair.policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=pair.random) * 0.1)
    pair.runner.refresh()
    pair.check(handles, [1, 1])
    assert len(pair.runner._graphs) == 1


@pytest.mark.parametrize("most", [1, 3, 8, 20, 100, 256])
def test_every_batch_and_table_has_its_size(most: int) -> None:
    for sizes in (row_buckets(most), block_buckets(most, 16), block_buckets(most, 512)):
        assert sizes == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] == most
    assert row_buckets(200) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 200]
    assert block_buckets(100, 16) == [16, 32, 64, 100]
    assert group_room(most) >= most // 2 + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(family: str) -> None:
    pair = Pair(family, device="cuda")
    handles = pair.prompts([270, 20, 300, 3], [3, 2, 4, 1])
    for n in (10, 10, 9, 7, 10, 3, 1, 1, 8):
        pair.check(handles[:n], [1] * n)
    assert len(pair.runner._graphs) > 1
