"""Requests on small random models, drawn and checked for what every draw must leave behind."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from tests.small_models import VOCABULARY, own_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.rollout.scheduler import Scheduler

# On either side of a cache block of 16 and of OLMo-3's window of 8, with responses that cross both.
PROMPT_LENGTHS = (3, 16, 17, 40)
RESPONSE = 40
LONGEST = 160
DECODERS = ("auto", "modules")  # what runs the model: the C++ decoder, which knows all of these, or transformers


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist()) for n in PROMPT_LENGTHS]


def requests(samples: int, sampling: Sampling | None = None) -> list[Request]:
    sampling = sampling or Sampling(max_tokens=RESPONSE)
    return [
        Request(group, prompt, tuple(range(10 * group, 10 * group + samples)), sampling)
        for group, prompt in enumerate(prompts())
    ]


def make(family: str = "qwen3", stop_ids: Iterable[int] = (), **options: Any) -> Engine:
    return Engine(own_model(family), frozenset(stop_ids), RolloutOptions(**options), LONGEST)


def draw(engine: Engine, asked: list[Request], seed: int = 0) -> dict[int, Rollout]:
    rollouts = engine.run(asked, seed=seed)
    assert engine.cache.free_blocks == engine.cache.num_blocks
    by_id = {rollout.sample_id: rollout for rollout in rollouts}
    assert len(by_id) == len(rollouts) == sum(len(request.sample_ids) for request in asked)
    return by_id


def scheduler_of(grown: Any) -> Scheduler:
    """Of an ``Engine.stream`` under way; requests may be added to it between any two rollouts that it gives."""
    scheduler: Scheduler = grown.gi_frame.f_locals["scheduler"]
    return scheduler


def as_text(ids: Iterable[int]) -> str:
    """A decoder of token ids, for stop strings."""
    return "".join(f"<{number}>" for number in ids)


class Mix:
    """Requests in two waves, the second extending caches that the first kept, for any engine that has ``as_text``."""

    def __init__(self, data: st.DataObject):
        # Prompts on either side of what samples must share to be read together.
        prompt = st.builds(_random_tokens, st.integers(1, 70) | st.sampled_from([64, 65, 70]), st.integers(0, 9))
        sampling = st.builds(
            Sampling,
            max_tokens=st.integers(1, 30),
            temperature=st.sampled_from([0.0, 0.7, 1.0]),
            top_p=st.sampled_from([1.0, 0.8]),
            top_k=st.sampled_from([0, 5]),
            stop_strings=st.sampled_from([(), (), (), ("7>", "4><1")]),
        )
        self.first = []
        for group in range(data.draw(st.integers(1, 4), "prompts")):
            ids = range(10 * group, 10 * group + data.draw(st.integers(1, 6), "samples"))
            asked = Request(group, data.draw(prompt, "prompt"), tuple(ids), data.draw(sampling, "sampling"))
            self.first.append(replace(asked, keep=data.draw(st.booleans(), "keep")))
        self.then = data.draw(sampling, "then")
        self.at_ends = data.draw(st.booleans(), "second wave while the first runs")

    def drawn(self, engine: Engine) -> dict[int, Rollout]:
        """By sample id; the second wave's are 100 higher."""
        ended = engine.run(self.first, lambda rollout: self._second(rollout) if self.at_ends else (), seed=3)
        if not self.at_ends:
            ended += engine.run([then for rollout in sorted(ended, key=_id) for then in self._second(rollout)], seed=3)
        engine.release_prefixes()
        assert engine.cache.free_blocks == engine.cache.num_blocks
        return {rollout.sample_id: rollout for rollout in ended}

    def _second(self, ended: Rollout) -> list[Request]:
        if ended.sample_id >= 100:
            return []
        prompt = (*ended.prompt, *ended.response, 1, 2)
        return [Request(ended.group, prompt, (100 + ended.sample_id,), self.then, extends=ended)]


def _random_tokens(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def _id(rollout: Rollout) -> int:
    return rollout.sample_id


def tokens(rollouts: dict[int, Rollout]) -> dict[int, list[int]]:
    return {number: rollout.response for number, rollout in rollouts.items()}


def response_logits(model: Any, rollout: Rollout) -> torch.Tensor:  # [tokens of the response, V]
    """What transformers predicts each token of a response from, given all before it."""
    ids = torch.tensor([*rollout.prompt, *rollout.response[:-1]])
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0, len(rollout.prompt) - 1 :]
