"""The CUDA kernels' own sources, run on the CPU, against the CPU's ops: index arithmetic, layouts of the tensor cores'
operands, barriers, merging and truncation. What only a GPU can show is in test_cuda_ops.py."""

import math
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc.advancing import decoding_rows, drawings
from tests.csrc.emulated_kernels import EmulatedKernels, build
from tests.csrc.test_attention import EPS, Setting
from tests.csrc.test_grouped_attention import decoding
from tests.csrc.test_rotary import CASES, assert_rounded_once, problem, results
from tests.csrc.test_sampler import arguments
from thinktwice_fast.model import csrc, reference

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="the emulation needs fused multiply-adds"
)


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    folder = tmp_path_factory.getbasetemp() / "emulated-kernels"
    if not folder.exists():
        folder.mkdir()
        build(folder, os.environ.get("CXX", "g++"))
    return EmulatedKernels(folder / "kernels.so", backwards=request.param)


def tolerance(dtype: torch.dtype, values: Tensor) -> float:
    """Weights and result are each rounded to the type; float32 sums add little."""
    return (3 * EPS[dtype] if dtype != torch.float32 else 2e-5) * values.nan_to_num().abs().max().item()


@pytest.mark.parametrize(
    ("dtype", "dim", "kv_heads", "group", "block_size", "window"),
    [
        (torch.float32, 16, 2, 2, 16, 0),
        (torch.bfloat16, 24, 1, 5, 7, 100),
        (torch.float16, 64, 1, 20, 16, 0),
        (torch.float32, 80, 2, 3, 16, 300),
        (torch.bfloat16, 128, 1, 4, 32, 0),
        (torch.float16, 256, 1, 1, 1, 70),
    ],
)
def test_attention(
    kernels: EmulatedKernels,
    dtype: torch.dtype,
    dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    window: int,
) -> None:
    """Prefill, a chunk in the middle of a sequence, decoding and a sequence without queries, in one batch."""
    lengths = [70, 290, 40, 300, 8]
    setting = Setting(lengths, kv_heads * group, kv_heads, dim, block_size=block_size, dtype=dtype)
    setting.step([1, 2, 3, 4], [280, 39, 299, 8])
    plan, q, _ = setting.step([0, 1, 2, 3, 4], [70, 10, 1, 1, 0])
    caches = (setting.cache.k_cache[0], setting.cache.v_cache[0])
    tables = (plan.block_tables, plan.context_lens, plan.cu_seqlens_q)
    wide = (caches[0].double(), caches[1].double())
    exact = reference.paged_attention(q.double(), *wide, *tables, 0.3, window)
    got = kernels.paged_attention(q, *caches, *tables, 0.3, window)
    torch.testing.assert_close(got.double(), exact, atol=tolerance(dtype, caches[1]), rtol=0)
    in_parts = kernels.paged_attention(q, *caches, *tables, 0.3, window, items=2)
    assert torch.equal(in_parts, got)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 100), (torch.bfloat16, 0), (torch.float16, 100)])
def test_bits_depend_on_neither_batch_nor_chunking(kernels: EmulatedKernels, dtype: torch.dtype, window: int) -> None:
    lengths = [530, 70]
    setting = Setting(lengths, 3, 1, 40, dtype=dtype)
    plan, q, _ = setting.step([0, 1], lengths)
    caches = (setting.cache.k_cache[0], setting.cache.v_cache[0])
    whole = kernels.paged_attention(
        q, *caches, plan.block_tables, plan.context_lens, plan.cu_seqlens_q, 0.3, window
    ).split(lengths)
    for sequence, ends in ((0, [0, 256, 300, 301, 530]), (1, [0, 1, 69, 70])):
        for start, end in pairwise(ends):
            part = kernels.paged_attention(
                setting.q[sequence][start:end],
                *caches,
                plan.block_tables[sequence : sequence + 1],
                torch.tensor([end], dtype=torch.int32),
                torch.tensor([0, end - start], dtype=torch.int32),
                0.3,
                window,
            )
            assert torch.equal(part, whole[sequence][start:end])


@pytest.mark.parametrize(
    ("dtype", "dim", "kv_heads", "group", "window"),
    [(torch.float32, 64, 2, 1, 0), (torch.bfloat16, 128, 1, 7, 290), (torch.float16, 256, 1, 2, 0)],
)
def test_grouped_decoding_has_the_bits_of_each_sequence_alone(
    kernels: EmulatedKernels, dtype: torch.dtype, dim: int, kv_heads: int, group: int, window: int
) -> None:
    given = decoding(
        [530, 300, 20], [[30, 5, 300], [9] * 12, [1]], kv_heads=kv_heads, group=group, dim=dim, dtype=dtype
    )
    starts = torch.arange(len(given.q) + 1, dtype=torch.int32)
    common = (given.q, given.k_cache, given.v_cache, given.block_tables, given.context_lens)
    alone = kernels.paged_attention(*common, starts, 0.3, window)
    torch.testing.assert_close(alone, given.alone(window), atol=tolerance(dtype, given.v_cache), rtol=0)
    tables = (given.group_offsets, given.shared_blocks)
    assert torch.equal(kernels.grouped_decode_attention(*common, *tables, 0.3, window), alone)
    # With memory for the parts of a few sequences at a time, whose borders cut groups.
    assert torch.equal(kernels.grouped_decode_attention(*common, *tables, 0.3, window, items=2), alone)


def test_groups_without_members_and_wide_tables(kernels: EmulatedKernels) -> None:
    """As in a captured step, which has room for more groups and longer sequences than there are."""
    given = decoding([530, 300, 20], [[30, 5], [9] * 3, [1]], dtype=torch.bfloat16)
    tables = (given.context_lens, given.group_offsets, given.shared_blocks)
    common = (given.q, given.k_cache, given.v_cache)
    expected = kernels.grouped_decode_attention(*common, given.block_tables, *tables, 0.3)
    wide = torch.full((6, 64), -1, dtype=torch.int32)
    wide[:, : given.block_tables.shape[1]] = given.block_tables
    offsets = torch.tensor([0, 2, 5, 6, 6, 6], dtype=torch.int32)
    shared = torch.tensor([530 // 16, 300 // 16, 0, 0, 0], dtype=torch.int32)
    got = kernels.grouped_decode_attention(*common, wide, given.context_lens, offsets, shared, 0.3)
    assert torch.equal(got, expected)


def test_the_shared_part_is_read_once(kernels: EmulatedKernels) -> None:
    """Through the first member's table: the others' are not looked at, and may name anything."""
    given = decoding([530], [[30, 5, 9]], dtype=torch.bfloat16)
    tables = (given.context_lens, given.group_offsets, given.shared_blocks)
    expected = kernels.grouped_decode_attention(given.q, given.k_cache, given.v_cache, given.block_tables, *tables, 0.3)
    given.block_tables[1:, : 512 // 16] = -1
    got = kernels.grouped_decode_attention(given.q, given.k_cache, given.v_cache, given.block_tables, *tables, 0.3)
    assert torch.equal(got, expected)


def test_the_list_of_parts(kernels: EmulatedKernels) -> None:
    """Every row and split once, those of a group's members together, largest first."""
    group = 7
    given = decoding(
        [530, 300, 20], [[30, 5, 300], [9] * 12, [1]], kv_heads=1, group=group, dim=16, dtype=torch.bfloat16
    )
    kernels.grouped_decode_attention(**vars(given), scale=0.3)
    count, offsets, lens = int(kernels.parts[0, 0]), given.group_offsets.tolist(), given.context_lens.tolist()
    covered: Counter[tuple[int, int]] = Counter()  # of row and split
    sizes = []
    for run, first, rows, split in kernels.parts[1 : count + 1].tolist():
        start = run if run >= 0 else offsets[-1 - run]
        covered.update((start * group + row, split) for row in range(first, first + rows))
        sizes.append(-(-min(256, lens[start] - 256 * split) // 64) * -(-rows // 16))
    assert set(covered.values()) == {1}
    assert covered.keys() == {
        (row, split) for row in range(len(lens) * group) for split in range(-(-lens[row // group] // 256))
    }
    assert sizes == sorted(sizes, reverse=True)
    assert count == 2 + 2 + sum(
        -(-length // 256) - shared for length, shared in zip(lens, [2] * 3 + [1] * 12 + [0], strict=True)
    )
    assert (kernels.parts[count + 1 :] == -1).all()


@pytest.mark.parametrize("dtype", list(EPS))
def test_nan_in_a_query_shows(kernels: EmulatedKernels, dtype: torch.dtype) -> None:
    setting = Setting([40], 2, 1, 16, dtype=dtype)
    plan, q, _ = setting.step([0], [40])
    q[7, 1, 3] = math.nan
    caches = (setting.cache.k_cache[0], setting.cache.v_cache[0])
    out = kernels.paged_attention(q, *caches, plan.block_tables, plan.context_lens, plan.cu_seqlens_q, 0.3)
    assert out[7, 1].isnan().all()
    assert out.isnan().sum() == 16


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize(("dim", "offset"), [(16, 0), (16, 1), (7, 0), (128, 0)])
def test_write_kv(kernels: EmulatedKernels, dtype: torch.dtype, dim: int, offset: int) -> None:
    random = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 5, 3, 4, dim, generator=random).to(dtype)
    rows = torch.randn(2, 6, 3, dim + 2, generator=random).to(dtype)[..., offset : offset + dim]
    slots = torch.tensor([3, 19, 4, 0, 11, 7])
    expected, got = cache.clone(), cache.clone()
    csrc.write_kv(rows[0], rows[1], expected[0], expected[1], slots)
    kernels.write_kv(rows[0], rows[1], got[0], got[1], slots)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("case", CASES)
def test_rotary_write_kv(kernels: EmulatedKernels, dtype: torch.dtype, case: dict[str, Any]) -> None:
    given = problem(**case, dtype=dtype)
    exact = results(reference.rotary_write_kv, given.double())
    assert_rounded_once(results(kernels.rotary_write_kv, given), exact, dtype)


@pytest.mark.parametrize("dim", [4, 3])
def test_copy_blocks_takes_the_pairs_in_order(kernels: EmulatedKernels, dim: int) -> None:
    random = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 3, 6, 2, 100, dim, generator=random).bfloat16()
    pairs = torch.tensor([[0, 1], [1, 2], [5, 0]])
    expected, got = cache.clone(), cache.clone()
    csrc.copy_blocks(expected[0], expected[1], pairs)
    kernels.copy_blocks(got[0], got[1], pairs)
    assert torch.equal(got, expected)
    assert torch.equal(got[:, :, 2], cache[:, :, 0])


def check_sampler(kernels: EmulatedKernels, given: dict[str, Any]) -> None:
    *got, statuses = kernels.sample(**given)
    expected = csrc.sample(**given)
    assert not statuses.any()
    assert torch.equal(got[0], expected.tokens)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 515), (torch.float32, 5000), (torch.bfloat16, 9001)],
)
def test_the_sampler_draws_the_tokens_of_the_cpu(kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int) -> None:
    """In bfloat16 many logits are equal, so that ids decide where top-k and top-p cut."""
    random = torch.Generator().manual_seed(vocabulary)
    n = 24
    logits = (torch.randn(n, vocabulary + 1, generator=random) * 3).to(dtype)[:, :vocabulary]
    logits[5:9, 1::3] = -math.inf

    def column(*values: float) -> list[float]:
        return [values[int(i)] for i in torch.randint(len(values), (n,), generator=random)]

    options: dict[str, Any] = {
        "temperature": column(0.0, 0.3, 1.0, 1.7),
        "top_k": [int(k) for k in column(0, 0, 1, 7, 20, 1000)],
        "top_p": column(1e-6, 0.3, 0.8, 0.95, 1.0, 1.0),
        "min_p": column(0.0, 0.0, 0.05, 0.5, 1.0),
    }
    check_sampler(kernels, arguments(logits, seed=-5, sample_ids=range(2**40, 2**40 + n), positions=7, **options))


def test_the_sampler_on_a_large_vocabulary(kernels: EmulatedKernels) -> None:
    logits = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) * 2
    check_sampler(kernels, arguments(logits, top_k=[0, 0, 50, 0], top_p=[1.0, 0.9, 0.9, 1.0], min_p=[0, 0, 0, 0.01]))


def test_ties_are_cut_by_id(kernels: EmulatedKernels) -> None:
    """Among equal tokens top-k and top-p keep the lowest ids, whatever the id's bits."""
    logits = torch.zeros(60, 5000)
    for options, kept in (({"top_k": 3000}, 3000), ({"top_p": 0.25}, 1250), ({"top_k": 4096, "top_p": 0.5}, 2048)):
        given = arguments(logits, **options)
        tokens = kernels.sample(**given)[0]
        assert torch.equal(tokens, csrc.sample(**given).tokens)
        assert 0.9 * kept < tokens.max().item() < kept


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"temperature": -1.0}, 1),
        ({"temperature": math.nan}, 1),
        ({"top_k": -1}, 2),
        ({"top_p": 0.0}, 3),
        ({"min_p": 1.5}, 4),
        ({"positions": 2**32}, 5),
    ],
)
def test_options_out_of_range(kernels: EmulatedKernels, options: dict[str, Any], status: int) -> None:
    tokens, *numbers, statuses = kernels.sample(**arguments(torch.zeros(2, 4), **options))
    assert statuses.tolist() == [status] * 2
    assert tokens.tolist() == [-1, -1]
    assert all(column.isnan().all() for column in numbers)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_logits(kernels: EmulatedKernels, value: float) -> None:
    logits = torch.zeros(3, 70)
    logits[1, 65 if value != -math.inf else slice(None)] = value
    tokens, *numbers, statuses = kernels.sample(**arguments(logits))
    assert statuses.tolist() == [0, 6, 0]
    refused = statuses != 0
    assert torch.equal(tokens < 0, refused)
    assert all(torch.equal(column.isnan(), refused) for column in numbers)


def test_rows_advance(kernels: EmulatedKernels) -> None:
    expected, got = decoding_rows(300), decoding_rows(300)
    for drawn in (None, *drawings(300, steps=4)):
        csrc.advance(drawn, *expected)
        kernels.advance(drawn, *got)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got[4:], expected[4:], strict=True))


@pytest.mark.parametrize("launches", range(4))
def test_a_launch_that_fails_is_reported(kernels: EmulatedKernels, launches: int) -> None:
    """Whichever of an op's launches it is; later ones are not made."""
    given = decoding([300], [[5, 9]], dtype=torch.bfloat16)
    tables = (given.block_tables, given.context_lens)
    shared = (given.group_offsets, given.shared_blocks)
    starts = torch.arange(3, dtype=torch.int32)
    row = torch.zeros(1, given.k_cache.shape[1], given.k_cache.shape[3], dtype=torch.bfloat16)
    calls: list[tuple[int, Callable[[], object]]] = [
        (4, lambda: kernels.grouped_decode_attention(given.q, given.k_cache, given.v_cache, *tables, *shared, 0.3)),
        (4, lambda: kernels.paged_attention(given.q, given.k_cache, given.v_cache, *tables, starts, 0.3)),
        (1, lambda: kernels.write_kv(row, row, given.k_cache, given.v_cache, torch.tensor([3]))),
        (1, lambda: kernels.copy_blocks(given.k_cache[None], given.v_cache[None], torch.tensor([[0, 1]]))),
        (4, lambda: kernels.sample(**arguments(torch.zeros(2, 4)))),
        (1, lambda: kernels.advance(None, *decoding_rows(2))),
    ]
    kernels.launches_left = launches
    try:
        for made, call in calls:
            if launches < made:
                with pytest.raises(RuntimeError, match="CUDA error 1"):
                    call()
            else:
                call()
    finally:
        kernels.launches_left = -1
