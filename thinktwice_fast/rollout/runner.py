"""What runs the model for rollouts: the C++ decoder on the CPU, CUDA graphs on a GPU, or the model itself."""

import logging
from typing import Literal

import torch
import transformers
from packaging.version import Version

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.csrc import torch_versions
from thinktwice_fast.model.decoder import Decoder
from thinktwice_fast.model.lists import int64
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import Model
from thinktwice_fast.model.rotary import rope_types
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.rollout.batch import Batch, NewTokens
from thinktwice_fast.rollout.graphs import GraphRunner
from thinktwice_fast.rollout.modules import ModuleRunner
from thinktwice_fast.rollout.step import Runner, not_finite, random_keys, sampling_columns

log = logging.getLogger(__name__)

# Types of rotary angles with which transformers' modules look at the positions on the host: no CUDA graph can.
_HOST_ROPE_TYPES = {"dynamic"} if Version(transformers.__version__) >= Version("5.23") else {"dynamic", "longrope"}


class DecoderRunner(Runner):
    """The C++ decoder, which draws many tokens in one call where all sequences decode."""

    def __init__(self, decoder: Decoder, cache: PagedKVCache):
        self._decoder = decoder
        self._cache = cache

    def refresh(self) -> None:
        self._decoder.refresh()

    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:
        return self._decoder.forward(int64(tokens), plan, int64(last), self._cache)

    def step(self, batch: Batch, most: int) -> NewTokens:
        if not batch.decodes:
            return super().step(batch, most)
        sample_ids, positions = random_keys(batch)
        decoded = self._decoder.decode(
            self._cache,
            int64([sequence.cached for sequence in batch.sequences]),
            int64(batch.tokens),
            sampling_columns(batch),
            seed=batch.seed,
            sample_ids=sample_ids,
            positions=positions,
            left=int64([how.max_tokens - n for how, n in zip(batch.samplings, positions.tolist(), strict=True)]),
            stop_ids=batch.stop_ids,
            steps=most,
            enough_ended=1 if batch.others_wait else len(batch.sequences),
        )
        counts = decoded.counts.tolist()
        tokens, logps, entropies = (
            [row[:n] for row, n in zip(column.tolist(), counts, strict=True)]
            for column in (decoded.tokens, decoded.logps, decoded.entropies)
        )
        if any(row[-1] < 0 for row in tokens):
            raise not_finite()
        return NewTokens(tokens, logps, entropies)


def make_runner(model: Model, cache: PagedKVCache, options: RolloutOptions, max_tokens: int) -> Runner:
    """The fastest that runs this model.

    Args:
        model: to be decoded with.
        cache: of its keys and values.
        options: which runner is wanted.
        max_tokens: longest sequence.

    Raises:
        UserError: what the options ask for can't be had for this model, on this device or with this build.
    """
    way = planned_runner(model, options, model.device, model.dtype)
    if way == "exact":
        return ModuleRunner(model, cache, exact=True)
    if way == "gpu":
        return _gpu_runner(model, cache, options, max_tokens)
    if way == "decoder":
        assert isinstance(model, Transformer), "Decoder.supports nothing else"
        decoder = Decoder(model, max_tokens, group_attention=cache.group_attention)
        if decoder.reproduces(model):
            return DecoderRunner(decoder, cache)
        log.warning("the fused decoder does not reproduce %s: rollouts run its modules", model.config.model_type)
        _refuse_fused(model, options, model.device, model.dtype)
    return ModuleRunner(model, cache)


def planned_runner(
    model: Model, options: RolloutOptions, device: torch.device, dtype: torch.dtype
) -> Literal["exact", "decoder", "modules", "gpu"]:
    """What ``make_runner`` will try first, from the model's shape alone (its tensors may be on the meta device).

    Args:
        model: to be decoded with.
        options: which runner is wanted.
        device, dtype: where and in which type the model will be.

    Raises:
        UserError: what the options ask for can't be had.
    """
    if options.exact:
        if device.type != "cpu" or dtype != torch.float32:
            raise UserError(
                (Option("rollout.exact"), f" needs float32 on the CPU, and this is {dtype} on {device.type}"),
                "leave it out",
                ("give ", Option("model.device", "cpu"), " ", Option("model.compute_dtype", "float32")),
            )
        if not isinstance(model, Transformer):
            raise UserError((Option("rollout.exact"), f" does not know {model.config.model_type}"), "leave it out")
        return "exact"
    if device.type == "cuda":
        if options.decoder != "modules" and _can_be_captured(model):
            return "gpu"
        _refuse_fused(model, options, device, dtype)
        return "modules"
    # Tiles multiply bfloat16 many times as fast as the decoder's float32: torch's own products use them.
    on_tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and options.decoder == "auto"
    if options.decoder != "modules" and not on_tiles and Decoder.supports(model):
        return "decoder"
    _refuse_fused(model, options, device, dtype)
    return "modules"


def _can_be_captured(model: Model) -> bool:
    """Whether nothing is known that keeps a decoding step from being a CUDA graph."""
    config = model.config.get_text_config()
    if isinstance(model, Transformer) or getattr(config, "rope_parameters", None) is None:
        return True
    return not _HOST_ROPE_TYPES & {own["rope_type"] for own in rope_types(config).values()}


def _gpu_runner(model: Model, cache: PagedKVCache, options: RolloutOptions, max_tokens: int) -> Runner:
    if "paged_attention" not in torch_versions:  # those wait for the GPU, so that they can't be captured
        return GraphRunner(model, cache, options.max_sequences, max_tokens)
    if options.decoder == "fused":
        raise UserError(
            (Option("rollout.decoder", "fused"), " needs the extension built with CUDA"),
            "install nvcc and run `make clean setup`",
            "leave it out",
        )
    return ModuleRunner(model, cache)


def _refuse_fused(model: Model, options: RolloutOptions, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where a fused runner was asked for outright."""
    if options.decoder == "fused":
        raise UserError(
            (
                Option("rollout.decoder", "fused"),
                f" does not know {model.config.model_type} in {dtype} on {device.type}",
            ),
            "leave the option out",
        )
