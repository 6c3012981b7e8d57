"""Sampling from the model in the trainer's own process, over its own weights.

The scheduler decides what goes into a step, a runner runs the model and draws, the scheduler records.
"""

from collections.abc import Callable, Generator, Iterable

import torch

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.arena import release_cached
from thinktwice_fast.model.paged import LentMemory, PagedKVCache
from thinktwice_fast.model.policy import Model, attention_heads
from thinktwice_fast.records import Request, Rollout
from thinktwice_fast.rollout.prefix_cache import Counts, PrefixCache
from thinktwice_fast.rollout.runner import make_runner
from thinktwice_fast.rollout.scheduler import Scheduler
from thinktwice_fast.rollout.stops import Decode, Stops

BLOCK_SIZE = 16  # tokens per cache block
SPARE_BLOCKS = 1  # on a GPU, for the rows that a graph has too many
GIB = 1 << 30
STEPS_AT_ONCE = 8  # tokens that a runner may draw for each sequence before it reports

OnEnd = Callable[[Rollout], Iterable[Request]]  # what comes after a rollout that has ended


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
        cache: of another engine whose model has the same layers and heads, to be used while that one is idle; None =
            one of its own.
        memory: makes the cache's where that is lent to others between runs, see ``PagedKVCache``.
        group_attention: read keys that samples of one prompt share once for all of them, while decoding.

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
        *,
        cache: PagedKVCache | None = None,
        memory: Callable[[int], LentMemory] | None = None,
        group_attention: bool = True,
    ):
        self.model = model
        self._max_tokens = max_tokens
        self._stops = Stops(stop_ids, decode)
        self._options = options
        _, heads, head_dim = attention_heads(model)
        layers: int = model.config.get_text_config().num_hidden_layers
        on_gpu = model.device.type == "cuda"
        self.cache = cache or PagedKVCache(
            layers,
            _blocks(options, max_tokens, needed, bytes_per_block(model), model.device, reserve),
            heads,
            head_dim,
            block_size=BLOCK_SIZE,
            spare_blocks=SPARE_BLOCKS if on_gpu else 0,
            group_attention=group_attention,
            memory=memory,
            dtype=model.dtype,
            device=model.device,
        )
        self._runner = make_runner(model, self.cache, options, max_tokens)
        self.counts = Counts()
        self._prefixes = PrefixCache(self.cache, self.counts)

    def run(
        self,
        requests: Iterable[Request],
        on_end: OnEnd | None = None,
        *,
        seed: int,
        version: int = 0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Rollout]:
        """Draw all samples of the requests, and of those that come after them.

        A rollout depends on the weights, its prompt, ``seed`` and its sample id, not on its neighbours nor on whether
        its prompt extended a kept cache (up to the rounding of the matrix products). One run at a time.

        Args:
            requests: prompts with the ids of the samples wanted of each.
            on_end: called with each rollout as it ends; gives more requests.
            seed: of the random numbers, together with each sample id.
            version: of the weights, stamped on the cache blocks written; kept caches of another are not extended.
            meanwhile: called again and again; what it raises ends the run.

        Returns:
            The rollouts in the order in which they ended.

        Raises:
            UserError: a sequence could outgrow the cache or ``max_tokens``; logits are not finite.
            ValueError: stop strings, and the engine has no ``decode``.
        """
        ended = []
        for rollout in self.stream(requests, on_end, seed=seed, version=version, most=STEPS_AT_ONCE):
            meanwhile()
            if rollout.ended:
                ended.append(rollout)
        return ended

    def stream(
        self,
        requests: Iterable[Request],
        on_end: OnEnd | None = None,
        *,
        seed: int,
        version: int = 0,
        most: int = 1,
    ) -> Generator[Rollout, None, None]:
        """``run`` token by token: each rollout every time it has grown, ``rollout.ended`` at its last.

        ``on_end`` is called when the consumer of these comes back after a rollout's last. To close the iterator, or to
        let go of it, ends the run early and frees its part of the cache.

        Args:
            most: tokens by which a rollout may grow at a time.
        """
        self.cache.take_memory()
        self.cache.policy_version = version
        self._runner.refresh()
        options = self._options
        scheduler = Scheduler(
            self.cache,
            self._prefixes,
            self.counts,
            self._stops,
            options.max_sequences,
            options.max_batch_tokens,
            self._max_tokens,
            seed,
        )
        try:
            scheduler.add(requests)
            while (batch := scheduler.next_batch()) is not None:
                new = self._runner.step(batch, self._stops.at_once(batch, most))
                for rollout in scheduler.record(batch, new):
                    yield rollout
                    if rollout.ended and on_end is not None:
                        scheduler.add(on_end(rollout))
        finally:
            scheduler.clear()

    def release_prefixes(self, rollouts: Iterable[Rollout] | None = None) -> None:
        """Give up the caches that requests asked to keep and none extended; they also go when blocks run out.

        Args:
            rollouts: only theirs, where they have any; None = all.
        """
        if rollouts is None:
            self._prefixes.clear()
            return
        for rollout in rollouts:
            self._prefixes.release(rollout)

    def lend_memory(self) -> None:
        """Leave the cache's memory to others until the next run, where it can be lent, and all caches that are kept."""
        self.release_prefixes()
        self.cache.lend_memory()


def bytes_per_block(model: Model) -> int:
    """What a cache block of a model takes."""
    _, heads, head_dim = attention_heads(model)
    layers: int = model.config.get_text_config().num_hidden_layers
    return 2 * layers * heads * head_dim * model.dtype.itemsize * BLOCK_SIZE


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
    release_cached(device)  # until then it counts as used
    free = torch.cuda.mem_get_info(device)[0] - reserve - SPARE_BLOCKS * block_bytes
    blocks = cache_blocks(options, needed, longest, free // block_bytes)
    if blocks < longest:
        raise UserError(
            f"{(longest * block_bytes - free) / GIB:.2f} GiB of GPU memory are missing for a KV cache of one sequence "
            f"of {max_tokens} tokens (the rest of the run will take {reserve / GIB:.2f} GiB more)",
            ("lower ", Option("rollout.max_response_tokens"), " or ", Option("rollout.max_prompt_tokens")),
            "use a larger GPU or a smaller model",
            ("shard over more GPUs with ", Option("nproc-per-node")),
        )
    return blocks
