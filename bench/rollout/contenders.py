"""The contenders of the rollout benchmarks: the engine with its switches on and off, and transformers.

Each draws what a ``RolloutBatch`` asks for and gives the tokens by sample, those of the engine with log-probabilities.

Letters: N sequences, n new tokens, T longest prompt and response.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from bench.core.contender import Outputs
from bench.rollout.cases import RolloutBatch
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.records import Request, Rollout
from thinktwice_fast.rollout.engine import BLOCK_SIZE, Engine

Draw = Callable[[RolloutBatch], Outputs]
_PAGE = 32  # tokens


def engine(batch: RolloutBatch, group_attention: bool = True, **options: Any) -> Engine:
    """One for each batch and options, kept as a trainer keeps it."""
    key = "engine", group_attention, *sorted(options.items())
    if key not in batch.kept:
        limits = RolloutOptions(max_sequences=batch.workload.sequences, cache_tokens=_cache_tokens(batch), **options)
        batch.kept[key] = Engine(batch.ours, frozenset(), limits, batch.longest, group_attention=group_attention)
    kept: Engine = batch.kept[key]
    return kept


def _cache_tokens(batch: RolloutBatch) -> int:
    """Room for everything at once, a group's prompt once, but for second turns, which have prompts of their own."""
    workload = batch.workload
    if workload.instruction:
        return workload.sequences * (batch.longest + BLOCK_SIZE)
    return sum(map(len, batch.prompts)) + workload.sequences * (workload.new_tokens + 2 * BLOCK_SIZE)


def ours(**options: Any) -> Draw:
    """The engine with these rollout options, or without reading shared keys once."""
    return lambda batch: _outputs(engine(batch, **options).run(batch.requests(), seed=0))


def two_turns(extend: bool) -> Draw:
    """Solve, then go on from every solution; gives the second turn, computed from the first one's cache or anew."""

    def draw(batch: RolloutBatch) -> Outputs:
        own = engine(batch)
        extended = own.counts.extended
        first = sorted(own.run(batch.requests(keep=extend), seed=0), key=lambda rollout: rollout.sample_id)
        between = batch.prompts[0][: batch.workload.instruction]
        second = [
            Request(
                rollout.sample_id,
                (*rollout.prompt, *rollout.response, *between),
                (rollout.sample_id,),
                batch.requests()[0].sampling,
                extends=rollout if extend else None,
            )
            for rollout in first
        ]
        outputs = _outputs(own.run(second, seed=1))
        contexts = torch.tensor([request.prompt for request in second])
        if own.counts.extended - extended != extend * len(first):
            raise RuntimeError(f"{own.counts.extended - extended} of {len(first)} caches were extended")
        return {**outputs, "contexts": contexts}

    return draw


def _outputs(rollouts: Iterable[Rollout]) -> Outputs:
    ordered = sorted(rollouts, key=lambda rollout: rollout.sample_id)
    return {
        "tokens": rows_of([rollout.response for rollout in ordered]),
        "logps": torch.tensor([rollout.logps for rollout in ordered]),
    }


def rows_of(tokens: Sequence[Sequence[int]]) -> Tensor:  # int64 [N, n], -1 where one has fewer
    longest = max(map(len, tokens))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in tokens])


def hf_generate(batch: RolloutBatch) -> Outputs:
    """All sequences in one batch, shorter prompts padded on the left."""
    prompts = _each_sample(batch)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=batch.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=batch.device)
    drawn: Any = batch.theirs.generate(ids, attention_mask=mask, generation_config=_sampling(batch))  # type: ignore[operator]
    return {"tokens": drawn[:, longest:].cpu()}


def lacks_generate_batch(device: torch.device) -> str | None:
    """Why ``hf_generate_batch`` can't run; the trainer takes older versions of transformers."""
    return None if hasattr(transformers, "ContinuousBatchingConfig") else "this transformers is too old"


def hf_generate_batch(batch: RolloutBatch) -> Outputs:
    """transformers' continuous batching; the cache holds every sequence, so that none has to wait."""
    blocks = batch.workload.sequences * -(-batch.longest // _PAGE)
    # Newer versions have the first name.
    config = transformers.ContinuousBatchingConfig
    page: dict[str, Any] = {"page_size" if hasattr(config, "page_size") else "block_size": _PAGE}
    options = config(num_blocks=blocks, max_batch_tokens=RolloutOptions.max_batch_tokens, **page)
    drawn = batch.theirs.generate_batch(  # type: ignore[operator]
        _each_sample(batch), generation_config=_sampling(batch), continuous_batching_config=options
    )
    return {"tokens": rows_of([output.generated_tokens for output in drawn.values()])}


def _each_sample(batch: RolloutBatch) -> list[list[int]]:
    return [list(prompt) for prompt in batch.prompts for _ in range(batch.workload.samples)]


def _sampling(batch: RolloutBatch) -> GenerationConfig:
    config = GenerationConfig(max_new_tokens=batch.workload.new_tokens, pad_token_id=0)
    if batch.temperature:
        config.update(do_sample=True, temperature=batch.temperature, top_k=0)
    return config
