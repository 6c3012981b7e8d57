"""Requests on small random models, drawn and checked for what every draw must leave behind."""

from collections.abc import Iterable
from typing import Any

import torch

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


def tokens(rollouts: dict[int, Rollout]) -> dict[int, list[int]]:
    return {number: rollout.response for number, rollout in rollouts.items()}


def response_logits(model: Any, rollout: Rollout) -> torch.Tensor:  # [tokens of the response, V]
    """What transformers predicts each token of a response from, given all before it."""
    ids = torch.tensor([*rollout.prompt, *rollout.response[:-1]])
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0, len(rollout.prompt) - 1 :]
