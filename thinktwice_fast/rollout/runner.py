"""What runs the model for a generation: the C++ decoder on the CPU, CUDA graphs on a GPU, or the model itself."""

import logging
from typing import Literal, Protocol

import torch
from torch.nn.functional import linear

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.csrc import torch_versions
from thinktwice_fast.model.decoder import Decoder
from thinktwice_fast.model.lists import int64, upload
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import Model, Policy, linear_head
from thinktwice_fast.model.products import PackedProducts
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.rollout.graphs import GraphRunner

log = logging.getLogger(__name__)


class Runner(Protocol):
    """One forward pass over the paged cache."""

    exact: bool  # log-probabilities are those of training, bit for bit

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        ...

    def refresh(self) -> None:
        """The weights may have changed."""
        ...

    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:  # float32 [len(last), V]
        """Put the plan's tokens into the cache; the logits of rows ``last``, ascending."""
        ...


class ModuleRunner:
    """The model as it is, over the cache.

    Args:
        model: to be decoded with.
        cache: of its keys and values.
        exact: with exact products (``model/products.py``), those of the head among them.
    """

    def __init__(self, model: Model, cache: PagedKVCache, *, exact: bool = False):
        self._policy = Policy(model)
        self._cache = cache
        self._product = PackedProducts() if exact else linear
        self._head = self._product if exact else linear_head
        self.exact = exact

    @property
    def device(self) -> torch.device:
        return self._policy.device

    def refresh(self) -> None:
        """Nothing to do: weights are read where they are."""

    @torch.inference_mode()
    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:
        ids, rows = upload([int64(tokens), int64(last)], self.device)
        return self._policy(
            ids,
            plan.positions,
            PagedAttention(self._cache, plan),
            rows,
            self._head,
            self._product,
        )


class DecoderRunner:
    """The C++ decoder; ``decoder.decode`` draws many tokens in one call."""

    exact = False
    device = torch.device("cpu")

    def __init__(self, decoder: Decoder, cache: PagedKVCache):
        self.decoder = decoder
        self._cache = cache

    def refresh(self) -> None:
        self.decoder.refresh()

    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:
        return self.decoder.forward(torch.tensor(tokens), plan, torch.tensor(last, dtype=torch.int64), self._cache)


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
    if model.device.type == "cuda":
        return _gpu_runner(model, cache, options, max_tokens)
    if way == "decoder":
        assert isinstance(model, Transformer), "Decoder.supports nothing else"
        decoder = Decoder(model, max_tokens, group_attention=options.group_attention)
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
    if options.cuda_graphs and device.type != "cuda":
        raise UserError(f"--rollout.cuda_graphs true needs a GPU, and the model is on {device.type}: leave it out")
    if options.decoder != "auto" and device.type != "cpu":
        raise UserError(
            f"--rollout.decoder {options.decoder} is a choice for the CPU, and the model is on {device.type}: leave it "
            "out"
        )
    if options.exact:
        if device.type != "cpu" or dtype != torch.float32:
            raise UserError(
                f"--rollout.exact needs float32 on the CPU, and this is {dtype} on {device.type}: leave it out, or "
                "give --model.device cpu --model.compute_dtype float32"
            )
        if not isinstance(model, Transformer):
            raise UserError(f"--rollout.exact does not know {model.config.model_type}: leave it out")
        return "exact"
    if device.type == "cuda":
        return "gpu"
    # Tiles multiply bfloat16 many times as fast as the decoder's float32: torch's own products use them.
    on_tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and options.decoder == "auto"
    if options.decoder != "modules" and not on_tiles and Decoder.supports(model):
        return "decoder"
    _refuse_fused(model, options, device, dtype)
    return "modules"


def _gpu_runner(model: Model, cache: PagedKVCache, options: RolloutOptions, max_tokens: int) -> Runner:
    in_torch = "paged_attention" in torch_versions  # which waits for the GPU, so that it can't be captured
    if options.cuda_graphs and in_torch:
        raise UserError(
            "--rollout.cuda_graphs true needs the extension built with CUDA: install nvcc and run `make clean setup`, "
            "or leave it out"
        )
    if in_torch or options.cuda_graphs is False:
        return ModuleRunner(model, cache)
    return GraphRunner(Policy(model), cache, options.max_sequences, max_tokens)


def _refuse_fused(model: Model, options: RolloutOptions, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where a fused runner was asked for outright."""
    if options.decoder == "fused":
        raise UserError(
            f"--rollout.decoder fused does not know {model.config.model_type} in {dtype} on {device.type}: "
            "leave the option out"
        )
