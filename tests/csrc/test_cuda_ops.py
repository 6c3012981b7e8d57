"""The CUDA ops on a GPU: against the CPU's ops and the plain-torch versions, and what must not change their bits."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.csrc.advancing import decoding_rows, drawings
from tests.csrc.test_attention import EPS, Setting
from tests.csrc.test_grouped_attention import Decoding, decoding
from tests.csrc.test_rotary import CASES, Given, assert_rounded_once, problem, results
from tests.csrc.test_sampler import arguments
from thinktwice_fast.model import csrc, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "paged_attention" in csrc.torch_versions,
        reason="needs a GPU and the extension built with CUDA",
    ),
]
DTYPES = list(EPS)
GPU = torch.device("cuda")


def on_gpu(given: Decoding) -> Decoding:
    return Decoding(**{name: tensor.to(GPU) for name, tensor in vars(given).items()})


def tolerance(dtype: torch.dtype, values: torch.Tensor) -> float:
    """Weights and result are each rounded to the type; float32 sums add little."""
    return (3 * EPS[dtype] if dtype != torch.float32 else 2e-5) * values.nan_to_num().abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group", "window"), [(2, 4, 0), (1, 20, 700), (3, 1, 50)])
def test_attention(dtype: torch.dtype, dim: int, kv_heads: int, group: int, window: int) -> None:
    setting = Setting([700, 2900, 40, 3000, 8], kv_heads * group, kv_heads, dim, dtype=dtype)
    setting.step([1, 2, 3, 4], [2800, 39, 2999, 8])
    plan, q, _ = setting.step([0, 1, 2, 3, 4], [700, 100, 1, 1, 0])
    caches = (setting.cache.k_cache[0].to(GPU), setting.cache.v_cache[0].to(GPU))
    tables = (plan.block_tables.to(GPU), plan.context_lens.to(GPU), plan.cu_seqlens_q.to(GPU))
    wide = (caches[0].double(), caches[1].double())
    exact = reference.paged_attention(q.to(GPU).double(), *wide, *tables, 0.3, window)
    got = csrc.paged_attention(q.to(GPU), *caches, *tables, 0.3, window)
    torch.testing.assert_close(got.double(), exact, atol=tolerance(dtype, caches[1]), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "window"), [(64, 0), (128, 300), (256, 0)])
def test_bits_depend_on_neither_batch_nor_chunking(dtype: torch.dtype, dim: int, window: int) -> None:
    setting = Setting([1500, 700], 8, 2, dim, dtype=dtype)
    plan, q, _ = setting.step([0, 1], [1500, 700])
    caches = (setting.cache.k_cache[0].to(GPU), setting.cache.v_cache[0].to(GPU))
    tables = (plan.block_tables.to(GPU), plan.context_lens.to(GPU), plan.cu_seqlens_q.to(GPU))
    whole = csrc.paged_attention(q.to(GPU), *caches, *tables, 0.3, window)[:1500]
    for start, end in pairwise([0, 1, 256, 300, 301, 1100, 1101, 1500]):
        length, starts = (torch.tensor(x, dtype=torch.int32, device=GPU) for x in ([end], [0, end - start]))
        part = csrc.paged_attention(
            setting.q[0][start:end].to(GPU), *caches, tables[0][:1], length, starts, 0.3, window
        )
        assert torch.equal(part, whole[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group", "window"), [(64, 2, 1, 0), (128, 8, 4, 0), (128, 1, 7, 290), (256, 1, 2, 0)]
)
def test_grouped_decoding_has_the_bits_of_each_sequence_alone(
    dtype: torch.dtype, dim: int, kv_heads: int, group: int, window: int
) -> None:
    given = decoding(
        [2030, 300, 20], [[30, 5, 300], [9] * 40, [1]], kv_heads=kv_heads, group=group, dim=dim, dtype=dtype
    )
    there = on_gpu(given)
    starts = torch.arange(len(given.q) + 1, dtype=torch.int32, device=GPU)
    common = (there.q, there.k_cache, there.v_cache, there.block_tables, there.context_lens)
    alone = csrc.paged_attention(*common, starts, 0.3, window)
    torch.testing.assert_close(alone.cpu(), given.alone(window), atol=tolerance(dtype, given.v_cache), rtol=0)
    tables = (there.group_offsets, there.shared_blocks)
    assert torch.equal(csrc.grouped_decode_attention(*common, *tables, 0.3, window), alone)
    # With the lists that a step makes once for all its layers.
    sequences = (there.q, there.k_cache, there.block_tables, there.context_lens)
    parts = csrc.list_parts(*sequences, starts, window=window)
    assert torch.equal(csrc.paged_attention(*common, starts, 0.3, window, parts), alone)
    parts = csrc.list_parts(*sequences, None, *tables, window)
    assert torch.equal(csrc.grouped_decode_attention(*common, *tables, 0.3, window, parts), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_ops(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 3, 40, 2, 16, 80, generator=random).to(dtype)  # [k or v, L, B, Hkv, bs, D]
    rows = torch.randn(2, 2, 90, 80, generator=random).to(dtype).transpose(1, 2)
    slots, pairs = torch.randperm(640, generator=random)[:90], torch.tensor([[0, 1], [1, 2], [39, 0]])
    there = cache.to(GPU)
    csrc.write_kv(rows[0], rows[1], cache[0, 1], cache[1, 1], slots)
    csrc.copy_blocks(cache[0], cache[1], pairs)
    csrc.write_kv(rows[0].to(GPU), rows[1].to(GPU), there[0, 1], there[1, 1], slots.to(GPU))
    csrc.copy_blocks(there[0], there[1], pairs.to(GPU))
    assert torch.equal(there.cpu(), cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, {"heads": 32, "kv_heads": 8, "dim": 128, "norm": "each head", "tokens": 35}])
def test_rotary_write_kv(dtype: torch.dtype, case: dict[str, Any]) -> None:
    given = problem(**case, dtype=dtype)
    exact = results(reference.rotary_write_kv, given.double())
    parts: dict[str, Any] = {name: x.to(GPU) if isinstance(x, torch.Tensor) else x for name, x in vars(given).items()}
    parts["q"], parts["k"], parts["v"] = _side_by_side(given)
    got = [part.cpu() for part in results(csrc.rotary_write_kv, Given(**parts))]
    assert_rounded_once(got, exact, dtype)


def _side_by_side(given: Given) -> list[torch.Tensor]:
    """Queries, keys and values on the GPU with the strides they have here."""
    storage = given.q.new_empty(0).set_(given.q.untyped_storage()).to(GPU)
    return [storage.as_strided(x.shape, x.stride(), x.storage_offset()) for x in (given.q, given.k, given.v)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 515, 151_936])
def test_the_sampler_draws_the_tokens_of_the_cpu(dtype: torch.dtype, vocabulary: int) -> None:
    random = torch.Generator().manual_seed(0)
    n = 64
    logits = (torch.randn(n, vocabulary, generator=random) * 3).to(dtype)
    mixed: dict[str, Any] = {
        "temperature": [0.0, 0.3, 1.0, 1.7] * 16,
        "top_k": [0] * 16 + [7] * 16 + [0] * 16 + [1000] * 16,
        "top_p": [1.0] * 32 + [0.9, 0.5] * 16,
        "min_p": ([0.0] * 7 + [0.05]) * 8,
    }
    given = arguments(logits, seed=-5, positions=range(n), **mixed)
    there = {name: value if name == "seed" else value.to(GPU) for name, value in given.items()}
    got, expected = csrc.sample(**there), csrc.sample(**given)
    assert torch.equal(got.tokens.cpu(), expected.tokens)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=3e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature of row 0 is -1"),
        ({"top_k": -1}, "top_k of row 0 is -1"),
        ({"top_p": 0.0}, "top_p of row 0 is 0, must be above 0"),
        ({"min_p": 1.5}, "min_p of row 0 is 1.5"),
        ({"positions": 2**32}, "position of row 0 is 4294967296"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    given = arguments(torch.zeros(1, 4), **options)
    with pytest.raises(RuntimeError, match=message):
        csrc.sample(**{name: value if name == "seed" else value.to(GPU) for name, value in given.items()})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_name_the_row(value: float) -> None:
    logits = torch.zeros(3, 70)
    logits[1, 65] = value
    given = arguments(logits, sample_ids=range(40, 43), positions=7)
    there = {name: tensor if name == "seed" else tensor.to(GPU) for name, tensor in given.items()}
    with pytest.raises(RuntimeError, match=r"logits of row 1 \(sample 41, position 7\) hold NaN or \+inf, or nothing"):
        csrc.sample(**there)
    there["logits"].zero_()
    assert torch.equal(csrc.sample(**there).tokens.cpu(), csrc.sample(**given | {"logits": torch.zeros(3, 70)}).tokens)


def test_rows_advance() -> None:
    expected = decoding_rows(300)
    got = decoding_rows(300).to("cuda")
    for drawn in (None, *drawings(300, steps=4)):
        csrc.advance(drawn, *expected)
        csrc.advance(None if drawn is None else csrc.Sampled(*(column.to(GPU) for column in drawn)), *got)
        for ours, theirs in zip(got[4:], expected[4:], strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_a_graph_replays_the_ops() -> None:
    """Nothing in a decoding step waits for the GPU, nor depends on where its arguments were when it was captured."""
    given = on_gpu(decoding([530], [[30, 5, 300]], dim=128, dtype=torch.bfloat16))
    logits = {
        name: torch.as_tensor([value] if name == "seed" else value).to(GPU)
        for name, value in arguments(torch.randn(3, 999)).items()
    }

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return given.grouped(), csrc.draw(**logits).tokens

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for result in got:
        result.zero_()
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
