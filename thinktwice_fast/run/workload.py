"""What a step asks of one process when every prompt and response is as long as may be: rows, sequences, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from thinktwice_fast.config import Config, samples_per_step
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.policy import Model
from thinktwice_fast.records import Problem
from thinktwice_fast.run.memory import Load, Prediction, predict
from thinktwice_fast.update.batches import Example
from thinktwice_fast.update.microbatches import plan_microbatches


@dataclass(frozen=True)
class Phase:
    """A phase's samples on one process, and how its update cuts them up."""

    name: str  # solve, refine, pair or sft
    prompts: int
    samples: int  # of each prompt
    prompt_tokens: int  # longest
    response_tokens: int  # longest
    optimizer_steps: int
    rows: tuple[tuple[int, int], ...]  # tokens and response tokens of each micro-batch of one optimizer step


def phases(config: Config, flops: Flops, longest_prompts: Mapping[str, int], world: int) -> list[Phase]:
    """The phases of a pair of steps (SFT: the one of a step), on each of ``world`` processes."""
    sft, joint = config.algorithm == "sft", config.thinktwice.pairing == "joint"
    samples = 1 if sft else config.samples_per_problem
    drawn = config.problems_per_step if sft else samples_per_step(config)
    steps = 1 if sft else drawn // (config.update.minibatch_sequences or drawn)
    together = {"pair": [*longest_prompts.values()]} if joint else {name: [n] for name, n in longest_prompts.items()}
    return [
        Phase(
            name,
            len(prompts) * config.problems_per_step // world,
            samples,
            max(prompts),
            config.rollout.max_response_tokens,
            steps,
            _rows(config, flops, world, prompts * (config.problems_per_step // steps)),
        )
        for name, prompts in together.items()
    ]


def predicted_memory(
    config: Config,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    planned: Sequence[Phase],
    evaluation_sets: Mapping[str, Sequence[Problem]],
    world: int,
    base: int,
) -> Prediction:
    """The peak of each of ``world`` processes; see ``memory.predict`` for the model, ``device``, ``dtype``, ``base``.

    Args:
        planned: see ``phases``.
        evaluation_sets: whose solutions stay in the cache until their refinements come.
    """
    options = config.rollout
    evaluated = max((len(problems) for problems in evaluation_sets.values()), default=0) * config.eval.samples
    sampled = 0 if config.algorithm == "sft" else max(phase.prompts * phase.samples for phase in planned)
    sequences = min(options.max_sequences, max(sampled, -(-evaluated // world)))
    longest = max(phase.prompt_tokens for phase in planned)
    cached = -(-evaluated // world) * (longest + options.max_response_tokens)
    if sampled:
        drawn = min(options.max_sequences, sampled)
        cached = max(cached, max(-(-drawn // p.samples) * p.prompt_tokens + drawn * p.response_tokens for p in planned))
    row = max(row for phase in planned for row in phase.rows)
    load = Load(sequences, cached, min(options.max_batch_tokens, sequences * longest), *row)
    return predict(config, model, device, dtype, load, world, base)


def _rows(config: Config, flops: Flops, world: int, prompts: list[int]) -> tuple[tuple[int, int], ...]:
    """Tokens and response tokens of each micro-batch of the process with the largest one.

    Args:
        prompts: tokens of each prompt of an optimizer step.
    """
    samples = 1 if config.algorithm == "sft" else config.samples_per_problem
    shared, response = config.update.shared_prefix, config.rollout.max_response_tokens
    examples = [
        Example((number,) * prompt, [0] * response) for number, prompt in enumerate(prompts) for _ in range(samples)
    ]
    plan = plan_microbatches(examples, config.update.microbatch_tokens, world, flops, shared_prefix=shared)

    def row(part: list[int]) -> tuple[int, int]:
        copies = {index // samples for index in part} if shared else [index // samples for index in part]
        return sum(prompts[copy] for copy in copies) + len(part) * (response - 1), len(part) * response

    return max((tuple(map(row, parts)) for parts in plan), key=max)
