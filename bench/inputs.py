"""Random inputs of one case, the same in every process that asks for them.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.shapes import Case

EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28
_OLD_NOISE = 0.02  # nats; the clip bounds lie ten times further out
_TARGET_LOGIT = 12.0  # gives the targets probabilities like those of sampled tokens


@dataclass(frozen=True)
class LossBatch:
    """The tensors of a loss beside its log-probabilities."""

    advantages: Tensor  # [S]
    cu_seqlens: Tensor  # [S+1] int32
    shape: tuple[int, int]  # S, tokens of each
    old_logps: Tensor | None  # [T]
    loss_mask: Tensor | None  # [T] bool

    def options(self) -> dict[str, Any]:
        """For the ops of thinktwice_kernels."""
        return {
            "old_logps": self.old_logps,
            "loss_mask": self.loss_mask,
            "epsilon_low": EPSILON_LOW,
            "epsilon_high": EPSILON_HIGH,
        }


@dataclass(frozen=True)
class LinearBatch:
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T] int64
    loss: LossBatch
    d_logps: Tensor  # [T]: what flows back into the ops that give log-probabilities


@dataclass(frozen=True)
class LogitsBatch:
    logits: Tensor  # [T, V]
    targets: Tensor  # [T] int64
    d_logps: Tensor  # [T]
    d_entropy: Tensor  # [T]


@dataclass(frozen=True)
class TokensBatch:
    logps: Tensor  # [T]
    loss: LossBatch


@dataclass(frozen=True)
class RewardsBatch:
    rewards: Tensor  # [S]
    group_ids: Tensor  # [S]
    group_size: int


def linear_batch(case: Case, device: torch.device) -> LinearBatch:
    normal, generator = _source(device)
    weight = (normal(case.vocabulary, case.hidden) / math.sqrt(case.hidden)).to(case.dtype)
    targets = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    hidden = (normal(case.tokens, case.hidden) + _TARGET_LOGIT * weight[targets].float()).to(case.dtype)
    old_logps = None
    if case.old_logps:
        old_logps = _logps(hidden, weight, targets) + _OLD_NOISE * normal(case.tokens)
    return LinearBatch(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        _loss_batch(case, old_logps, device),
        normal(case.tokens),
    )


def logits_batch(case: Case, device: torch.device) -> LogitsBatch:
    normal, generator = _source(device)
    logits = normal(case.tokens, case.vocabulary)
    targets = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    logits[torch.arange(case.tokens, device=device), targets] += _TARGET_LOGIT
    return LogitsBatch(logits.to(case.dtype).requires_grad_(), targets, normal(case.tokens), normal(case.tokens))


def tokens_batch(case: Case, device: torch.device) -> TokensBatch:
    normal, _ = _source(device)
    logps = -normal(case.tokens).abs()
    old_logps = logps + 0.2 * normal(case.tokens)  # some tokens are clipped
    return TokensBatch(logps.requires_grad_(), _loss_batch(case, old_logps, device))


def rewards_batch(case: Case, device: torch.device) -> RewardsBatch:
    """As many rewards as the case has tokens, in groups of eight."""
    normal, _ = _source(device)
    group_ids = torch.arange(case.tokens, device=device) // 8
    return RewardsBatch((normal(case.tokens) > 0).float(), group_ids, 8)


def _source(device: torch.device) -> tuple[Any, torch.Generator]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return normal, generator


def _loss_batch(case: Case, old_logps: Tensor | None, device: torch.device) -> LossBatch:
    sequences, length = case.shape
    index = torch.arange(sequences, device=device)
    # Not centred, so that the loss is no small difference of large terms and its error means something.
    advantages = torch.where(index % 2 == 0, 1.5, -0.5) * (1 + index / (10 * sequences))
    mask = None
    if case.skippable:
        advantages[3::4] = 0
        last = max(1, round(0.07 * length))
        mask = torch.arange(case.tokens, device=device) % length < length - last
    return LossBatch(
        advantages=advantages,
        cu_seqlens=torch.arange(0, case.tokens + 1, length, device=device, dtype=torch.int32),
        shape=case.shape,
        old_logps=old_logps,
        loss_mask=mask,
    )


def _logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """In fp32, some rows at a time."""
    parts = []
    for rows in row_slices(hidden, weight.shape[0]):
        logits = hidden[rows].float() @ weight.float().t()
        parts.append(logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(1))
    return torch.cat(parts)


def row_slices(like: Tensor, vocabulary: int) -> list[slice]:
    """Rows whose float64 logits take at most 128 MiB on a CPU, 4 GiB on a GPU."""
    step = max(1, (4 << 30 if like.is_cuda else 128 << 20) // (8 * vocabulary))
    return [slice(start, min(start + step, like.shape[0])) for start in range(0, like.shape[0], step)]
