"""Sampling from the model in the trainer's own process, over its own weights.

The scheduler decides, the model runs one row of tokens over the paged cache, the sampler draws (``generation.py``).
"""

from collections.abc import Iterable

import torch

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import Model, attention_heads
from thinktwice_fast.rollout.generation import Decode, Generation
from thinktwice_fast.rollout.kept import Counts, KeptCaches
from thinktwice_fast.rollout.records import Request, Rollout
from thinktwice_fast.rollout.runner import make_runner
from thinktwice_fast.rollout.scheduler import Scheduler

BLOCK_SIZE = 16  # tokens per cache block
SPARE_BLOCKS = 1  # on a GPU, for the rows that a graph has too many
GIB = 1 << 30


class Engine:
    """Draws rollouts; one per process, alive for the whole run.

    Args:
        model: decoded with as it stands at each call; its weights may change between calls.
        stop_ids: token ids that end a response.
        options: cache size and batch limits.
        max_tokens: longest prompt + response that will be asked for.
        needed: cache blocks that all sequences take which are there together (see ``shared_blocks``), in the place of
            ``max_sequences`` that have nothing in common.
        reserve: bytes of this GPU that others will still take; a cache whose size the options leave open keeps off
            them.
        decode: tokens to text, for stop strings.

    Raises:
        UserError: the GPU has no room for a cache of one longest sequence.
    """

    def __init__(
        self,
        model: Model,
        stop_ids: frozenset[int],
        options: RolloutOptions,
        max_tokens: int,
        needed: int | None = None,
        reserve: int = 0,
        decode: Decode | None = None,
    ):
        self.model = model
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._options = options
        self._decode = decode
        _, heads, head_dim = attention_heads(model)
        layers: int = model.config.get_text_config().num_hidden_layers
        on_gpu = model.device.type == "cuda"
        block_bytes = 2 * layers * heads * head_dim * model.dtype.itemsize * BLOCK_SIZE
        self.cache = PagedKVCache(
            layers,
            _blocks(options, max_tokens, needed, block_bytes, model.device, reserve),
            heads,
            head_dim,
            block_size=BLOCK_SIZE,
            spare_blocks=SPARE_BLOCKS if on_gpu else 0,
            group_attention=options.group_attention,
            dtype=model.dtype,
            device=model.device,
        )
        self._runner = make_runner(model, self.cache, options, max_tokens)
        self.counts = Counts()
        self._kept = KeptCaches(self.cache, self.counts)

    def generate(self, requests: Iterable[Request], *, seed: int, version: int = 0) -> Generation:
        """Rollouts to iterate over, each as it ends; more requests may be added meanwhile.

        A rollout depends on the weights, its prompt, ``seed`` and its sample id, not on its neighbours nor on whether
        its prompt extended a kept cache (up to the rounding of the matrix products). One generation at a time.

        Args:
            requests: prompts with the ids of the samples wanted of each.
            seed: of the random numbers, together with each sample id.
            version: of the weights, stamped on the cache blocks written; kept caches of another are not extended.

        Raises:
            UserError: a sequence could outgrow the cache or ``max_tokens``; while iterating, logits are not finite.
        """
        self.cache.policy_version = version
        self._runner.refresh()
        options = self._options
        scheduler = Scheduler(
            self.cache, self._kept, self.counts, options.max_sequences, options.max_batch_tokens, self._max_tokens
        )
        generation = Generation(self._runner, scheduler, self._stop_ids, seed, self._decode)
        generation.add(requests)
        return generation

    def release_kept(self, rollouts: Iterable[Rollout] | None = None) -> None:
        """Give up the caches that requests asked to keep and none extended; they also go when blocks run out.

        Args:
            rollouts: only theirs, where they have any; None = all.
        """
        if rollouts is None:
            self._kept.clear()
            return
        for rollout in rollouts:
            self._kept.release(rollout)


def blocks_for(tokens: int) -> int:
    """Cache blocks that so many tokens of one sequence take."""
    return -(-tokens // BLOCK_SIZE)


def shared_blocks(prompts: Iterable[int], samples: int, response_tokens: int) -> int:
    """Cache blocks that samples of some prompts take together at most, whatever the lengths are.

    A prompt's full blocks are there once for all of its samples. Each sample has those from the one on that its
    response begins in, behind a part of the prompt.

    Args:
        prompts: tokens of each prompt, at most.
        samples: of all prompts together, kept ones among them.
        response_tokens: of each sample, at most.
    """
    return sum(tokens // BLOCK_SIZE for tokens in prompts) + samples * blocks_for(BLOCK_SIZE - 1 + response_tokens)


def cache_blocks(options: RolloutOptions, needed: int, longest: int, room: int | None = None) -> int:
    """Blocks of a KV cache.

    Args:
        options: which may say how many.
        needed: by all sequences that are there together.
        longest: by the longest that may be asked for.
        room: how many the memory holds; None = any number.
    """
    if options.cache_tokens:
        return blocks_for(options.cache_tokens)
    wanted = max(needed, longest)
    return wanted if room is None else min(wanted, room)


def _blocks(
    options: RolloutOptions,
    max_tokens: int,
    needed: int | None,
    block_bytes: int,
    device: torch.device,
    reserve: int,
) -> int:
    longest = blocks_for(max_tokens)
    if needed is None:
        needed = options.max_sequences * longest
    if options.cache_tokens or device.type != "cuda":
        return cache_blocks(options, needed, longest)
    # What the allocator keeps for tensors that are gone counts as used until it is given back.
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] - reserve - SPARE_BLOCKS * block_bytes
    blocks = cache_blocks(options, needed, longest, free // block_bytes)
    if blocks < longest:
        raise UserError(
            f"{(longest * block_bytes - free) / GIB:.2f} GiB of GPU memory are missing for a KV cache of one sequence "
            f"of {max_tokens} tokens (the rest of the run will take {reserve / GIB:.2f} GiB more): lower "
            "--rollout.max_response_tokens or --rollout.max_prompt_tokens, or use more GPUs or a smaller model"
        )
    return blocks
