"""Whatever is added, kept, extended and closed: nothing leaks, and every sample is its own."""

import random
from collections.abc import Generator
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.rollout.drawing import response_logits, scheduler_of
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.model import reference
from thinktwice_fast.model.attention import NAME
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import BLOCK_SIZE, Engine

SEED, VOCABULARY, STOP, LONGEST = 11, 64, 3, 40


@cache
def model(attention: str) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


class Session:
    """An engine with a small cache under a random sequence of calls, beside a plain list of what is still to come."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.blocks = self.random.randint(7, 30)
        sequences = self.random.randint(1, 6)
        options = RolloutOptions(
            cache_tokens=self.blocks * BLOCK_SIZE,
            max_sequences=sequences,
            max_batch_tokens=self.random.randint(sequences, 60),
        )
        self.engine = Engine(model(NAME), frozenset({STOP}), options, self.blocks * BLOCK_SIZE)
        self.version = 0
        self.prompts: dict[int, tuple[int, ...]] = {}  # of the samples asked for and not ended
        self.ended: list[Rollout] = []
        self.asked_to_extend = 0
        self.grown: Generator[Rollout, None, None] | None = None  # the run under way
        self.next_id = 0

    def run(self, calls: int) -> None:
        steps = (self.add, self.extend, self.advance, self.begin_anew, self.release_prefixes)
        for step in self.random.choices(steps, (6, 8, 12, 2, 1), k=calls):
            step()
            self.every_block_has_an_owner()
        while self.grown is not None:
            self._next()
        assert not self.prompts, "not ended"

    def add(self) -> None:
        prompt = self.random.choices(range(VOCABULARY), k=self.random.randint(1, 40))
        self._add(tuple(prompt), None)

    def extend(self) -> None:
        if not self.ended:
            return
        base = self.random.choice(self.ended[-4:])
        prompt = [*base.prompt, *base.response, 4, 5, 6]
        if self.random.random() < 0.2:
            prompt[self.random.randrange(len(prompt))] = 7
        if len(prompt) + LONGEST <= self.blocks * BLOCK_SIZE:
            self.asked_to_extend += 1
            self._add(tuple(prompt), base)

    def advance(self) -> None:
        for _ in range(self.random.randint(1, 30)):
            self._next()

    def begin_anew(self) -> None:
        """Close this run; what it had not ended is lost. The next one may be of other weights."""
        if self.grown is not None:
            self.grown.close()
        self.grown = None
        self.prompts.clear()
        self.every_block_has_an_owner()
        self.version += self.random.random() < 0.5

    def release_prefixes(self) -> None:
        self.engine.release_prefixes()

    def every_block_has_an_owner(self) -> None:
        handles = list(self.engine._prefixes._rollouts)
        if self.grown is not None:
            handles += [sequence.cached for sequence in scheduler_of(self.grown).active]
        held = {block for handle in handles for block in self.engine.cache.blocks(handle)}
        assert self.engine.cache.num_blocks - self.engine.cache.free_blocks == len(held)

    def every_sample_is_its_own(self) -> None:
        """Each ended rollout is what the sampler's reference draws from transformers' logits."""
        for rollout in self.ended:
            n = len(rollout.response)
            options = (torch.ones(n), torch.zeros(n, dtype=torch.int32), torch.ones(n), torch.zeros(n))
            keys = (SEED, torch.full((n,), rollout.sample_id), torch.arange(n))
            drawn, _, logps, *_ = reference.sample(response_logits(model("sdpa"), rollout), *options, *keys)
            assert rollout.response == drawn.tolist()
            assert rollout.logps == pytest.approx(logps.tolist(), abs=1e-4)

    def _add(self, prompt: tuple[int, ...], base: Rollout | None) -> None:
        samples = self.random.randint(1, 4)
        ids = tuple(range(self.next_id, self.next_id + samples))
        self.next_id += samples
        self.prompts |= dict.fromkeys(ids, prompt)
        sampling = Sampling(max_tokens=self.random.randint(1, LONGEST))
        request = Request(0, prompt, ids, sampling, self.random.random() < 0.9, base)
        if self.grown is not None:
            scheduler_of(self.grown).add([request])
            return
        most = self.random.choice((1, 8))
        self.grown = self.engine.stream([request], seed=SEED, version=self.version, most=most)
        self._next()

    def _next(self) -> None:
        if self.grown is None:
            return
        rollout = next(self.grown, None)
        if rollout is None:
            self.grown = None
        elif rollout.ended:
            self._end(rollout)

    def _end(self, rollout: Rollout) -> None:
        assert rollout.ended and rollout.prompt == self.prompts.pop(rollout.sample_id)
        assert rollout.finished == (rollout.response[-1] == STOP) and STOP not in rollout.response[:-1]
        self.ended.append(rollout)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_leaks_and_every_sample_is_its_own(seed: int) -> None:
    session = Session(seed)
    session.run(calls=30)
    counts = session.engine.counts
    # Of a request that a close finds before it came in it is never decided.
    assert counts.extended + counts.prefilled_anew <= session.asked_to_extend
    for name, count in asdict(counts).items():
        event(f"{name}: {count > 0}")
    session.engine.release_prefixes()
    assert session.engine.cache.free_blocks == session.engine.cache.num_blocks
    session.every_sample_is_its_own()
