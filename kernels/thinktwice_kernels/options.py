"""The options of the loss, and which of them make sense together."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, TypedDict, get_args

PolicyLoss = Literal["clip", "cispo", "sapo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
LossAggMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
RolloutIs = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]
GuideFallback = Literal["mask", "clip"]
ScaleRewards = Literal["none", "group", "batch"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "policy_loss": get_args(PolicyLoss),
    "importance_sampling_level": get_args(ImportanceSamplingLevel),
    "kl_estimator": get_args(KlEstimator),
    "loss_agg_mode": get_args(LossAggMode),
    "rollout_is": get_args(RolloutIs),
    "guide_fallback": get_args(GuideFallback),
}


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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                value = _CHOICES[field.name].index(value)
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
        if "ref_logps" not in given:
            self._refuse("without ref_logps", "kl_estimator")
        if "guide_mask" not in given:
            self._refuse("without guide_mask", "guide_fallback", "released_code_compat")

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
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect {circumstance}: leave it at {defaults[name]!r}"
                )


@lru_cache(maxsize=64)
def _decoded(numbers: tuple[float, ...]) -> LossOptions:
    values: dict[str, Any] = {}
    for field, number in zip(fields(LossOptions), numbers, strict=True):
        if field.name in _CHOICES:
            values[field.name] = _CHOICES[field.name][int(number)]
        elif math.isnan(number):
            values[field.name] = None
        else:
            values[field.name] = bool(number) if field.default is False else number
    return LossOptions(**values)
