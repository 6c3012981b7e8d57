"""The fastest that this machine could draw a workload: the bytes and products of its steps, and nothing else.

A step reads the weights once, and the keys and values: of a group's prompt once, of each response its own. It
multiplies every sequence with every weight. Whichever of the two takes this machine longer is the ceiling; both are
measured, in the same run as the contenders. Every prompt has to be multiplied once too, which no step can hide: each
step gets its share of that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.core.ceilings import square_products
from bench.core.measure import seconds_of
from bench.core.op import Ceiling
from bench.core.stats import median
from bench.rollout.cases import RolloutBatch

_SQUARE = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Step:
    """What one step of a workload cannot do without."""

    bytes: float
    flop: float
    prompt_flop: float  # its share of the products of the prompts


def step_of(batch: RolloutBatch) -> Step:
    config, workload = batch.theirs.config, batch.workload
    embedding = config.vocab_size * config.hidden_size
    layers = sum(parameter.numel() for parameter in batch.theirs.base_model.parameters()) - embedding
    weights = layers + embedding  # of the head, tied or not, there are as many
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # numbers of keys and values
    prompts = sum(map(len, batch.prompts))
    responses = workload.sequences * workload.new_tokens / 2  # on average over the steps
    attended = prompts * workload.samples + responses
    per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return Step(
        bytes=batch.theirs.dtype.itemsize * (weights + token * (prompts + responses)),
        flop=2 * weights * workload.sequences + per_key * attended,
        prompt_flop=2 * layers * prompts / workload.new_tokens,
    )


def prepare(batch: RolloutBatch) -> Callable[[], None]:
    """What takes as long as one step has to."""
    step, device = step_of(batch), batch.device
    read = _reading(step.bytes, device)

    def products(flop: float, dtype: torch.dtype) -> Callable[[], object]:
        return square_products(flop, _SQUARE[device.type], dtype, device)

    dtype = min({batch.theirs.dtype, torch.float32}, key=lambda dtype: _seconds(products(1e9, dtype), device))
    multiply, prompts = products(step.flop, dtype), products(step.prompt_flop, dtype)
    slower = max(read, multiply, key=lambda call: _seconds(call, device))

    def both() -> None:
        slower()
        prompts()

    return both


def _reading(size: float, device: torch.device) -> Callable[[], object]:
    matrix = torch.ones(max(1, int(size) // (4 * 4096)), 4096, device=device)
    vector = torch.ones(4096, device=device)
    return lambda: matrix @ vector  # of torch's ways to read memory the fastest


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    return median([seconds_of(call, device) for _ in range(4)][1:])


DECODE = Ceiling("bytes or products of the steps", prepare, lambda case: case.shape.sequences)
