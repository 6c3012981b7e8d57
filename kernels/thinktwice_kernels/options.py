"""The options and the inputs of the loss, and which of them make sense together.

Letters: T tokens, S sequences.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

PolicyLoss = Literal["clip", "cispo", "sapo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
LossAggMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
RolloutIs = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]
RolloutIsDenominator = Literal["all", "kept"]
GuideFallback = Literal["mask", "clip"]
ScaleRewards = Literal["none", "group", "batch", "mean"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "policy_loss": get_args(PolicyLoss),
    "importance_sampling_level": get_args(ImportanceSamplingLevel),
    "kl_estimator": get_args(KlEstimator),
    "loss_agg_mode": get_args(LossAggMode),
    "rollout_is": get_args(RolloutIs),
    "rollout_is_denominator": get_args(RolloutIsDenominator),
    "guide_fallback": get_args(GuideFallback),
}


_SHAPING = ("shaping_coefficient", "shaping_clamp", "shaping_min_probability")


class LossKeywords(TypedDict, total=False):
    """The options of the loss as keyword arguments; `LossOptions` has their defaults."""

    policy_loss: PolicyLoss
    importance_sampling_level: ImportanceSamplingLevel
    epsilon_low: float
    epsilon_high: float
    dual_clip: float | None
    delta: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    rollout_is: RolloutIs
    rollout_is_cap: float
    rollout_is_floor: float | None
    rollout_is_denominator: RolloutIsDenominator
    shaping_coefficient: float
    shaping_clamp: float
    shaping_min_probability: float
    guide_fallback: GuideFallback
    released_code_compat: bool
    beta: float
    kl_estimator: KlEstimator
    entropy_coef: float
    loss_agg_mode: LossAggMode
    max_response_length: int | None


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What `grpo_loss` computes; its docstring says what each option means.

    Raises ValueError for values out of range. An option that differs from its default and would have no effect
    beside the others is an error too, so that no setting is silently lost.
    """

    policy_loss: PolicyLoss = "clip"
    importance_sampling_level: ImportanceSamplingLevel = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    rollout_is: RolloutIs = "none"
    rollout_is_cap: float = 2.0
    rollout_is_floor: float | None = None
    rollout_is_denominator: RolloutIsDenominator = "all"
    shaping_coefficient: float = 2.5e-4
    shaping_clamp: float = 1e-3
    shaping_min_probability: float = 0.01
    guide_fallback: GuideFallback = "mask"
    released_code_compat: bool = False
    beta: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    loss_agg_mode: LossAggMode = "token-mean"
    max_response_length: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        self._check_ranges()
        self._check_policy()
        self._check_aggregation()

    def encode(self) -> list[float]:
        """Every field as a number, for a schema of torch.library; `decode` turns them back."""
        values = []
        for name in _DEFAULTS:
            value = getattr(self, name)
            if name in _CHOICES:
                value = _CHOICES[name].index(value)
            values.append(math.nan if value is None else float(value))
        return values

    @staticmethod
    def decode(numbers: Sequence[float]) -> "LossOptions":
        """The options that `encode` made these numbers of."""
        return _decoded(tuple(numbers))

    def needs_whole_sequences(self) -> bool:
        """Whether one token's loss depends on the other tokens of its sequence."""
        return self.importance_sampling_level == "sequence" or self.rollout_is.startswith("sequence")

    def needs_borders(self) -> bool:
        """Whether it matters to a token where its sequence begins and ends."""
        return self.needs_whole_sequences() or self.released_code_compat

    def counts_kept_only(self) -> bool:
        """Whether what `rollout_is` drops is out of the loss altogether."""
        return self.rollout_is_denominator == "kept"

    def skips_zero_advantages(self) -> bool:
        """Whether a token with advantage exactly 0 adds nothing."""
        return self.beta == 0 and self.entropy_coef == 0

    def check_inputs(self, given: Collection[str]) -> None:
        """Raise ValueError if an option needs, or is without effect without, an optional tensor not in `given`."""
        if self.beta != 0 and "ref_logps" not in given:
            raise ValueError(f"beta is {self.beta} but there are no ref_logps: pass them, or set beta=0")
        if self.entropy_coef != 0 and "entropy" not in given:
            raise ValueError(
                f"entropy_coef is {self.entropy_coef} but there is no entropy: pass the [T] entropies that "
                "token_logprobs or linear_logprobs returns with return_entropy=True, or set entropy_coef=0"
            )
        if self.rollout_is != "none" and "rollout_logps" not in given:
            raise ValueError(
                f"rollout_is is {self.rollout_is!r} but there are no rollout_logps: pass the rollout engine's "
                "log-probabilities, or set rollout_is='none'"
            )
        if self.counts_kept_only() and "old_logps" not in given:
            raise ValueError(
                "rollout_is_denominator='kept' needs to know what is dropped before the loss is computed: pass "
                "old_logps (on policy the current ones, detached), or set rollout_is_denominator='all'"
            )
        if "ref_logps" not in given:
            self._refuse("without ref_logps", "kl_estimator")
        if "guide_mask" not in given:
            self._refuse("without guide_mask", *_SHAPING, "guide_fallback", "released_code_compat")

    def _check_ranges(self) -> None:
        if not 0 <= self.epsilon_low <= 1:
            raise ValueError(f"epsilon_low is {self.epsilon_low}: choose a number from 0 to 1")
        if not self.epsilon_high >= 0:
            raise ValueError(f"epsilon_high is {self.epsilon_high}: choose a number that is not negative")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}: choose a number above 1, or None")
        if self.delta is not None and not self.delta > 1 + self.epsilon_high:
            raise ValueError(
                f"delta is {self.delta}: choose a number above 1 + epsilon_high = {1 + self.epsilon_high:g}, or None"
            )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "rollout_is_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a positive number")
        for name in _SHAPING:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a number from 0 to 1")
        if self.rollout_is_floor is not None and not 0 <= self.rollout_is_floor <= self.rollout_is_cap:
            raise ValueError(
                f"rollout_is_floor is {self.rollout_is_floor}: choose a number from 0 to rollout_is_cap = "
                f"{self.rollout_is_cap:g}, or None"
            )

    def _check_policy(self) -> None:
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError(
                "dual_clip and delta both bound the ratio where the advantage is negative: set one of them to None"
            )
        if self.policy_loss != "clip":
            self._refuse(f"with policy_loss={self.policy_loss!r}", "dual_clip", "delta", "epsilon_low")
        if self.policy_loss == "sapo":
            self._refuse("with policy_loss='sapo'", "epsilon_high")
        else:
            self._refuse(f"with policy_loss={self.policy_loss!r}", "sapo_temperature_pos", "sapo_temperature_neg")
        if self.rollout_is == "none":
            self._refuse("with rollout_is='none'", "rollout_is_cap", "rollout_is_floor")
        if not self.rollout_is.endswith("mask"):
            self._refuse(f"with rollout_is={self.rollout_is!r}", "rollout_is_denominator")
        if self.released_code_compat:
            self._refuse("with released_code_compat", "shaping_coefficient")
        if self.guide_fallback == "clip" and self.importance_sampling_level == "sequence":
            raise ValueError(
                "guide_fallback='clip' needs a ratio of the guided token's own: set importance_sampling_level='token', "
                "or guide_fallback='mask'"
            )

    def _check_aggregation(self) -> None:
        if self.loss_agg_mode != "seq-mean-token-sum-norm":
            self._refuse(f"with loss_agg_mode={self.loss_agg_mode!r}", "max_response_length")
        elif self.max_response_length is None:
            raise ValueError(
                "loss_agg_mode='seq-mean-token-sum-norm' divides by the longest response allowed: pass it as "
                "max_response_length"
            )
        elif not self.max_response_length > 0:
            raise ValueError(f"max_response_length is {self.max_response_length}: choose a positive number of tokens")

    def _refuse(self, circumstance: str, *names: str) -> None:
        for name in names:
            default = _DEFAULTS[name]
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect {circumstance}: leave it at {default!r}"
                )


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(LossOptions)}


@lru_cache(maxsize=64)
def _decoded(numbers: tuple[float, ...]) -> LossOptions:
    values: dict[str, Any] = {}
    for (name, default), number in zip(_DEFAULTS.items(), numbers, strict=True):
        if name in _CHOICES:
            values[name] = _CHOICES[name][int(number)]
        elif math.isnan(number):
            values[name] = None
        else:
            values[name] = bool(number) if default is False else number
    return LossOptions(**values)


@dataclass(frozen=True)
class LossInputs:
    """The tensors of a loss, checked, contiguous, on one device; floating ones in the type of `logps`."""

    logps: Tensor  # [T], fp32 or float64
    advantages: Tensor | None  # [S] or [T]; None: from the rewards
    cu_seqlens: Tensor  # [S+1] int32 or int64
    weights: Tensor  # [S] or [T]: what each token's term is multiplied by in the loss
    old_logps: Tensor | None = None  # [T]
    ref_logps: Tensor | None = None  # [T]
    rollout_logps: Tensor | None = None  # [T]
    entropy: Tensor | None = None  # [T]
    loss_mask: Tensor | None = None  # [T] bool
    guide_mask: Tensor | None = None  # [T] bool
    rewards: Tensor | None = None  # [S] fp32 or float64
    group_ids: Tensor | None = None  # [S] int64
    scale_rewards: ScaleRewards = "none"
    advantage_eps: float = 1e-6


class Sequences:
    """Which token belongs to which sequence, and sums over sequences."""

    def __init__(
        self,
        cu_seqlens: Tensor,  # [S+1], int32 or int64
        tokens: int,
    ):
        self.count = cu_seqlens.numel() - 1
        self.offsets = cu_seqlens  # [S+1]
        self._tokens = tokens

    @cached_property
    def of_token(self) -> Tensor:
        """[T]: the number of each token's sequence."""
        if self.offsets.device.type == "cpu":
            return torch.repeat_interleave(self.offsets.diff(), output_size=self._tokens)
        # A GPU's offsets are not checked, and this writes nowhere that they say.
        positions = torch.arange(self._tokens, device=self.offsets.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets[1:].contiguous(), positions, right=True)

    def sum(self, values: Tensor) -> Tensor:
        """[T] -> [S]: the sum over each sequence's tokens; 0 for an empty one."""
        return values.new_zeros(self.count).index_add(0, self.of_token, values)

    def spread(self, values: Tensor) -> Tensor:
        """[S] -> [T]: each token gets its sequence's value."""
        return values.index_select(0, self.of_token)

    def any(self, flags: Tensor) -> Tensor:
        """[T] bool -> [T] bool: whether any token of the same sequence has the flag."""
        return self.spread(self.sum(flags.to(torch.int32)) > 0)


def guided_tokens(
    guide_mask: Tensor | None,  # [T] bool
    loss_mask: Tensor,  # [T] bool
    sequences: Sequences,
    options: LossOptions,
) -> Tensor | None:  # [T] bool
    """The guided ones, of the loss tokens or of all; None: there are none."""
    if guide_mask is None:
        return None
    guided = guide_mask & loss_mask
    return sequences.any(guided) if options.released_code_compat else guided


@dataclass(frozen=True)
class Selection:
    """The tokens that a loss computes, one after another, with what it needs of each."""

    rows: Tensor  # [N] int64, rising, of the T; not to be read where `everything`
    everything: bool  # N = T
    in_loss: Tensor  # [] int64: how many of the T are loss tokens
    inputs: LossInputs  # of the N tokens: advantages and weights one per token, no loss_mask
    borders: list[int] | None  # the values of `inputs.cu_seqlens` where the options need them


def select_tokens_in_torch(inputs: LossInputs, tokens: int, options: LossOptions) -> Selection:
    """The tokens in the loss, without those that have no signal, of T = `tokens`; weights are one per sequence.

    Where `LossOptions.skips_zero_advantages` holds, a token has no signal if its advantage is 0; where the loss needs
    whole sequences, if that of each loss token of its sequence is.
    """
    assert inputs.advantages is not None
    sequences = Sequences(inputs.cu_seqlens, tokens)
    mask = inputs.loss_mask
    if mask is None:
        mask = torch.ones(tokens, dtype=torch.bool, device=inputs.weights.device)
    advantages = inputs.advantages
    if advantages.numel() == sequences.count:
        advantages = sequences.spread(advantages)
    computed = mask
    if options.skips_zero_advantages():
        computed = mask & (advantages != 0)
        if options.needs_whole_sequences():
            computed = mask & sequences.any(computed)
    guided = guided_tokens(inputs.guide_mask, mask, sequences, options)
    rows = torch.nonzero(computed).squeeze(1)
    everything = rows.numel() == tokens

    def of_computed(values: Tensor | None) -> Tensor | None:
        return values if values is None or everything else values.index_select(0, rows)

    weights = sequences.spread(inputs.weights)
    cu_seqlens = torch.searchsorted(rows, sequences.offsets)
    compact = replace(
        inputs,
        advantages=of_computed(advantages),
        weights=weights if everything else weights.index_select(0, rows),
        cu_seqlens=cu_seqlens,
        old_logps=of_computed(inputs.old_logps),
        ref_logps=of_computed(inputs.ref_logps),
        rollout_logps=of_computed(inputs.rollout_logps),
        guide_mask=of_computed(guided),
        loss_mask=None,
    )
    borders = cu_seqlens.tolist() if options.needs_borders() else None
    return Selection(rows, everything, mask.sum(), compact, borders)


def prepared_tensors(
    optional: Mapping[str, Tensor | None],
    shape: torch.Size,  # [T]
    options: LossOptions,
    dtype: torch.dtype,
    computed: Collection[str] = (),
) -> dict[str, Tensor | None]:
    """The optional tensors [T] checked, and as the ops take them: masks as bool, the others in `dtype`.

    Only `entropy` keeps its gradient. `computed` names those that are not given but computed on the way.
    """
    options.check_inputs({name for name, tensor in optional.items() if tensor is not None} | set(computed))
    prepared: dict[str, Tensor | None] = {}
    for name, tensor in optional.items():
        if tensor is None:
            prepared[name] = None
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: pass one value per token, {list(shape)}")
        if name.endswith("mask"):
            tensor = tensor if tensor.dtype == torch.bool else tensor != 0
        else:
            tensor = (tensor if name == "entropy" else tensor.detach()).to(dtype)
        prepared[name] = tensor.contiguous()
    return prepared


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` [S+1] partitions `tokens`.

    The values are looked at on the CPU only, and not while compiling: on a GPU that would wait for the device.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and type {cu_seqlens.dtype}: pass the int32 offsets [S+1], "
            "from 0 to the number of tokens"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    falls = any(start > stop for start, stop in pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != tokens or falls:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}: it starts with {offsets[0]}, ends with "
            f"{offsets[-1]}" + (" and falls in between" if falls else "")
        )


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Raise ValueError for a number that is no positive count."""
    if isinstance(normalizer, float | int) and not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer}: pass a positive count, or None for this batch's own")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {list(normalizer.shape)}: pass a single count")


def loss_weights(
    cu_seqlens: Tensor,  # [S+1]
    loss_mask: Tensor | None,  # [T] bool
    options: LossOptions,
    normalizer: float | Tensor | None,
    like: Tensor,  # gives the number of tokens T, the type and the device
    dropped: Tensor | None = None,  # []: sequences that count no more
) -> Tensor:
    """[S]: what the terms of a sequence's tokens are multiplied by, so that the sum of all is the loss."""
    count = cu_seqlens.numel() - 1
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.reshape(())
    if normalizer is None:
        normalizer = counted(cu_seqlens, loss_mask, options, like.shape[0], dropped)
        normalizer = normalizer.clamp(min=1).to(like.device) if isinstance(normalizer, Tensor) else max(normalizer, 1)
    weights = like.new_ones(count, dtype=torch.float64) / normalizer
    if options.loss_agg_mode != "token-mean":
        if options.loss_agg_mode == "seq-mean-token-mean":
            weights = weights / _loss_tokens(cu_seqlens, loss_mask, like).clamp(min=1)
        elif options.max_response_length is not None:
            weights = weights / options.max_response_length
    return weights.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def counted(
    cu_seqlens: Tensor,  # [S+1]
    loss_mask: Tensor | None,  # [T] bool
    options: LossOptions,
    tokens: int | Tensor,  # T
    dropped: Tensor | None,  # []: sequences that count no more
) -> int | Tensor:  # []
    """What `loss_agg_mode` divides by: loss tokens, or sequences."""
    if options.loss_agg_mode == "token-mean":
        return tokens if loss_mask is None else loss_mask.sum()
    return cu_seqlens.numel() - 1 if dropped is None else cu_seqlens.numel() - 1 - dropped


def _loss_tokens(cu_seqlens: Tensor, loss_mask: Tensor | None, like: Tensor) -> Tensor:  # [S]
    if loss_mask is None:
        return cu_seqlens.to(like.device).diff()
    sequences = Sequences(cu_seqlens.to(like.device), like.shape[0])
    return sequences.sum(loss_mask.to(like.device, torch.float64))
