"""Sampling from the model in the trainer's own process, over its own weights.

The scheduler decides, the model runs one row of tokens over the paged cache, the sampler draws.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.csrc import Sampled, sample
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.rollout.records import Request, Rollout
from thinktwice_fast.rollout.scheduler import Batch, Lane, Scheduler

BLOCK_SIZE = 16  # tokens per cache block
GPU_SHARE = 0.6  # of the GPU's free memory, for a cache whose size the user left open
GIB = 1 << 30


class Engine:
    """Draws rollouts; one per process, alive for the whole run.

    Args:
        model: decoded with as it stands at each call; its weights may change between calls.
        stop_ids: token ids that end a response.
        options: cache size and batch limits.
        max_tokens: longest prompt + response that will be asked for.
        reserve: bytes that training will still allocate on this GPU (gradients, optimizer state); a cache whose size
            the options leave open keeps off them.

    Raises:
        UserError: the GPU has no room for a cache of one longest sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: frozenset[int],
        options: RolloutOptions,
        max_tokens: int,
        reserve: int = 0,
    ):
        self._policy = Policy(model)
        self._stop_ids = stop_ids
        self._options = options
        self.preemptions = 0  # times a sequence had to leave a full cache and start over, since the start
        config = model.config.get_text_config()
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers: int = config.num_hidden_layers
        token_bytes = 2 * layers * heads * head_dim * model.dtype.itemsize
        self.cache = PagedKVCache(
            layers,
            _cache_blocks(options, max_tokens, token_bytes, model.device, reserve),
            heads,
            head_dim,
            block_size=BLOCK_SIZE,
            dtype=model.dtype,
            device=model.device,
        )

    def generate(self, requests: Iterable[Request], *, seed: int, version: int = 0) -> Iterator[Rollout]:
        """Yield each rollout as it ends.

        A rollout depends on the weights, its prompt, ``seed`` and its sample id, not on its neighbours
        (up to the rounding of the matrix products).

        Args:
            requests: prompts with the ids of the samples wanted of each.
            seed: of the random numbers, together with each sample id.
            version: of the weights, stamped on the cache blocks written.

        Raises:
            UserError: a sequence could outgrow the cache; logits that are not finite.
        """
        self.cache.policy_version = version
        scheduler = Scheduler(self.cache, self._options.max_sequences, self._options.max_batch_tokens)
        scheduler.add(requests)
        try:
            while (batch := scheduler.next_batch()) is not None:
                logits = self._forward(batch)
                yield from self._sample(scheduler, scheduler.advance(batch), logits, seed)
        finally:
            self.preemptions += scheduler.preemptions
            scheduler.clear()

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> torch.Tensor:  # [lanes whose last pending token is in the batch, V]
        tokens = [token for lane, n in zip(batch.lanes, batch.counts, strict=True) for token in lane.pending[:n]]
        last = [
            end - 1 for end, lane, count in zip(accumulate(batch.counts), batch.lanes, batch.counts, strict=True)
            if count == len(lane.pending)
        ]  # fmt: skip
        device = self._policy.device
        return self._policy(
            torch.tensor(tokens, device=device),
            batch.plan.positions,
            PagedAttention(self.cache, batch.plan),
            torch.tensor(last, dtype=torch.int64, device=device),
            linear_head,
        )

    def _sample(self, scheduler: Scheduler, ready: list[Lane], logits: torch.Tensor, seed: int) -> Iterator[Rollout]:
        if not ready:
            return
        if any(len(lane.members) > 1 for lane in ready):
            rows = [row for row, lane in enumerate(ready) for _ in lane.members]
            logits = logits[torch.tensor(rows, device=logits.device)]
            ready = [part for lane in ready for part in scheduler.split(lane)]
        drawn = _draw(logits, ready, seed)
        ended = []
        for lane, token, logp, entropy in zip(
            ready, drawn.tokens.tolist(), drawn.raw_logps.tolist(), drawn.entropies.tolist(), strict=True
        ):
            rollout = lane.members[0]
            rollout.response.append(token)
            rollout.logps.append(logp)
            rollout.entropies.append(entropy)
            rollout.finished = token in self._stop_ids
            if rollout.finished or len(rollout.response) == lane.sampling.max_tokens:
                ended.append(lane)
            elif lane.handle is None:
                scheduler.requeue_prompt(lane)
            else:
                lane.pending.append(token)
        scheduler.finish(ended)
        for lane in ended:
            yield lane.members[0]


def _draw(logits: torch.Tensor, lanes: list[Lane], seed: int) -> Sampled:
    try:
        return sample(
            logits,
            *_sampling_columns(lanes, logits.device),
            seed=seed,
            sample_ids=_column([lane.members[0].sample_id for lane in lanes], torch.int64, logits.device),
            positions=_column([len(lane.members[0].response) for lane in lanes], torch.int64, logits.device),
        )
    except RuntimeError as error:
        if torch.isfinite(logits).all():
            raise
        raise UserError("the model's logits are not finite: lower --update.learning_rate") from error


def _sampling_columns(lanes: list[Lane], device: torch.device) -> tuple[torch.Tensor, ...]:
    first = lanes[0].sampling
    if all(lane.sampling is first for lane in lanes):
        n = (len(lanes),)
        return (
            torch.full(n, first.temperature, device=device),
            torch.full(n, first.top_k, dtype=torch.int32, device=device),
            torch.full(n, first.top_p, device=device),
            torch.full(n, first.min_p, device=device),
        )
    return (
        _column([lane.sampling.temperature for lane in lanes], torch.float32, device),
        _column([lane.sampling.top_k for lane in lanes], torch.int32, device),
        _column([lane.sampling.top_p for lane in lanes], torch.float32, device),
        _column([lane.sampling.min_p for lane in lanes], torch.float32, device),
    )


def _column(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


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
