"""How much memory a run takes at its peak, part by part, from the model's shape and the options alone.

Letters: n parameters, m of them trained, N processes that share their shards, b bytes of the compute type;
L layers of l parameters, H hidden size, I inner size of the MLP, Q / K elements of all query / key heads of a token,
V vocabulary; S sequences that decode at once; T tokens and R response tokens of the largest micro-batch.

    master weights       4 n / N; with LoRA b n / N for the weights below the adapters, and 4 m / N
    gradients            4 m / N, in updates
    AdamW                8 m / N, with 8-bit moments 2 m; from the first update on
    reference            b n / N, with a KL term
    gathered weights     b (rest + 2 l) + (b + 4) max(rest, l), in updates, where FSDP2 gathers them: the rest of the
                         model (embedding and head) throughout, two layers at a time, and a gradient until it is reduced
    compute weights      b n, where rollouts (and one process's updates) do not read the masters
    packed weights       b (n - V H, or n where the head is the embedding), for the C++ decoder
    KV cache             2 L K b a token: on the CPU those tokens that are used (memory counts once it is written), on a
                         GPU all of the cache
    activations, update  T (4 b I + b H)                       what a layer's backward adds to
                       + T L (2 (4 + 2 b) H                    two norms: input in float32, normalised, output
                              + 2 b (Q + K)                    rotated queries and keys, values, attention's output
                              + (4 + b) (Q + K)                QK-norm where there is one: input, normalised
                              + 4 b I)                         gate, up, silu(gate), their product
                         with checkpointing of the L layers all but b T H each for one layer; in float32 on the CPU
                         norms keep input and output alone (QK-norm its input, with the values), and silu(gate) is
                         not kept (``fuse_elementwise``)
    activations, rollout b t (2 H + 3 I) of t tokens in one pass, and 2 * 4 S V for logits
    loss head            min(budget, 4 R V) of logits (with gradients), 4 V H of the weight's gradient, 2 b R H of
                         hidden states and theirs
    allocator            4 m on the CPU: holes that the C library keeps where gradients lay among activations (measured)

Keys and values that shared prefixes gather on a GPU are left out, as is what a GPU's libraries keep for themselves.
"""

import ctypes
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.model.elementwise import fuses
from thinktwice_fast.model.lora import adapter_parameters
from thinktwice_fast.model.policy import attention_heads, decoder_layers
from thinktwice_fast.model.sharding import shards_weights
from thinktwice_fast.rollout.engine import BLOCK_SIZE, GPU_SHARE
from thinktwice_fast.rollout.runner import planned_runner
from thinktwice_fast.update.optimizer import MOMENT_BYTES
from thinktwice_kernels.rows import DEFAULT_BUDGET

_PAGE = os.sysconf("SC_PAGE_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_SIZE = 1 << 30  # largest piece of memory that is kept


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model; see the letters above."""

    parameters: int
    trained: int
    layers: int
    layer_parameters: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    qk_norm: bool

    @classmethod
    def of(cls, model: PreTrainedModel, options: ModelOptions) -> "Shape":
        """Of a model that may have no memory yet, before it gets the adapters that ``options`` may ask for."""
        config: Any = model.config.get_text_config()
        query_heads, kv_heads, head_dim = attention_heads(model)
        blocks = list(decoder_layers(model))
        parameters = sum(p.numel() for p in model.parameters())
        return cls(
            parameters=parameters,
            trained=adapter_parameters(model, options) if options.lora_rank else parameters,
            layers=config.num_hidden_layers,
            layer_parameters=sum(p.numel() for p in blocks[0].parameters()) if blocks else 0,
            hidden=config.hidden_size,
            inner=max((max(p.shape) for p in blocks[0].parameters() if p.dim() > 1), default=0),
            queries=query_heads * head_dim,
            keys=kv_heads * head_dim,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        )


@dataclass(frozen=True)
class Load:
    """The most that one process has to hold at a time."""

    sequences: int  # decoding at once
    cached_tokens: int  # of KV cache that they use
    pass_tokens: int  # of one forward pass while sampling
    row_tokens: int  # T
    row_targets: int  # R


@dataclass(frozen=True)
class Part:
    """Bytes of one process."""

    name: str
    rollout: int
    update: int


@dataclass(frozen=True)
class Prediction:
    """The peak of one process, by part and phase."""

    parts: tuple[Part, ...]

    @property
    def rollout(self) -> int:
        """Bytes while sampling, once an update has been made."""
        return sum(part.rollout for part in self.parts)

    @property
    def update(self) -> int:
        """Bytes while training."""
        return sum(part.update for part in self.parts)

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.rollout, self.update)


def predict(
    config: Config, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, load: Load, world: int, base: int
) -> Prediction:
    """The peak of each of ``world`` processes.

    Args:
        model: may be on the meta device.
        device, dtype: where it will be, and the compute type.
        load: of the process that has most.
        base: bytes that the program holds on ``device`` before it loads the model.
    """
    shape = Shape.of(model, config.model)
    parts = [Part("program", base, base), *_weights(config, shape, model, device, dtype, world)]
    parts += _working(config, shape, model, device, dtype, load)
    cache = _cache_bytes(config, shape, device, dtype, load, sum(max(part.rollout, part.update) for part in parts))
    return Prediction((*(part for part in parts if part.rollout or part.update), Part("KV cache", cache, cache)))


def _weights(
    config: Config, shape: Shape, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, world: int
) -> Iterator[Part]:
    b, n, m = dtype.itemsize, shape.parameters, shape.trained
    shards = config.update.shard_processes or world
    lora = bool(config.model.lora_rank)
    own = b * n + 4 * m if lora else 4 * n
    rest = n - shape.layers * shape.layer_parameters
    moments = MOMENT_BYTES[config.update.optimizer] * m // shards
    yield Part("master weights", own // shards, own // shards)
    yield Part("gradients", 0, 4 * m // shards)
    yield Part("optimizer state", moments, moments)
    if config.loss.beta:
        yield Part("reference weights", b * n // shards, b * n // shards)
    if shards_weights(world, dtype, lora=lora):
        largest = max(rest, shape.layer_parameters)
        yield Part("gathered weights", 0, b * (rest + 2 * shape.layer_parameters) + (b + 4) * largest)
    if world > 1 or lora or dtype != torch.float32:
        yield Part("compute weights", b * n, b * n)
    if planned_runner(model, config.rollout, device, dtype) == "decoder":
        packed = b * (n if shape.tied else n - shape.vocabulary * shape.hidden)
        yield Part("packed weights", packed, packed)


def _working(
    config: Config, shape: Shape, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, load: Load
) -> Iterator[Part]:
    b, tokens, targets = dtype.itemsize, load.row_tokens, load.row_targets
    sampling = b * load.pass_tokens * (2 * shape.hidden + 3 * shape.inner)
    sampling += 2 * 4 * load.sequences * shape.vocabulary
    fused = device.type == "cpu" and dtype == torch.float32 and not config.rollout.exact and fuses(model)
    layer = tokens * layer_bytes(shape, dtype, fused=fused)
    kept = layer * shape.layers
    if config.model.activation_checkpointing:
        kept = layer + b * tokens * shape.hidden * shape.layers
    yield Part("activations", sampling, kept + b * tokens * (4 * shape.inner + shape.hidden))
    logits = min(DEFAULT_BUDGET[device.type], 4 * targets * shape.vocabulary)
    gradient = 4 * shape.vocabulary * shape.hidden
    yield Part("loss head", 0, logits + gradient + 2 * b * targets * shape.hidden)
    if device.type == "cpu":
        yield Part("allocator", 4 * shape.trained, 4 * shape.trained)


def layer_bytes(shape: Shape, dtype: torch.dtype, *, fused: bool) -> int:
    """What one layer keeps of one token for the backward pass.

    Args:
        fused: its norms and gate are those of ``fuse_elementwise``.
    """
    b, heads = dtype.itemsize, shape.queries + shape.keys
    normed = (b * (heads + shape.keys) if fused else (4 + b) * heads) if shape.qk_norm else 0
    norm, gate = (2 * b, 3 * b) if fused else (4 + 2 * b, 4 * b)
    return 2 * norm * shape.hidden + 2 * b * heads + normed + gate * shape.inner


def _cache_bytes(
    config: Config, shape: Shape, device: torch.device, dtype: torch.dtype, load: Load, others: int
) -> int:
    options = config.rollout
    token_bytes = 2 * shape.layers * shape.keys * dtype.itemsize
    longest = options.max_prompt_tokens + options.max_response_tokens
    whole = options.cache_tokens or options.max_sequences * -(-longest // BLOCK_SIZE) * BLOCK_SIZE
    if device.type == "cpu":
        return token_bytes * min(whole, load.cached_tokens)
    free = max(0, device_bytes(device, 1) - others)
    return token_bytes * whole if options.cache_tokens else min(token_bytes * whole, int(GPU_SHARE * free))


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next tensor, where it is glibc.

    It would hand tensors' memory back to the system after each use; every new one then costs a page fault per 4 KiB,
    which takes longer than most element-wise operations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Older ones refuse more than 32 MiB. To set either ends the C library's own adjustment of both.
    if mallopt(_M_MMAP_THRESHOLD, _KEPT_SIZE) or mallopt(_M_MMAP_THRESHOLD, 32 << 20):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def held_bytes(device: torch.device) -> int:
    """What this process holds of the device's memory now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def peak_bytes(device: torch.device) -> int:
    """The most that it has held since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_bytes(device: torch.device, processes: int) -> int:
    """What each of ``processes`` on this machine may have: a GPU of its own, or its part of the main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limit = Path("/sys/fs/cgroup/memory.max")
    granted = limit.read_text().strip() if limit.is_file() else ""
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE
    return min(memory, int(granted) if granted.isdecimal() else memory) // processes
