"""Sampling from the model in the trainer's own process, over its own weights.

The scheduler decides what goes into a step, a runner runs the model and draws, the scheduler records.
"""

from collections.abc import Callable, Generator, Iterable

import torch

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import Model, attention_heads
from thinktwice_fast.records import Request, Rollout
from thinktwice_fast.rollout.prefix_cache import Counts, PrefixCache
from thinktwice_fast.rollout.runner import make_runner
from thinktwice_fast.rollout.scheduler import Scheduler
from thinktwice_fast.rollout.stops import Decode, Stops

BLOCK_SIZE = 16  # tokens per cache block
GPU_SHARE = 0.6  # of the GPU's free memory, for a cache whose size the user left open
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
        reserve: bytes that training will still allocate on this GPU (gradients, optimizer state); a cache whose size
            the options leave open keeps off them.
        decode: tokens to text, for stop strings.
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
        reserve: int = 0,
        decode: Decode | None = None,
        *,
        group_attention: bool = True,
    ):
        self.model = model
        self._max_tokens = max_tokens
        self._stops = Stops(stop_ids, decode)
        self._options = options
        _, heads, head_dim = attention_heads(model)
        layers: int = model.config.get_text_config().num_hidden_layers
        token_bytes = 2 * layers * heads * head_dim * model.dtype.itemsize
        self.cache = PagedKVCache(
            layers,
            _cache_blocks(options, max_tokens, token_bytes, model.device, reserve),
            heads,
            head_dim,
            block_size=BLOCK_SIZE,
            spare_blocks=1 if model.device.type == "cuda" else 0,  # for the rows that a graph has too many
            group_attention=group_attention,
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
    ) -> list[Rollout]:
        """Draw all samples of the requests, and of those that come after them.

        A rollout depends on the weights, its prompt, ``seed`` and its sample id, not on its neighbours nor on whether
        its prompt extended a kept cache (up to the rounding of the matrix products). One run at a time.

        Args:
            requests: prompts with the ids of the samples wanted of each.
            on_end: called with each rollout as it ends; gives more requests.
            seed: of the random numbers, together with each sample id.
            version: of the weights, stamped on the cache blocks written; kept caches of another are not extended.

        Returns:
            The rollouts in the order in which they ended.

        Raises:
            UserError: a sequence could outgrow the cache or ``max_tokens``; logits are not finite.
            ValueError: stop strings, and the engine has no ``decode``.
        """
        grown = self.stream(requests, on_end, seed=seed, version=version, most=STEPS_AT_ONCE)
        return [rollout for rollout in grown if rollout.ended]

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
                drawn = self._runner.step(batch, self._stops.at_once(batch, most))
                for rollout in scheduler.record(batch, drawn):
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


def _cache_blocks(
    options: RolloutOptions, max_tokens: int, token_bytes: int, device: torch.device, reserve: int
) -> int:
    if options.cache_tokens:
        return -(-options.cache_tokens // BLOCK_SIZE)
    longest = -(-max_tokens // BLOCK_SIZE)
    wanted = options.max_sequences * longest
    if device.type != "cuda":
        return wanted
    # What the allocator keeps for tensors that are gone counts as used until it is given back.
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] - reserve
    block_bytes = token_bytes * BLOCK_SIZE
    blocks = int(free * GPU_SHARE) // block_bytes
    if blocks < longest:
        missing = longest * block_bytes / GPU_SHARE - free
        raise UserError(
            f"{missing / GIB:.2f} GiB of GPU memory are missing for a KV cache of one sequence of {max_tokens} tokens "
            f"(training will take {reserve / GIB:.2f} GiB more): lower --rollout.max_response_tokens or "
            "--rollout.max_prompt_tokens, or use more GPUs or a smaller model"
        )
    return min(wanted, blocks)
