"""Losses of padded batches, by the names and definitions that TRL and Liger share.

Letters: B sequences, padded to L tokens. A is the advantage, r the importance ratio, logp the current log-probability.
"""

import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from thinktwice_kernels import grpo_loss
from thinktwice_kernels.loss import kl_to_reference
from thinktwice_kernels.options import LossOptions, loss_weights

_AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "vespo": "token-mean",
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
GLOBAL_TOKEN_MEAN = ("dapo", "cispo", "vespo")  # divide by the tokens of all processes and micro-batches
# VESPO keeps the log-ratio of a token within +-20, and that of a sequence within [log 1e-8, 20].
_LOG_RATIO_LIMIT = 20.0
_LOG_RATIO_FLOOR = math.log(1e-8)
_SMALLEST_LAMBDA = 1e-4


@dataclass(frozen=True, kw_only=True)
class PaddedLoss:
    """A loss by TRL's and Liger's names.

    grpo, bnpo, dr_grpo, dapo and luspo have the clipped objective and differ in how they aggregate it: luspo sums a
    sequence's tokens, the others are as in `thinktwice_kernels.PRESETS`. For cispo, `epsilon_high` is the bound on r
    itself. vespo is ``-sg(phi) A logp``, phi = exp(lambda) w^k exp(-lambda w), with w the product of r over the
    sequence, and k and lambda by the sign of A. `use_bias_correction_kl` multiplies a token's KL by r. A setting
    that belongs to other loss types has no effect, except for `delta`.

    Raises:
        ValueError: an unknown loss type, or what `thinktwice_kernels.LossOptions` refuses.
    """

    loss_type: str
    importance_sampling_level: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    max_completion_length: int | None
    use_bias_correction_kl: bool

    def __post_init__(self) -> None:
        if self.loss_type not in _AGGREGATION:
            raise ValueError(f"unknown loss_type {self.loss_type!r}: choose one of {', '.join(_AGGREGATION)}")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "loss_type='dr_grpo' divides by the longest completion allowed: pass max_completion_length"
            )
        LossOptions(**self.arguments() | {"importance_sampling_level": self.importance_sampling_level})

    def has_constant_weight(self) -> bool:
        """Whether the objective is ``-weight A logp`` with a weight that is constant in the gradient."""
        return self.loss_type in ("cispo", "vespo")

    def corrects_kl(self) -> bool:
        return self.beta != 0 and self.use_bias_correction_kl

    def arguments(self) -> dict[str, Any]:
        """The options for `grpo_loss` and `linear_grpo_loss`; a constant weight is to be part of the advantages."""
        chosen: dict[str, Any] = {
            "importance_sampling_level": self.importance_sampling_level,
            "loss_agg_mode": _AGGREGATION[self.loss_type],
            "beta": self.beta,
            "delta": self.delta,
        }
        if self.loss_type in CLIPPED:
            chosen |= {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        elif self.loss_type == "sapo":
            chosen |= {
                "policy_loss": "sapo",
                "sapo_temperature_pos": self.sapo_temperature_pos,
                "sapo_temperature_neg": self.sapo_temperature_neg,
            }
        else:
            # Without old log-probabilities the ratio is 1, and CISPO's objective -A logp.
            chosen |= {"policy_loss": "cispo", "importance_sampling_level": "token"}
        if self.loss_type == "dr_grpo":
            chosen["max_response_length"] = self.max_completion_length
        return chosen

    def loss(
        self,
        logps: Tensor,  # [B, L]; the gradient goes here
        mask: Tensor,  # [B, L] bool
        advantages: Tensor,  # [B, 1] or [B, L]
        *,
        old_logps: Tensor | None,  # [B, L]
        ref_logps: Tensor | None,  # [B, L], needed with beta
        rollout_ratio: Tensor | None,  # [B, 1] or [B, L]: a constant factor of the policy term
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and `grpo_loss`'s metrics; those of ratios and clipping are void where the weight is constant."""
        options = self.arguments()
        policy = advantages
        if self.has_constant_weight():
            policy = policy * self.constant_weight(logps.detach(), mask, advantages, old_logps, rollout_ratio)
        if rollout_ratio is not None and self.loss_type != "vespo":
            policy = policy * rollout_ratio
        if self.corrects_kl():
            options["beta"] = 0.0
        loss, metrics = grpo_loss(
            logps.flatten(),
            policy.expand_as(logps).flatten(),
            sequence_starts(mask),
            old_logps=None if self.has_constant_weight() else flat(old_logps),
            ref_logps=None if self.corrects_kl() else flat(ref_logps),
            loss_mask=mask.flatten(),
            normalizer=normalizer,
            **options,
        )
        if self.corrects_kl():
            assert ref_logps is not None
            kl = self.kl(logps, mask, old_logps, ref_logps)
            weights = loss_weights(
                sequence_starts(mask), mask.flatten(), LossOptions(**options), normalizer, logps.flatten()
            )
            loss = loss + self.beta * (kl * weights[:, None]).sum()
            metrics["kl_ref"] = kl.detach().sum() / mask.sum().clamp(min=1)
        return loss, metrics

    def ratio(
        self,
        logps: Tensor,  # [B, L]
        mask: Tensor,  # [B, L] bool
        old_logps: Tensor | None,  # [B, L]; None: the current ones
    ) -> Tensor:  # [B, L], or [B, 1] at sequence level; 1 for masked tokens
        """Policy over old policy."""
        log_ratio = _log_ratio(logps, mask, old_logps)
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return log_ratio.exp()

    def kl(
        self,
        logps: Tensor,  # [B, L]
        mask: Tensor,  # [B, L] bool
        old_logps: Tensor | None,  # [B, L]
        ref_logps: Tensor,  # [B, L]
    ) -> Tensor:  # [B, L], 0 for masked tokens
        """The KL term, corrected if it is to be."""
        kl, _ = kl_to_reference(torch.where(mask, logps, 0), torch.where(mask, ref_logps, 0), "k3")
        return kl * self.ratio(logps, mask, old_logps) if self.use_bias_correction_kl else kl

    def constant_weight(
        self,
        logps: Tensor,  # [B, L]
        mask: Tensor,  # [B, L] bool
        advantages: Tensor,  # [B, 1] or [B, L]
        old_logps: Tensor | None,  # [B, L]
        rollout_ratio: Tensor | None,  # [B, 1] or [B, L]
    ) -> Tensor:  # [B, 1] or [B, L]
        """The weight of cispo and vespo."""
        if self.loss_type == "cispo":
            return self.ratio(logps, mask, old_logps).clamp(max=self.epsilon_high)
        log_ratio = _log_ratio(logps, mask, old_logps).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        log_w = log_ratio.sum(1, keepdim=True)
        if rollout_ratio is not None:
            log_rollout = rollout_ratio.log().clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_LIMIT)
            if log_rollout.shape[1] != 1:
                log_rollout = torch.where(mask, log_rollout, 0)
            log_w = log_w + log_rollout.sum(1, keepdim=True)
        log_w = log_w.clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_LIMIT)
        k = torch.where(advantages >= 0, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(advantages >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=_SMALLEST_LAMBDA)
        return (rate + k * log_w - rate * log_w.exp()).exp()


def _log_ratio(
    logps: Tensor,  # [B, L]
    mask: Tensor,  # [B, L] bool
    old_logps: Tensor | None,  # [B, L]
) -> Tensor:  # [B, L], 0 for masked tokens
    old = logps.detach() if old_logps is None else old_logps.detach()
    return torch.where(mask, logps - old, 0)


def sequence_starts(mask: Tensor) -> Tensor:
    """[B, L] -> [B+1] int32: where each padded sequence starts when the rows lie one after another."""
    return torch.arange(mask.shape[0] + 1, dtype=torch.int32, device=mask.device) * mask.shape[1]


@overload
def flat(values: Tensor) -> Tensor: ...
@overload
def flat(values: None) -> None: ...
def flat(values: Tensor | None) -> Tensor | None:
    """[B, L] -> [B L]."""
    return None if values is None else values.flatten()
