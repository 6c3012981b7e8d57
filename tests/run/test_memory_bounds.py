"""No plan exceeds its prediction, whatever the lengths: micro-batches, blocks of the KV cache, a GPU's memory."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.algorithms.stubs import Grading, problem
from tests.command import LIMIT, TRAIN, environment
from tests.small_models import family_config, random_model
from thinktwice_fast import launch, parallel
from thinktwice_fast.algorithms.pair_rollout import fill_joint
from thinktwice_fast.algorithms.sampler import Sampler, SampleSpec
from thinktwice_fast.config import Config
from thinktwice_fast.model import flash
from thinktwice_fast.model.attention import NAME, PrefixAttention
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import attention_heads
from thinktwice_fast.records import Group, Sampling
from thinktwice_fast.rollout import engine as engine_module
from thinktwice_fast.rollout.engine import BLOCK_SIZE, Engine, blocks_for, cache_blocks, shared_blocks
from thinktwice_fast.rollout.step import Runner
from thinktwice_fast.run.memory import Load, Part, predict, sampling_reserve
from thinktwice_fast.run.workload import Evaluated, Phase, needed_blocks, phases
from thinktwice_fast.tasks.prompts import RefinePrompt
from thinktwice_fast.update.batches import Example, pack, pack_shared
from thinktwice_fast.update.microbatches import plan_microbatches, row_budget

CPU = torch.device("cpu")
FLOPS = Flops(1000, 100, {0: 10})


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    parallel.start(CPU, 60.0)
    yield
    dist.destroy_process_group()


# Micro-batches


def planned(config: Config, prompts: Sequence[int], world: int) -> Phase:
    (phase,) = phases(config, FLOPS, {"solve": max(prompts)}, world)
    return phase


def largest_rows(config: Config, prompts: Sequence[int], responses: Sequence[int], world: int) -> tuple[int, int, int]:
    """The most tokens, response tokens and seen keys of the micro-batches that an update makes of these lengths."""
    samples = len(responses) // len(prompts)
    examples = [
        Example((1 + index // samples,) * prompts[index // samples], [0] * tokens)
        for index, tokens in enumerate(responses)
    ]
    shared = config.update.shared_prefix
    plan = plan_microbatches(examples, row_budget(config), world, FLOPS, shared_prefix=shared)
    parts = [[examples[index] for index in part] for loads in plan for part in loads if part]
    rows = [(pack_shared if shared else pack)(part, CPU) for part in parts]
    attentions = [cast(PrefixAttention, row.attention) for row in rows]
    segments = [(attention.lengths.tolist(), attention.prefix.tolist()) for attention in attentions]
    keys = max(sum(lengths) + sum(lengths[before] for before in prefix if before >= 0) for lengths, prefix in segments)
    return max(len(row.input_ids) for row in rows), max(len(row.targets) for row in rows), keys


def row_config(problems: int, samples: int, budget: int, longest: int, *, shared: bool) -> Config:
    config = Config(problems_per_step=problems, samples_per_problem=samples)
    config.rollout.max_response_tokens = longest
    config.update.microbatch_tokens, config.update.shared_prefix = budget, shared
    return config


@settings(max_examples=300)
@given(st.data())
def test_no_micro_batch_is_larger_than_planned(data: st.DataObject) -> None:
    samples, longest = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    prompts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    count = samples * len(prompts)
    responses = data.draw(st.lists(st.integers(1, longest), min_size=count, max_size=count))
    budget, shared = data.draw(st.just(0) | st.integers(1, 200)), data.draw(st.booleans())
    world = data.draw(st.sampled_from([n for n in (1, 2, 3) if len(prompts) % n == 0]))
    config = row_config(len(prompts), samples, budget, longest, shared=shared)
    phase = planned(config, prompts, world)
    tokens, targets, keys = largest_rows(config, prompts, responses, world)
    assert tokens <= phase.row_tokens and targets <= phase.row_targets and keys <= phase.row_keys
    assert phase.row_tokens <= max(row_budget(config), max(prompts) + longest - 1)


@pytest.mark.parametrize("shared", [True, False])
def test_short_responses_fill_a_row_better_than_long_ones(shared: bool) -> None:
    """So that rows of full-length responses are no bound."""
    config = row_config(2, 1, budget=16, longest=10, shared=shared)
    long, short = (largest_rows(config, [1, 1], [tokens] * 2, 1)[:2] for tokens in (10, 8))
    assert short > long == (10, 10)
    assert short[0] <= planned(config, [1, 1], 1).row_tokens


def test_an_example_may_take_what_its_prompt_leaves() -> None:
    config = row_config(4, 1, budget=10, longest=20, shared=True)
    config.algorithm, config.rollout.max_prompt_tokens = "sft", 30
    (phase,) = phases(config, FLOPS, {"sft": 5}, 1)
    tokens, targets, _ = largest_rows(config, [1, 1, 1, 1], [49, 49, 1, 1], 1)
    assert (tokens, targets) <= (phase.row_tokens, phase.row_targets) == (49, 49 + 3)


def test_kept_answers_may_all_be_to_one_question() -> None:
    config = row_config(8, 2, budget=20, longest=2, shared=True)
    config.algorithm = "star"
    solve, sft = phases(config, FLOPS, {"solve": 12, "sft": 10}, 1)
    assert (solve.samples, solve.optimizer_steps, solve.row_tokens) == (2, 0, 0)
    assert (sft.samples, sft.optimizer_steps) == (1, 1)
    tokens, targets, keys = largest_rows(config, [10], [2] * 8, 1)
    assert tokens <= sft.row_tokens and targets <= sft.row_targets and 2 * sft.row_tokens < keys <= sft.row_keys


# Blocks of the KV cache

STOP, VOCABULARY = 3, 8
BESIDE = 5  # tokens that the chat template puts around a solution and the instruction to refine it


class MadeUpRunner(Runner):
    """Draws the end token now and then."""

    def __init__(self, stop: float):
        self._logits = torch.zeros(VOCABULARY)
        self._logits[STOP] = stop

    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:
        return self._logits.expand(len(last), VOCABULARY).contiguous()


class Chat:
    """Shows solutions in refine prompts token for token, or, where not ``faithful``, the question in another way."""

    def __init__(self, *, faithful: bool):
        self._first = None if faithful else VOCABULARY + 1

    def response_text(self, ids: Sequence[int], stop_ids: Any, stop_string: Any = None) -> str:
        return " ".join(map(str, ids))

    def refine(self, messages: Any, prompt: Sequence[int], base: Sequence[int], *rest: Any) -> RefinePrompt:
        ids = (*prompt, *base, *range(BESIDE))
        return RefinePrompt((), (ids[0] if self._first is None else self._first, *ids[1:]))


class SlowGrading(Grading):
    def __init__(self, rewards: list[float | None]):
        super().__init__(rewards, None)
        self._numbers = random.Random(len(rewards))

    def done(self) -> bool:
        return self._numbers.random() < 0.05


class SlowGrader:
    timeouts = 0

    def look(self) -> None:
        pass

    def submit(self, asked: Any, prompt: Any, completions: Sequence[str]) -> Grading:
        return SlowGrading([float(len(text) % 2) for text in completions])


@cache
def small_model() -> Any:
    return random_model("qwen3", NAME)


class Watched:
    """A sampler over an engine of plenty of cache, and the most blocks of it that were ever in use."""

    def __init__(self, config: Config, stop: float, *, faithful: bool):
        runner = MadeUpRunner(stop)
        with mock.patch.object(engine_module, "make_runner", lambda *_: runner):
            engine = Engine(small_model(), frozenset({STOP}), config.rollout, 1000, needed=4000)
        self.peak = 0
        for name in ("extend", "fork"):
            setattr(engine.cache, name, self._watched(engine.cache, getattr(engine.cache, name)))
        chat = cast(Any, Chat(faithful=faithful))
        self.sampler = Sampler(engine, chat, cast(Any, SlowGrader()), "", frozenset({STOP}))

    def _watched(self, watched: PagedKVCache, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            result = call(*arguments)
            self.peak = max(self.peak, watched.num_blocks - watched.free_blocks)
            return result

        return counted


def peak_and_need(
    kind: str, prompts: Sequence[int], config: Config, stop: float = -1e9, *, faithful: bool = True, seed: int = 0
) -> tuple[int, int]:
    """Blocks that were in use together while phases of this kind were sampled, and those that the plan says."""
    watched = Watched(config, stop, faithful=faithful)
    groups = [Group(slot, problem(slot), (), (4 + slot % 4,) * tokens) for slot, tokens in enumerate(prompts)]
    sampling = Sampling(max_tokens=config.rollout.max_response_tokens)
    spec = SampleSpec(config.samples_per_problem, sampling, stream=0, seed=seed, version=0)
    longest, evaluated = {"solve": max(prompts)}, Evaluated()
    refined = max(prompts) + config.rollout.max_response_tokens + BESIDE
    if kind == "training":
        watched.sampler.fill(groups, spec)
    elif kind == "evaluation":
        config.algorithm = "sft"  # nothing else is sampled
        evaluated = Evaluated(len(prompts), config.samples_per_problem, refined)
        watched.sampler.fill_pairs(groups, spec, sampling)
    else:
        config.thinktwice.pairing, config.thinktwice.base_selection = "joint", cast(Any, kind)
        longest["refine"] = refined
        fill_joint(watched.sampler, groups, spec, kind)
    assert watched.sampler.engine.counts.preemptions == 0
    return watched.peak, needed_blocks(config, longest, evaluated, 1)


def sampling_config(problems: int, samples: int, sequences: int, response: int, batch: int = 200) -> Config:
    config = Config(problems_per_step=problems, samples_per_problem=samples)
    rollout = config.rollout
    rollout.max_sequences, rollout.max_response_tokens, rollout.max_batch_tokens = sequences, response, batch
    return config


@pytest.mark.parametrize("kind", ["training", "evaluation", "uniform", "wrong_first"])
@settings(max_examples=50)
@given(data=st.data())
def test_no_phase_takes_more_cache_than_is_needed(kind: str, data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    sizes = [data.draw(st.integers(low, high)) for low, high in ((1, 5), (1, 16), (1, 40), (16, 200))]
    stop, faithful = data.draw(st.sampled_from([-1e9, -3.0, 0.0])), data.draw(st.booleans())
    peak, needed = peak_and_need(kind, prompts, sampling_config(len(prompts), *sizes), stop, faithful=faithful)
    assert 0 < peak <= needed


@pytest.mark.parametrize(
    ("kind", "sequences", "samples", "share"),
    [
        ("training", 64, 4, 0.99),
        ("training", 8, 4, 0.8),
        ("training", 2, 4, 0.5),  # a group in two parts, of which one is there at a time
        ("evaluation", 8, 4, 0.9),
        ("uniform", 64, 4, 0.5),  # refinements begin beside solutions
        ("wrong_first", 64, 4, 0.7),
        ("wrong_first", 2, 4, 0.6),  # solutions that wait for grades are more than decode at once
    ],
)
def test_what_is_needed_is_not_far_above_what_is_taken(kind: str, sequences: int, samples: int, share: float) -> None:
    peak, needed = peak_and_need(kind, [47] * 4, sampling_config(4, samples, sequences, 200))
    assert share * needed <= peak <= needed


def test_refinements_are_there_beside_solutions_of_their_own_group() -> None:
    """Where the base ends early and its neighbours do not."""
    found = [peak_and_need("uniform", [47], sampling_config(1, 8, 64, 60), -3.5, seed=seed) for seed in range(30)]
    assert all(peak <= needed for peak, needed in found)
    assert max(peak for peak, _ in found) > 1.2 * shared_blocks([47 + 60 + BESIDE], 8, 60)


def test_a_shared_prompt_is_needed_once() -> None:
    config = Config(problems_per_step=32, samples_per_problem=8)
    config.rollout.max_response_tokens = 1024
    needed = needed_blocks(config, {"solve": 280, "refine": 1504}, Evaluated(), 1)
    assert needed == 32 * (1504 // BLOCK_SIZE) + 256 * 65
    assert needed < 0.49 * 256 * blocks_for(1504 + 1024)
    assert needed_blocks(config, {"solve": 280, "refine": 1504}, Evaluated(), 2) == needed / 2
    assert needed_blocks(config, {"solve": 280}, Evaluated(512, 1, 1504), 2) == 256 * (94 + 65)


# A GPU's memory

SHAPE = AutoModelForCausalLM.from_config(family_config("qwen3"))
LOAD = Load(sequences=64, needed_blocks=400_000, pass_tokens=4096, row_tokens=8192, row_targets=8000, row_keys=8192)


@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("room", [3, 4, 40])
def test_the_cache_leaves_a_gpu_what_is_there_beside_it(
    monkeypatch: pytest.MonkeyPatch, room: int, beta: float, lends: bool
) -> None:
    """An update, or, where that has the cache's memory, only what is there while it samples."""
    gpu, total = torch.device("cuda", 0), room * 10**9
    config = Config()
    config.loss.beta = beta
    predicted = predict(config, SHAPE, gpu, torch.bfloat16, LOAD, world=1, base=1000, room=total, lends=lends)
    held = sum(part.held for part in predicted.parts)
    weights = sum(parameter.numel() for parameter in SHAPE.parameters())
    assert held == 1000 + (2 << 29) + weights * (4 + 2 + (2 if beta else 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - held, total))
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    block_bytes = 2 * 3 * 2 * 32 * 2 * BLOCK_SIZE
    blocks = engine_module._blocks(config.rollout, longest, LOAD.needed_blocks, block_bytes, gpu, predicted.reserve)
    assert blocks * BLOCK_SIZE == predicted.cache_tokens
    names = {part.name: part for part in predicted.parts}
    update, rollout = (
        sum(getattr(part, phase) - part.held for part in predicted.parts) - names["allocator"].update
        for phase in ("update", "rollout")
    )
    assert update > 8192 * 3 * 1000 + 12 * weights  # activations, gradients and moments are among it
    assert 8 * weights < rollout < update
    grows = rollout if lends else update
    left = total - held - block_bytes * (blocks + 1) - grows
    assert left >= 0.03 * total - 1
    assert (blocks == LOAD.needed_blocks) == (room == 40)
    assert blocks == LOAD.needed_blocks or left < 0.03 * total + block_bytes
    assert predicted.rollout <= total and predicted.update <= total
    assert predicted.cache_update == (0 if lends else predicted.cache_bytes)


@pytest.mark.parametrize(
    ("world", "shards", "rank", "groups"), [(1, 0, 0, 0), (1, 0, 8, 1 / 3), (2, 0, 0, 1), (4, 2, 0, 2), (4, 4, 0, 1)]
)
def test_nccl_has_its_memory_before_the_cache_takes_the_rest(world: int, shards: int, rank: int, groups: float) -> None:
    config = Config()
    config.update.shard_processes, config.model.lora_rank = shards, rank
    gpu = torch.device("cuda", 0)
    predicted = predict(config, SHAPE, gpu, torch.bfloat16, LOAD, world=world, base=1000, room=40 * 10**9)
    (part,) = [part for part in predicted.parts if part.name == "NCCL"] or [Part("NCCL", 0, 0)]
    assert part.rollout == part.update == part.held == round(groups * (3 << 29))


@settings(max_examples=100)
@given(data=st.data())
def test_no_lighter_load_takes_more_memory(data: st.DataObject) -> None:
    """In either phase; that no step has more of anything than was planned is what the tests above are for."""
    config, gpu, room = Config(), torch.device("cuda", 0), data.draw(st.integers(2, 100)) * 10**9
    config.model.activation_checkpointing, lends = data.draw(st.booleans()), data.draw(st.booleans())
    most = [data.draw(st.integers(1, size)) for size in (512, 10**6, 10**5, 10**5, 10**5, 10**6)]
    less = [data.draw(st.integers(1, size)) for size in most]
    planned, taken = (
        predict(config, SHAPE, gpu, torch.bfloat16, Load(*load), 1, 0, room, lends=lends) for load in (most, less)
    )
    assert taken.rollout <= planned.rollout and taken.update <= planned.update
    # The cache leaves what it may not take, unless it would be too small for one sequence.
    least = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert planned.cache_tokens == least or (planned.rollout if lends else planned.peak) <= room


def test_what_samples_alone_keeps_off_its_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Config().rollout
    assert sampling_reserve(SHAPE, options, 256) == 0
    monkeypatch.setattr(type(SHAPE), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**9))
    one_pass, logits = 4 * 8192 * (2 * 64 + 3 * 128), 2 * 4 * 256 * 512  # float32; queries are the widest layer
    assert sampling_reserve(SHAPE, options, 256) == one_pass + one_pass // 32 + 2 * logits + 0.03 * 10**9


def test_a_gpu_that_is_too_small_is_said_to_be() -> None:
    predicted = predict(Config(), SHAPE, torch.device("cuda", 0), torch.bfloat16, LOAD, 1, 0, room=10**9)
    assert predicted.peak > 10**9
    assert predicted.cache_tokens == 256


def test_the_head_counts_logits_and_their_gradients() -> None:
    def head(device: str, dtype: torch.dtype, targets: int) -> int:
        load = Load(1, 1, 1, targets, targets, targets)
        parts = predict(Config(), SHAPE, torch.device(device), dtype, load, 1, 0, 10**12).parts
        (found,) = (part.update for part in parts if part.name == "loss head")
        return found - 4 * 512 * 64 - 2 * dtype.itemsize * targets * 64

    assert head("cuda", torch.bfloat16, 1000) == 6 * 1000 * 512
    assert head("cuda", torch.float32, 1000) == 2 * 4 * 1000 * 512  # and a tile of those rows that have a gradient
    assert head("cpu", torch.bfloat16, 1000) == 4 * 1000 * 512
    assert (4 << 30) - 6 * 512 < head("cuda", torch.bfloat16, 1 << 21) <= 4 << 30


def test_attention_copies_keys_where_it_cannot_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(family: str, dtype: torch.dtype, *, checkpointing: bool = False) -> float:
        config, model = Config(), AutoModelForCausalLM.from_config(family_config(family))
        config.model.activation_checkpointing = checkpointing
        parts = predict(config, model, torch.device("cuda"), dtype, LOAD, 1, 0, 10**12).parts
        _, heads, size = attention_heads(model)
        copied = sum(part.update for part in parts if part.name == "keys of shared prompts")
        return copied / (LOAD.row_keys * 2 * heads * size * dtype.itemsize)

    assert layers("qwen3", torch.bfloat16) == 0
    assert layers("olmo3", torch.bfloat16) == 2  # windows of 8
    assert layers("olmo3", torch.bfloat16, checkpointing=True) == 1
    assert layers("qwen3", torch.float32) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash, "flash_for", lambda *_: None)  # it is another GPU's
    assert layers("qwen3", torch.bfloat16) == 3


def test_star_keeps_what_each_iteration_starts_from() -> None:
    config, weights = Config(algorithm="star"), 4 * sum(p.numel() for p in SHAPE.parameters())
    for world in (1, 2):
        parts = predict(config, SHAPE, torch.device("cpu"), torch.float32, LOAD, world, 0, 10**12).parts
        assert [part.update for part in parts if part.name == "start weights"] == [weights // world]


def test_the_size_that_options_state_is_taken() -> None:
    options = Config().rollout
    options.cache_tokens = 33
    assert cache_blocks(options, 100, 10, room=1) == 3


def test_the_allocator_is_told_to_grow_segments_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in (
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {}),
    ):
        monkeypatch.setattr(os, "environ", dict(said))
        launch.grow_segments()
        assert os.environ == said | expected


def test_it_is_told_before_torch_is_there() -> None:
    """In the place of what trains stands what looks."""
    looks = "lambda: print('torch' in sys.modules, os.environ['PYTORCH_ALLOC_CONF'])"
    code = (
        "import os, runpy, sys, types\n"
        "signals = types.ModuleType('signals')\n"
        f"signals.StopSignals = {looks}\n"
        "sys.modules['thinktwice_fast.run.signals'] = signals\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.stdout == "False expandable_segments:True\n", done.stderr
