"""How much memory a run takes at its peak, part by part, from the model's shape and the options alone.

Letters: n parameters, m of them trained, N processes that share their shards, b bytes of the compute type;
L layers of l parameters, H hidden size, I inner size of the MLP, Q / K elements of all query / key heads of a token,
V vocabulary; S sequences that decode at once; T tokens and R response tokens of the largest micro-batch.

    master weights       4 n / N; with LoRA b n / N for the weights below the adapters, and 4 m / N
    gradients            4 m / N, in updates
    AdamW                8 m / N, with 8-bit moments 2 m; on the CPU from the first update on
    reference            b n / N, with a KL term
    gathered weights     b (rest + 2 l) + (b + 4) max(rest, l), in updates, where FSDP2 gathers them: the rest of the
                         model (embedding and head) throughout, two layers at a time, and a gradient until it is reduced
    checkpoint copy      what a process has of master weights and AdamW, and the largest weight at most, in main memory:
                         there while a checkpoint is written in the background; on the CPU a part of the peak
    start weights        4 m / N, with STaR, in main memory: what each iteration starts from; on the CPU a part of the
                         peak
    compute weights      b n, where rollouts (and one process's updates) do not read the masters
    teacher              b n of its model, its packed weights and graphs, a KV cache where the policy's does not fit it,
                         and what its activations take more than the policy's
    packed weights       b (n - V H, or n where the head is the embedding), for the C++ decoder
    KV cache             2 L K b a token, of the tokens that all sequences which are there together take at their
                         longest, the full blocks of a prompt once (``workload.needed_blocks``); on a GPU at most what
                         the rest leaves: while sampling where updates have its memory (``arena.Arena``), else in both
    activations, update  T (4 b I + b H)                       what a layer's backward adds to
                       + T L (4 b H                            two norms: input, output
                              + 2 b (Q + K)                    rotated queries and keys, values, attention's output
                              + b (Q + 2 K)                    QK-norm where there is one: the joint product
                              + 3 b I)                         gate, up, the product of silu(gate) with it
                         with checkpointing of the L layers all but b T H each for one layer; transformers' modules keep
                         2 (4 + 2 b) H for norms, (4 + b) (Q + K) for QK-norm, and silu(gate) besides
    activations, rollout b t (2 H + 3 I) of t tokens in one pass, and 2 * 4 S V for logits
    loss head            a tile of logits with their gradients (``bytes_per_logit``) of as many of the R as its budget
                         holds, two on a GPU where they are float32, 4 V H of the weight's gradient, 2 b R H of hidden
                         states and theirs
    CUDA graphs          b S (2 H + 3 I) + 8 S V on a GPU: the memory of decoding steps, which they keep
    libraries            1 GiB on a GPU: CUDA's context with the kernels, the workspaces of its libraries
    NCCL                 where FSDP2 shards on GPUs: 0.5 GiB of one process, else 1.5 GiB for each group that it is in
    allocator            4 m on the CPU: holes that the C library keeps where gradients lay among activations
                         (measured), and 32 MiB that a process grows by over many steps (the default job: 38 in 200);
                         on a GPU 3 % of it: gaps between tensors that no other fits into
    shared prompts' keys 2 b K a layer and key on a GPU, in layers whose attention copies them for each response

T, R and those keys are bounds that hold however long the responses are, see ``workload``. Attention's parts in a
decoding step on a GPU, of up to 256 MiB, are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from thinktwice_fast.config import Config, ModelOptions, RolloutOptions
from thinktwice_fast.model.flash import copying_layers
from thinktwice_fast.model.flops import windows
from thinktwice_fast.model.lora import adapter_parameters
from thinktwice_fast.model.policy import Model, attention_heads, decoder_layers
from thinktwice_fast.model.sharding import shards_weights
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.rollout.engine import BLOCK_SIZE, SPARE_BLOCKS, blocks_for, cache_blocks
from thinktwice_fast.rollout.runner import planned_runner
from thinktwice_fast.run.device_memory import device_bytes
from thinktwice_fast.update.optimizer import MOMENT_BYTES
from thinktwice_kernels.rows import bytes_per_logit, rows_per_tile

_GPU_LIBRARIES = 1 << 30
_NCCL_ALONE, _NCCL_GROUP = 1 << 29, 3 << 29
_CPU_GROWTH = 32 << 20
_GPU_MARGIN = 0.03  # of a GPU's memory


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
    def of(cls, model: Model, options: ModelOptions) -> "Shape":
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
            inner=_inner_size(model, blocks[0]) if blocks else 0,
            queries=query_heads * head_dim,
            keys=kv_heads * head_dim,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        )


def _inner_size(model: Model, block: torch.nn.Module) -> int:
    if isinstance(model, Transformer):
        return model.config.intermediate_size
    return max((max(p.shape) for p in block.parameters() if p.dim() > 1), default=0)


@dataclass(frozen=True)
class Load:
    """The most that one process has to hold at a time."""

    sequences: int  # decoding at once
    needed_blocks: int  # of KV cache, by all that are in it together
    pass_tokens: int  # of one forward pass while sampling
    row_tokens: int  # T
    row_targets: int  # R
    row_keys: int  # keys that its segments see
    teacher_tokens: int = 0  # of a teacher's prompt and answer, in the same cache


@dataclass(frozen=True)
class SecondModel:
    """One that is sampled from beside the policy."""

    model: Model  # may be on the meta device
    copied: bool  # its weights are there for it alone
    cache_blocks: int  # of a KV cache of its own; 0 = it uses the policy's


@dataclass(frozen=True)
class Part:
    """Bytes of one process."""

    name: str
    rollout: int
    update: int
    held: int = 0  # of both, before there is a rollout engine


@dataclass(frozen=True)
class Prediction:
    """The peak of one process, by part and phase."""

    parts: tuple[Part, ...]  # all but the KV cache
    cache_bytes: int
    cache_tokens: int  # that the KV cache has room for
    lends: bool = False  # the KV cache leaves its memory to updates

    @property
    def rollout(self) -> int:
        """Bytes while sampling, once an update has been made."""
        return sum(part.rollout for part in self.parts) + self.cache_bytes

    @property
    def update(self) -> int:
        """Bytes while training."""
        return sum(part.update for part in self.parts) + self.cache_update

    @property
    def cache_update(self) -> int:
        """Bytes of the KV cache while training."""
        return 0 if self.lends else self.cache_bytes

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.rollout, self.update)

    @property
    def peak_phase(self) -> str:
        """In which of the two it is."""
        return "update" if self.update >= self.rollout else "rollout"

    @property
    def reserve(self) -> int:
        """What a run takes while its KV cache is there, and beside it, beyond what it holds when that is made."""
        together = self.rollout if self.lends else self.peak
        return together - self.cache_bytes - sum(part.held for part in self.parts)


def predict(
    config: Config,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    load: Load,
    world: int,
    base: int,
    room: int,
    second: SecondModel | None = None,
    *,
    lends: bool = False,
) -> Prediction:
    """The peak of each of ``world`` processes.

    Args:
        model: may be on the meta device.
        device, dtype: where it will be, and the compute type.
        load: of the process that has most.
        base: bytes that the program holds on ``device`` before it loads the model.
        room: bytes that a process may have there.
        second: a teacher's model.
        lends: the KV cache's memory is an arena, which updates have in between.
    """
    shape = Shape.of(model, config.model)
    packed, graphs = _runner_bytes(config.rollout, shape, model, device, dtype, load.sequences)
    parts = [Part("program", base, base, base), *_weights(config, shape, device, dtype, world)]
    parts += [Part("packed weights", packed, packed), *_working(config, shape, model, device, dtype, load)]
    if second is not None:
        parts += _second(config, shape, second, device, dtype, load)
    parts.append(Part("CUDA graphs", graphs, graphs))
    if device.type == "cuda":
        margin = int(_GPU_MARGIN * room)
        parts.append(Part("libraries", _GPU_LIBRARIES, _GPU_LIBRARIES, _GPU_LIBRARIES))
        parts.append(Part("allocator", margin, margin))
    others = Prediction(tuple(part for part in parts if part.rollout or part.update), 0, 0, lends)
    block_bytes = _block_bytes(shape, dtype)
    spare = SPARE_BLOCKS if device.type == "cuda" else 0
    beside = others.rollout if lends else others.peak
    blocks = _cache_blocks(config.rollout, load, device, (room - beside) // block_bytes - spare)
    return replace(others, cache_bytes=block_bytes * (blocks + spare), cache_tokens=BLOCK_SIZE * blocks)


def _weights(config: Config, shape: Shape, device: torch.device, dtype: torch.dtype, world: int) -> Iterator[Part]:
    b, n, m = dtype.itemsize, shape.parameters, shape.trained
    shards = config.update.shard_processes or world
    lora = bool(config.model.lora_rank)
    own = _master_bytes(shape, b, lora=lora)
    rest = n - shape.layers * shape.layer_parameters
    moments = MOMENT_BYTES[config.update.optimizer] * m // shards
    yield Part("master weights", *(own // shards,) * 3)
    yield Part("gradients", 0, 4 * m // shards)
    yield Part("optimizer state", moments, moments)
    if device.type == "cpu" and config.run.save:
        copied = checkpoint_bytes(config, shape, dtype, world)
        yield Part("checkpoint copy", copied, copied)
    if device.type == "cpu" and config.algorithm == "star":
        yield Part("start weights", *(4 * m // shards,) * 2)
    if config.loss.beta:
        yield Part("reference weights", *(b * n // shards,) * 3)
    if shards_weights(world, dtype, lora=lora):
        largest = max(rest, shape.layer_parameters)
        yield Part("gathered weights", 0, b * (rest + 2 * shape.layer_parameters) + (b + 4) * largest)
        if device.type == "cuda":
            yield Part("NCCL", *(_NCCL_ALONE if world == 1 else (1 if shards == world else 2) * _NCCL_GROUP,) * 3)
    if world > 1 or lora or dtype != torch.float32:
        yield Part("compute weights", *(b * n,) * 3)


def checkpoint_bytes(config: Config, shape: Shape, dtype: torch.dtype, world: int) -> int:
    """Bytes of main memory that each process takes while a checkpoint is written; rank 0 joins one weight at a time."""
    shards, lora = config.update.shard_processes or world, bool(config.model.lora_rank)
    kept = _master_bytes(shape, dtype.itemsize, lora=lora) + MOMENT_BYTES[config.update.optimizer] * shape.trained
    joined = 4 * max(shape.vocabulary, shape.inner) * shape.hidden if world > 1 or lora else 0
    return kept // shards + joined


def _master_bytes(shape: Shape, b: int, *, lora: bool) -> int:
    return b * shape.parameters + 4 * shape.trained if lora else 4 * shape.parameters


def _working(
    config: Config, shape: Shape, model: Model, device: torch.device, dtype: torch.dtype, load: Load
) -> Iterator[Part]:
    b, tokens, targets, options = dtype.itemsize, load.row_tokens, load.row_targets, config.rollout
    sampling = _sampling_bytes(shape, dtype, load.pass_tokens, load.sequences)
    layer = tokens * layer_bytes(shape, dtype, own=isinstance(model, Transformer))
    kept = layer * shape.layers
    if config.model.activation_checkpointing:
        kept = layer + b * tokens * shape.hidden * shape.layers
    yield Part("activations", sampling, kept + b * tokens * (4 * shape.inner + shape.hidden))
    layers = copying_layers(device, dtype, attention_heads(model), windows(model.config.get_text_config()), options)
    copies = 2 * b * load.row_keys * shape.keys * (min(layers, 1) if config.model.activation_checkpointing else layers)
    yield Part("keys of shared prompts", 0, copies)
    logit = bytes_per_logit(torch.float32, dtype if device.type == "cuda" else torch.float32)
    rows = min(targets, rows_per_tile(shape.vocabulary, logit, device))
    # A GPU compacts a tile that becomes its own gradient into another, where rows without gradient leave it.
    tiles = 2 if device.type == "cuda" and logit == torch.float32.itemsize else 1
    gradient = 4 * shape.vocabulary * shape.hidden
    yield Part("loss head", 0, tiles * logit * rows * shape.vocabulary + gradient + 2 * b * targets * shape.hidden)
    if device.type == "cpu":
        holes = 4 * shape.trained + _CPU_GROWTH
        yield Part("allocator", holes, holes)


def _second(
    config: Config, policy: Shape, second: SecondModel, device: torch.device, dtype: torch.dtype, load: Load
) -> Iterator[Part]:
    shape = Shape.of(second.model, ModelOptions())
    theirs, ours = (_sampling_bytes(one, dtype, load.pass_tokens, load.sequences) for one in (shape, policy))
    weights = dtype.itemsize * shape.parameters if second.copied else 0
    options = replace(config.rollout, exact=False)
    packed, graphs = _runner_bytes(options, shape, second.model, device, dtype, load.sequences)
    cache = second.cache_blocks * _block_bytes(shape, dtype)
    yield Part("teacher weights", weights, weights)
    yield Part("teacher packed weights", packed, packed)
    yield Part("teacher KV cache", cache, cache)
    yield Part("teacher activations", max(0, theirs - ours), 0)
    yield Part("teacher CUDA graphs", graphs, graphs)


def _runner_bytes(
    options: RolloutOptions, shape: Shape, model: Model, device: torch.device, dtype: torch.dtype, sequences: int
) -> tuple[int, int]:
    """Of the C++ decoder's packed weights, and of CUDA graphs of decoding steps; 0 for what does not run the model."""
    runner = planned_runner(model, options, device, dtype)
    packed = dtype.itemsize * (shape.parameters - (0 if shape.tied else shape.vocabulary * shape.hidden))
    graphs = _sampling_bytes(shape, dtype, sequences, sequences)
    return packed if runner == "decoder" else 0, graphs if runner == "gpu" else 0


def _block_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return 2 * shape.layers * shape.keys * dtype.itemsize * BLOCK_SIZE


def layer_bytes(shape: Shape, dtype: torch.dtype, *, own: bool) -> int:
    """What one layer keeps of one token for the backward pass; ``own``: it is one of ``Transformer``'s."""
    b, heads = dtype.itemsize, shape.queries + shape.keys
    normed = (b * (heads + shape.keys) if own else (4 + b) * heads) if shape.qk_norm else 0
    norm, gate = (2 * b, 3 * b) if own else (4 + 2 * b, 4 * b)
    return 2 * norm * shape.hidden + 2 * b * heads + normed + gate * shape.inner


def sampling_reserve(model: Model, options: RolloutOptions, max_tokens: int) -> int:
    """Bytes that rollouts take of the model's GPU beside weights and KV cache; 0 for one on the CPU.

    Args:
        model: decoded with, where nothing is trained.
        options: how many sequences and tokens at once.
        max_tokens: of a sequence.
    """
    if model.device.type != "cuda":
        return 0
    shape, sequences = Shape.of(model, ModelOptions()), options.max_sequences
    tokens = min(options.max_batch_tokens, sequences * max_tokens)
    _, graphs = _runner_bytes(options, shape, model, model.device, model.dtype, sequences)
    margin = int(_GPU_MARGIN * device_bytes(model.device, 1))
    return _sampling_bytes(shape, model.dtype, tokens, sequences) + graphs + margin


def _sampling_bytes(shape: Shape, dtype: torch.dtype, pass_tokens: int, sequences: int) -> int:
    activations = dtype.itemsize * pass_tokens * (2 * shape.hidden + 3 * shape.inner)
    return activations + 2 * 4 * sequences * shape.vocabulary


def _cache_blocks(options: RolloutOptions, load: Load, device: torch.device, room: int) -> int:
    longest = blocks_for(max(options.max_prompt_tokens + options.max_response_tokens, load.teacher_tokens))
    if device.type == "cuda":
        return max(longest, cache_blocks(options, load.needed_blocks, longest, room))
    return min(cache_blocks(options, load.needed_blocks, longest), load.needed_blocks)  # memory counts once written
