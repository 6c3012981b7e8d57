"""Chunks of captured steps, with one under way while the last is noted down: the draws of single steps, bit for bit.

On the CPU a recording of the ops that ran stands for the CUDA graph: it repeats them on the same memory, without
Python, and refuses what no graph can hold. Products whose rows do not depend on each other stand for all.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.lent_memory import Lent
from tests.rollout.drawing import LONGEST, Mix, as_text, draw, prompts, requests, tokens
from tests.small_models import FAMILIES, VOCABULARY, own_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model import csrc
from thinktwice_fast.model.arena import Arena
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import attention_heads
from thinktwice_fast.model.products import PackedProducts
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout import chunks
from thinktwice_fast.rollout.batch import Batch, NewTokens
from thinktwice_fast.rollout.chunks import group_room
from thinktwice_fast.rollout.engine import BLOCK_SIZE, Engine
from thinktwice_fast.rollout.graphs import CudaCapture, GraphRunner, block_buckets, row_buckets
from thinktwice_fast.rollout.modules import ModuleRunner

# They make the host wait for values, or bring values from it.
UNFIT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::lift_fresh"}
UNWRITTEN = 77.0  # of the cache


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


class Graphs(GraphRunner):
    """Says what became of the chunks; draws no more at once than ``limit``."""

    limit = 8
    dropped = 0

    def step(self, batch: Batch, most: int) -> NewTokens:
        return super().step(batch, min(most, self.limit))

    def _drop_ahead(self, batch: Batch) -> None:
        self.dropped += self._ahead is not None
        super()._drop_ahead(batch)


class SingleSteps(ModuleRunner):
    """A token at a time."""

    def step(self, batch: Batch, most: int) -> NewTokens:
        return super().step(batch, 1)


def engine_of(
    model: Transformer, runner: type[ModuleRunner], *, stops: Any = (), memory: Any = None, **options: Any
) -> Engine:
    _, heads, dim = attention_heads(model)
    blocks = options.setdefault("cache_tokens", 4096) // BLOCK_SIZE
    cache = PagedKVCache(len(model.layers), blocks, heads, dim, block_size=BLOCK_SIZE, spare_blocks=1, memory=memory)
    cache.take_memory()
    cache.k_cache.fill_(UNWRITTEN)
    rollout = RolloutOptions(**options)
    engine = Engine(model, frozenset(stops), rollout, LONGEST, decode=as_text, cache=cache)
    more = (rollout.max_sequences, LONGEST, Recorder()) if runner is Graphs else ()
    engine._runner = made = runner(model, cache, *more)
    made._packed = made._product = made._head = PackedProducts()
    return engine


def assert_same(got: dict[int, Rollout], expected: dict[int, Rollout]) -> None:
    assert tokens(got) == tokens(expected)
    for number, rollout in expected.items():
        assert (got[number].logps, got[number].entropies) == (rollout.logps, rollout.entropies)
        assert (got[number].finished, got[number].stop_string) == (rollout.finished, rollout.stop_string)


@settings(max_examples=25)
@given(st.data())
def test_draws_are_those_of_single_steps(data: st.DataObject) -> None:
    """Whatever is preempted, kept, extended, asked for in between, stopped or read together, in any chunks."""
    mix = Mix(data)
    stops = data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=60), "stops")
    options = {
        "cache_tokens": BLOCK_SIZE * data.draw(st.integers(10, 40), "blocks"),
        "max_sequences": data.draw(st.integers(1, 24), "max_sequences"),
        "max_batch_tokens": data.draw(st.integers(24, 200), "max_batch_tokens"),
    }
    model = own_model(data.draw(st.sampled_from(["qwen3", "olmo3"]), "family"))
    engine = engine_of(model, Graphs, stops=stops, **options)
    runner: Any = engine._runner
    runner.limit = data.draw(st.integers(1, 8), "limit")
    got = mix.drawn(engine)
    assert_same(got, mix.drawn(engine_of(model, SingleSteps, stops=stops, **options)))
    event(f"grouped: {any(shape.grouped for shape in runner._graphs)}")
    event(f"dropped: {runner.dropped > 0}")
    for name in ("preemptions", "extended"):
        event(f"{name}: {getattr(engine.counts, name) > 0}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_captured_once_and_reads_what_changed(family: str) -> None:
    """Weights, seed and samplings of a second run go through the graphs of the first."""
    model = own_model(family)
    engine = engine_of(model, Graphs)
    draw(engine, requests(5))
    runner: Any = engine._runner
    shapes = set(runner._graphs)
    assert runner._capture.captured == len(shapes) and {shape.rows for shape in shapes} == {24}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    asked = requests(5, Sampling(temperature=0.7, top_k=9, max_tokens=30))
    assert_same(draw(engine, asked, seed=5), draw(engine_of(model, SingleSteps), asked, seed=5))
    assert runner._capture.captured == len(shapes) == len(runner._graphs)


def test_graphs_outlive_memory_that_was_lent() -> None:
    engine = engine_of(own_model("qwen3"), Graphs, memory=Lent)
    first = draw(engine, requests(5))
    capture: Any = engine._runner._capture  # type: ignore[attr-defined]
    captured = capture.captured
    for _ in range(2):
        engine.lend_memory()
        assert bool(engine.cache.k_cache.isnan().all())
        assert_same(draw(engine, requests(5)), first)
    assert capture.captured == captured > 0
    rollouts = engine.stream(requests(1), seed=0)
    next(rollouts)
    with pytest.raises(AssertionError, match="would be lost"):
        engine.lend_memory()


def test_the_host_waits_once_a_chunk_with_the_next_one_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def spy(tensor: Tensor) -> Callable[[], Tensor]:
        log.append("launched")
        packed = tensor.clone()

        def wait() -> Tensor:
            log.append("waited")
            return packed

        return wait

    monkeypatch.setattr(chunks, "download", spy)
    # Its first token comes from the prompt's own step.
    draw(
        engine_of(own_model("qwen3"), Graphs), [Request(0, prompts()[0], (1, 2, 3), Sampling(max_tokens=1 + 8 * 4 + 3))]
    )
    assert log == ["launched", *["launched", "waited"] * 4, "waited"]


def test_rows_that_ended_write_to_the_spare_block_alone() -> None:
    """Behind a kept sequence's end nothing is written, nor in blocks that nobody held, while others go on."""
    model = own_model("qwen3")
    asked = [Request(n, prompt, (n,), Sampling(max_tokens=3 + 7 * n), keep=True) for n, prompt in enumerate(prompts())]
    engine = engine_of(model, Graphs)
    cache = engine.cache
    for rollout in engine.run(asked, seed=0):
        assert rollout.cached is not None
        keys = cache.k_cache[:, cache.blocks(rollout.cached)].transpose(2, 3).flatten(1, 2)  # [L, tokens, H, D]
        written = (keys != UNWRITTEN).all(-1).all(-1)
        length = len(rollout.prompt) + len(rollout.response) - 1
        assert written[:, :length].all() and not written[:, length:].any()
        assert cache.length(rollout.cached) == length and len(written[0]) - length < BLOCK_SIZE
    assert (cache.k_cache[:, list(cache.spare_blocks)] != UNWRITTEN).any()


def test_logits_that_are_no_numbers_are_refused_and_the_engine_goes_on() -> None:
    """The draw that is none reaches no embedding; what the run held is free again, the chunk under way's too."""
    model = own_model("olmo3")  # whose embedding is not its head
    engine = engine_of(model, Graphs)
    asked = requests(2)
    before = draw(engine, asked)
    early = {token for rollout in before.values() for token in (*rollout.prompt, *rollout.response[:10])}
    token = next(token for token in before[10].response[10:30] if token not in early)
    row = model.embed_tokens.weight[token].clone()
    with torch.no_grad():
        model.embed_tokens.weight[token] = torch.nan
    with pytest.raises(UserError, match="the model's logits are not finite"):
        engine.run(asked, seed=0)
    assert engine.cache.free_blocks == engine.cache.num_blocks
    with torch.no_grad():
        model.embed_tokens.weight[token] = row
    assert_same(draw(engine, asked), before)


def test_a_run_that_is_left_early_leaves_nothing_behind() -> None:
    engine = engine_of(own_model("qwen3"), Graphs)
    left = engine.stream(requests(3), seed=1, most=8)
    while len(next(left).response) < 12:
        pass
    assert engine._runner._ahead is not None  # type: ignore[attr-defined]
    left.close()
    assert engine.cache.free_blocks == engine.cache.num_blocks
    assert_same(draw(engine, requests(3)), draw(engine_of(own_model("qwen3"), SingleSteps), requests(3)))


class FailingEnd:
    """Like ``torch.cuda.graph``: where the step failed, ending the capture fails again, and says less."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_a_step_that_no_graph_can_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.cuda does is made up; the stream of before is current again."""
    streams: list[Any] = []
    current = mock.MagicMock()
    fakes: dict[str, Any] = {
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: mock.MagicMock(),
        "current_stream": lambda device: current,
        "stream": lambda stream: nullcontext(),
        "set_stream": streams.append,
        "CUDAGraph": mock.MagicMock,
        "graph": lambda *_, **__: FailingEnd(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    runs: list[int] = []

    def step() -> None:
        runs.append(1)
        if len(runs) > 1 and trouble is not None:
            raise trouble

    trouble: Exception | None = RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
    with pytest.raises(UserError) as caught:
        CudaCapture(torch.device("cuda"))(step)
    assert str(caught.value) == (
        "a decoding step of this model can't be a CUDA graph (CUDA error: operation not permitted when stream is "
        "capturing): give --rollout.decoder modules"
    )
    assert streams == [current]
    runs.clear()
    trouble = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="previous error") as failed:
        CudaCapture(torch.device("cuda"))(step)
    assert failed.value.__context__ is trouble
    runs.clear()
    trouble = None
    CudaCapture(torch.device("cuda"))(step)()
    assert len(runs) == 2 and len(streams) == 2


@pytest.mark.parametrize("most", [1, 3, 8, 20, 100, 256])
def test_every_batch_and_table_has_its_size(most: int) -> None:
    for sizes in (row_buckets(most), block_buckets(most, 16), block_buckets(most, 512)):
        assert sizes == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] == most
    assert row_buckets(200) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 200]
    assert block_buckets(100, 16) == [16, 32, 64, 100]
    assert group_room(most) >= most // 2 + 1


def on_a_gpu(test: Any) -> Any:
    missing = not torch.cuda.is_available() or "paged_attention" in csrc.torch_versions
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a GPU and the extension built with CUDA")(test))


@on_a_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(family: str) -> None:
    """Rounding may differ between batches, so that a draw on the edge may fall otherwise, and with it what follows."""
    model = own_model(family).to("cuda")
    engines = [
        Engine(model, frozenset({3, 4, 5}), RolloutOptions(decoder=kind), LONGEST) for kind in ("auto", "modules")
    ]
    assert isinstance(engines[0]._runner, GraphRunner)
    for seed in (0, 1):
        got, expected = (draw(engine, requests(5), seed) for engine in engines)
        assert sum(got[n].response == expected[n].response for n in got) > 0.9 * len(got)
        for n in got:
            if got[n].response == expected[n].response:
                assert got[n].logps == pytest.approx(expected[n].logps, abs=1e-4)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_compute_what_the_same_steps_do(dtype: torch.dtype) -> None:
    """Many sequences, of groups and alone, that end one after the other: graphs of several sizes."""

    def at_once(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    model, longest = own_model("qwen3").to("cuda", dtype), 500
    engine, plain = (Engine(model, frozenset({3}), RolloutOptions(), longest) for _ in range(2))
    plain._runner = GraphRunner(model, plain.cache, RolloutOptions.max_sequences, longest, at_once)
    prompt = tuple(range(4, 304))  # of a whole split of keys, so that a group's members read it together
    asked = [Request(i, prompt, tuple(range(20 * i, 20 * i + 20)), Sampling(max_tokens=40 * i + 6)) for i in range(3)]
    asked += [Request(3 + i, prompt[i:], (60 + i,), Sampling(max_tokens=150)) for i in range(3)]
    got, expected = draw(engine, asked), draw(plain, asked)
    shapes: Any = engine._runner._graphs  # type: ignore[attr-defined]
    assert {shape.grouped for shape in shapes} == {True, False}
    assert sum(got[n].response == expected[n].response for n in got) > 0.9 * len(got)
    for n in got:
        if got[n].response == expected[n].response:
            assert got[n].logps == pytest.approx(expected[n].logps, abs=1e-4 if dtype == torch.float32 else 0.05)


@on_a_gpu
def test_cuda_graphs_outlive_an_arena_that_was_lent() -> None:
    gpu = torch.device("cuda", 0)
    model = own_model("qwen3").to(gpu, torch.bfloat16)
    engine = Engine(model, frozenset({3}), RolloutOptions(), LONGEST, memory=partial(Arena, gpu))
    first = draw(engine, requests(5))
    graphs: Any = engine._runner._graphs  # type: ignore[attr-defined]
    captured = len(graphs)
    for _ in range(2):
        engine.lend_memory()
        torch.full((1 << 24,), torch.nan, device=gpu)  # what an update would have there
        assert_same(draw(engine, requests(5)), first)
    assert len(graphs) == captured > 0
    engine.cache.close()
