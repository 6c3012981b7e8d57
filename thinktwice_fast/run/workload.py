"""What a step asks of one process at most: rows, sequences in the cache, memory.

Prompts are as long as the longest, responses as long as may be. The largest micro-batch is not one of those: short
responses, more of which fit together, may fill the budget better. So it is bounded by that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.config import Config, optimizer_steps_per_step
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.rollout.engine import BLOCK_SIZE, blocks_for, shared_blocks
from thinktwice_fast.run.memory import Load
from thinktwice_fast.update.batches import Example
from thinktwice_fast.update.microbatches import plan_microbatches, row_budget


@dataclass(frozen=True)
class Phase:
    """A phase's samples on one process, and how its update cuts them up."""

    name: str  # solve, refine, pair or sft
    prompts: int
    samples: int  # of each prompt
    prompt_tokens: int  # longest
    response_tokens: int  # longest
    optimizer_steps: int  # 0 = it samples alone; then the rest is 0
    rows: int  # micro-batches of one optimizer step, with every response that long
    row_tokens: int  # of a micro-batch, whatever the lengths are
    row_targets: int  # response tokens of a micro-batch, whatever the lengths are
    row_keys: int  # keys that its segments see, at most


@dataclass(frozen=True)
class Evaluated:
    """The most that an evaluation does, over all processes."""

    problems: int = 0
    samples: int = 1  # solutions of each, which are refined one by one
    prompt_tokens: int = 0  # longest, to refine


@dataclass(frozen=True)
class TeacherLoad:
    """The most that a teacher which is sampled here is asked in a step, on one process."""

    requests: int
    prompt_tokens: int
    shared_tokens: int  # that all prompts begin with
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Of a prompt and its answer."""
        return self.prompt_tokens + self.answer_tokens

    def blocks(self, sequences: int) -> int:
        """Of KV cache, for so many requests at a time."""
        shared = self.shared_tokens // BLOCK_SIZE
        return 1 + shared + min(self.requests, sequences) * (blocks_for(self.tokens) - shared)


def phases(config: Config, flops: Flops, longest_prompts: Mapping[str, int], world: int) -> list[Phase]:
    """The phases that an algorithm's steps have (a pair of steps, say), on each of ``world`` processes."""
    if config.thinktwice.pairing == "joint":
        return [_phase(config, flops, "pair", [*longest_prompts.values()], world)]
    return [_phase(config, flops, name, [prompt], world) for name, prompt in longest_prompts.items()]


def _phase(config: Config, flops: Flops, name: str, prompts: list[int], world: int) -> Phase:
    """What a phase makes of groups of ``prompts``, the longest ones, in each of its slots."""
    batch, response = config.problems_per_step, config.rollout.max_response_tokens
    samples, steps = config.samples_per_problem, 0
    if name == "sft":
        samples, steps = 1, 1
    elif METHODS[config.algorithm].preset is not None:
        steps = optimizer_steps_per_step(config)
    rows, bounds = 0, (0, 0, 0)
    if steps:
        together = prompts * (batch // steps)
        rows = _row_count(config, flops, world, together, samples)
        # Of kept answers any number may be to one question.
        bounds = _row_bounds(config, together, samples, len(together) if config.algorithm == "star" else samples)
    return Phase(name, len(prompts) * batch // world, samples, max(prompts), response, steps, rows, *bounds)


def heaviest_load(
    config: Config,
    planned: Sequence[Phase],
    longest_prompts: Mapping[str, int],
    evaluated: Evaluated,
    world: int,
    teacher: TeacherLoad | None = None,
) -> Load:
    """The most that one of ``world`` processes has to hold at a time.

    Args:
        planned: see ``phases``.
        longest_prompts: tokens, by phase.
        evaluated: in the largest evaluation.
        teacher: what is asked of one that uses the policy's KV cache.
    """
    options = config.rollout
    sampled = max((phase.prompts * phase.samples for phase in planned if phase.name != "sft"), default=0)
    sequences = min(options.max_sequences, max(sampled, _solutions(evaluated, world)))
    longest = max(evaluated.prompt_tokens, *longest_prompts.values(), teacher.prompt_tokens if teacher else 0)
    needed = needed_blocks(config, longest_prompts, evaluated, world)
    return Load(
        sequences,
        max(needed, teacher.blocks(options.max_sequences)) if teacher else needed,
        min(options.max_batch_tokens, sequences * longest),
        max(phase.row_tokens for phase in planned),
        max(phase.row_targets for phase in planned),
        max(phase.row_keys for phase in planned),
        teacher.tokens if teacher else 0,
    )


def needed_blocks(config: Config, longest_prompts: Mapping[str, int], evaluated: Evaluated, world: int) -> int:
    """Blocks of KV cache for all sequences that are in it together on one of ``world`` processes, at their longest.

    Samples of one prompt share its full blocks. Of an evaluation's problem a whole chat is there, from the question to
    the refinement, and the next problem begins when one is refined. Joint pairs keep a group's solutions until one of
    them is chosen to be refined.

    Args:
        longest_prompts: tokens, by phase.
        evaluated: in the largest evaluation.
    """
    most, response = config.rollout.max_sequences, config.rollout.max_response_tokens
    chats = min(most, _solutions(evaluated, world))
    of_evaluation = shared_blocks([evaluated.prompt_tokens] * chats, chats, response)
    if not METHODS[config.algorithm].samples:
        return of_evaluation
    drawn, groups = config.samples_per_problem, config.problems_per_step // world
    prompts = groups * -(-drawn // most)  # a group of more samples than decode at once comes in parts
    longest, samples = [max(longest_prompts.values())], groups * drawn
    if config.thinktwice.pairing == "sequential":
        samples = min(most, samples)
        prompts = min(prompts, samples)
    elif config.thinktwice.base_selection == "uniform":
        # The base is known before it is drawn, and refined while the others of its group decode.
        longest, samples = [*longest_prompts.values()], min(most, 2 * samples)
    # With another selection solutions wait for their group's grades, beside those that decode: all may be there.
    return max(of_evaluation, shared_blocks(longest * prompts, samples, response))


def _solutions(evaluated: Evaluated, world: int) -> int:
    return -(-evaluated.problems // world) * evaluated.samples


def _row_count(config: Config, flops: Flops, world: int, prompts: list[int], samples: int) -> int:
    """Micro-batches of each process where every response is as long as may be.

    Args:
        prompts: tokens of each prompt of an optimizer step.
        samples: of each.
    """
    response = [0] * config.rollout.max_response_tokens
    examples = [Example((number,) * prompt, response) for number, prompt in enumerate(prompts) for _ in range(samples)]
    shared = config.update.shared_prefix
    return len(plan_microbatches(examples, row_budget(config), world, flops, shared_prefix=shared)[0])


def _row_bounds(config: Config, prompts: list[int], samples: int, alike: int) -> tuple[int, int, int]:
    """Tokens, response tokens and keys of a micro-batch at most.

    Tokens are the budget's, unless one sequence takes more, or all take less. A shared prompt's keys count again for
    each of its responses, whose segments get a copy of them on a GPU.

    Args:
        prompts: tokens of each prompt of an optimizer step, at most.
        samples: of each.
        alike: sequences that may have the same prompt, at most.
    """
    sft, shared, options = config.algorithm == "sft", config.update.shared_prefix, config.rollout
    sequences = len(prompts) * samples
    # The last token of a response is only a target. An example's response may take what its prompt leaves.
    longest = options.max_prompt_tokens + options.max_response_tokens - 1
    response = longest if sft else options.max_response_tokens
    single = longest if sft else max(prompts) + response - 1
    everything = sum(prompts) * (1 if shared else samples) + sequences * (response - 1)
    tokens = min(everything, max(row_budget(config), single))
    reads = samples + 1 if shared else samples  # of a prompt: by itself, and by each of its responses
    keys = min(sum(prompts) * reads + sequences * (response - 1), tokens * (alike + 1 if shared else 1))
    # A prompt that is shared makes room for the first token of one response alone.
    return tokens, min(sequences * response, tokens + (sequences - 1 if shared else 0)), keys
