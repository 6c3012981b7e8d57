"""Random inputs of one case, the same in every process that asks for them.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.core.op import Case, Precision, Size

EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28
OLD_NOISE = 0.02  # nats; the clip bounds lie ten times further out
TARGET_LOGIT = 12.0  # gives the targets probabilities like those of sampled tokens


@dataclass(frozen=True)
class Rows:
    """T rows of a head, of a layer or of numbers. They are S sequences of one length: padded peers pad nothing."""

    head: str
    vocabulary: int
    hidden: int
    tokens: int
    length: int = 0  # tokens of a sequence; 0: a thousand and more, but at least four sequences
    old_logps: bool = True  # given, and near enough to the current ones that no token is clipped
    skippable: bool = False  # about 30 % of the tokens are masked out or have advantage 0

    def named(self, precision: str) -> str:
        sizes = (("V", self.vocabulary), ("H", self.hidden), ("T", self.tokens))
        parts = [self.head, *(f"{letter}={size}" for letter, size in sizes if size), precision]
        if self.length:
            parts.append(f"in {self.length}s")
        return " ".join(parts + ["on-policy"] * (not self.old_logps) + ["30% skippable"] * self.skippable)

    @property
    def sequences(self) -> tuple[int, int]:
        """How many, and the tokens of each."""
        sequences = self.tokens // self.length if self.length else max(4, self.tokens // 1024)
        return sequences, self.tokens // sequences


RowsCase = Case[Rows]
_HEADS: dict[str, tuple[int, int, Precision]] = {
    "Qwen3-4B": (151_936, 2560, "bf16"),
    "OLMo-3-7B": (100_278, 4096, "bf16"),
    "Llama-3.2-3B": (128_256, 3072, "bf16"),
    "Qwen3 vocabulary": (151_936, 256, "fp32"),
    "small vocabulary": (32_000, 512, "fp32"),
    "toy": (300, 16, "fp32"),
}


def head_case(
    head: str, tokens: int, *, length: int = 0, old_logps: bool = True, skippable: bool = False, **options: Any
) -> RowsCase:
    vocabulary, hidden, precision = _HEADS[head]
    rows = Rows(head, vocabulary, hidden, tokens, length, old_logps, skippable)
    return Case(rows, precision, **{"counts": not skippable, **options})


def number_cases() -> dict[Size, list[RowsCase]]:
    """Numbers of tokens alone: no vocabulary, no hidden size."""
    sizes: dict[Size, tuple[int, ...]] = {"toy": (64,), "cpu": (2048, 32_768), "gpu": (4096, 65_536, 1_048_576)}
    return {
        size: [Case(Rows("tokens", 0, 0, n), only_targets=size == "toy", memory=size == "gpu") for n in counts]
        for size, counts in sizes.items()
    }


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


def loss_batch(case: RowsCase, old_logps: Tensor | None, device: torch.device) -> LossBatch:
    tokens, (sequences, length) = case.shape.tokens, case.shape.sequences
    index = torch.arange(sequences, device=device)
    # Not centred, so that the loss is no small difference of large terms and its error means something.
    advantages = torch.where(index % 2 == 0, 1.5, -0.5) * (1 + index / (10 * sequences))
    mask = None
    if case.shape.skippable:
        advantages[3::4] = 0
        last = max(1, round(0.07 * length))
        mask = torch.arange(tokens, device=device) % length < length - last
    ends = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
    return LossBatch(advantages, ends, case.shape.sequences, old_logps, mask)


@dataclass(frozen=True)
class LinearBatch:
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T] int64
    loss: LossBatch
    d_logps: Tensor  # [T]: what flows back into the ops that give log-probabilities


def linear_batch(case: RowsCase, device: torch.device) -> LinearBatch:
    normal, generator = normals(device)
    rows = case.shape
    weight = (normal(rows.vocabulary, rows.hidden) / math.sqrt(rows.hidden)).to(case.dtype)
    targets = torch.randint(rows.vocabulary, (rows.tokens,), generator=generator, device=device)
    hidden = (normal(rows.tokens, rows.hidden) + TARGET_LOGIT * weight[targets].float()).to(case.dtype)
    old_logps = None
    if rows.old_logps:
        old_logps = _logps(hidden, weight, targets) + OLD_NOISE * normal(rows.tokens)
    loss = loss_batch(case, old_logps, device)
    return LinearBatch(hidden.requires_grad_(), weight.requires_grad_(), targets, loss, normal(rows.tokens))


def normals(device: torch.device) -> tuple[Callable[..., Tensor], torch.Generator]:
    """Draws normal numbers of a shape, and what it draws them from."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device), generator


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
