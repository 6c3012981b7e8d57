"""What is measured: the heads of real models on a GPU, smaller ones on a CPU, toy ones for the tests.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

Size = Literal["toy", "cpu", "gpu"]
SIZES: tuple[Size, ...] = ("toy", "cpu", "gpu")

DEFAULT, SMALL = "default model", "Qwen3-0.6B shape"  # models that rollouts have targets for
MEDIUM, LARGE = "100 M shape", "Qwen3-1.7B shape"  # and training steps

_TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """The shapes of one measurement. T tokens are S sequences of one length, so that padded peers pad nothing."""

    head: str
    vocabulary: int
    hidden: int
    tokens: int
    dtype: torch.dtype
    old_logps: bool = True  # given, and near enough to the current ones that no token is clipped
    skippable: bool = False  # about 30 % of the tokens are masked out or have advantage 0
    only_targets: bool = False  # leaves out the contenders that no target names, where a round takes long
    left_out: tuple[str, ...] = ()  # contenders that would take minutes a round
    memory: bool = True  # peak memory is measured too
    length: int = 0  # tokens of a sequence; 0: a thousand and more, but at least four sequences
    counts: bool = True  # towards the targets
    rounds: int = 0  # of the timing at most, where one takes minutes; 0: as the setting says
    seconds: float = 0.0  # for the rounds, where their noise asks for many; 0: as the setting says

    @property
    def name(self) -> str:
        sizes = (("V", self.vocabulary), ("H", self.hidden), ("T", self.tokens))
        parts = [self.head, *(f"{letter}={size}" for letter, size in sizes if size), _TYPE_NAMES[self.dtype]]
        if self.length:
            parts.append(f"in {self.length}s")
        return " ".join(parts + ["on-policy"] * (not self.old_logps) + ["30% skippable"] * self.skippable)

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and the tokens of each."""
        sequences = self.tokens // self.length if self.length else max(4, self.tokens // 1024)
        return sequences, self.tokens // sequences


def _case(head: str, tokens: int, **options: Any) -> Case:
    vocabulary, hidden, dtype = _HEADS[head]
    return Case(head, vocabulary, hidden, tokens, dtype, **options)


_HEADS = {
    "Qwen3-4B": (151_936, 2560, torch.bfloat16),
    "OLMo-3-7B": (100_278, 4096, torch.bfloat16),
    "Llama-3.2-3B": (128_256, 3072, torch.bfloat16),
    "Qwen3 vocabulary": (151_936, 256, torch.float32),
    "small vocabulary": (32_000, 512, torch.float32),
    "toy": (300, 16, torch.float32),
}
# The most important first: a time limit cuts off the end.
_LINEAR_LOSS: dict[Size, list[Case]] = {
    "toy": [
        _case("toy", 64, only_targets=True),
        _case("toy", 64, old_logps=False, only_targets=True, memory=False),
        _case("toy", 64, skippable=True, only_targets=True, memory=False),
    ],
    # Groups of short responses, as the shipped task has them: that is what a CPU trains. In long ones Liger, which
    # takes a sequence at a time, has better products, and all contenders come nearer to the products alone.
    "cpu": [
        _case("Qwen3 vocabulary", 512, length=64),
        _case("Qwen3 vocabulary", 3072, length=64, only_targets=True),
        _case("small vocabulary", 1024, length=64, only_targets=True, memory=False),
        _case("small vocabulary", 1024, length=64, old_logps=False, only_targets=True, memory=False),
        _case("small vocabulary", 1024, length=64, skippable=True, only_targets=True, memory=False),
        _case("small vocabulary", 1024, length=256, counts=False, only_targets=True, memory=False),
    ],
    "gpu": [
        *(_case("Qwen3-4B", tokens) for tokens in (4096, 1024, 8192, 16384, 32768)),
        _case("Qwen3-4B", 8192, old_logps=False),
        _case("Qwen3-4B", 8192, skippable=True),
        *(_case("OLMo-3-7B", tokens) for tokens in (1024, 8192, 32768)),
        *(_case("Llama-3.2-3B", tokens) for tokens in (1024, 8192, 32768)),
    ],
}
_LOGPROBS: dict[Size, list[Case]] = {
    "toy": [_case("toy", 64, only_targets=True, memory=False)],
    "cpu": [_case("small vocabulary", 1024, memory=False)],
    "gpu": [_case("Qwen3-4B", 8192), _case("OLMo-3-7B", 8192)],
}
_LOGITS: dict[Size, list[Case]] = {
    "toy": [_case("toy", 64, only_targets=True, memory=False)],
    "cpu": [_case("Qwen3 vocabulary", 512, memory=False)],
    "gpu": [_case("Qwen3-4B", tokens) for tokens in (8192, 1024)],
}
_TOKENS: dict[Size, list[int]] = {"toy": [64], "cpu": [2048, 32_768], "gpu": [4096, 65_536, 1_048_576]}


# A layer of a model: its hidden size. The other sizes stand in bench_layer_ops.py.
_LAYERS: dict[Size, list[tuple[str, int, int, torch.dtype]]] = {
    "toy": [("toy layer", 16, 64, torch.float32)],
    "cpu": [("Qwen3-0.6B layer", 1024, 512, torch.float32)],
    "gpu": [("Qwen3-4B layer", 2560, tokens, torch.bfloat16) for tokens in (8192, 1024)],
}


def layer_cases(size: Size) -> list[Case]:
    return [
        Case(layer, 0, hidden, tokens, dtype, only_targets=size == "toy", memory=size == "gpu")
        for layer, hidden, tokens, dtype in _LAYERS[size]
    ]


def linear_loss_cases(size: Size) -> list[Case]:
    return _LINEAR_LOSS[size]


def logprobs_cases(size: Size) -> list[Case]:
    return _LOGPROBS[size]


def logits_cases(size: Size) -> list[Case]:
    return _LOGITS[size]


def token_cases(size: Size) -> list[Case]:
    """Log-probabilities alone: no vocabulary, no hidden size."""
    return [
        Case("tokens", 0, 0, tokens, torch.float32, only_targets=size == "toy", memory=size == "gpu")
        for tokens in _TOKENS[size]
    ]
