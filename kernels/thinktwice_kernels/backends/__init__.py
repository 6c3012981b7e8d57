"""Where the arithmetic on rows of logits and on tokens runs; the matrix products are torch's everywhere.

A backend is a module with the functions of `Backend`: ``cpu`` (C++, built from csrc/loss/) and ``triton_backend``
(Triton on CUDA, and in Triton's interpreter where TRITON_INTERPRET=1 is set). Both compute what
`thinktwice_kernels.reference` defines, in fp32, or in float64 where the input is float64.

Letters: T tokens, S sequences, V vocabulary, t rows of a tile of logits, m of them that have a gradient.
"""

import importlib
import os
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from thinktwice_kernels.options import LossOptions, ScaleRewards

# The columns of what `sequence_loss` adds up per sequence; METRICS says what each counts. The last is a maximum.
PARTIALS = (
    "loss",
    "tokens",
    "computed",
    "guided",
    "with_gradient",
    "clip_low",
    "clip_high",
    "ratio",
    "approx_kl",
    "kl_ref",
    "mismatch",
    "entropy",
    "ratio_max",
)


@dataclass(frozen=True)
class Head:
    """How a row of logits becomes a distribution: softmax of ``softcap(logits + bias) / temperature``."""

    bias: Tensor | None = None  # [V], any floating type
    temperature: float | Tensor = 1.0  # a number, or [t]
    softcap: float | None = None


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


@dataclass(frozen=True)
class Selection:
    """The tokens that a loss computes, one after another, with what it needs of each."""

    rows: Tensor  # [N] int64, rising, of the T; not to be read where `everything`
    everything: bool  # N = T
    in_loss: Tensor  # [] int64: how many of the T are loss tokens
    inputs: LossInputs  # of the N tokens: advantages and weights one per token, no loss_mask
    borders: list[int] | None  # the values of `inputs.cu_seqlens` where the options need them


class Backend(Protocol):
    """NaN or +inf in a row of logits gives NaN in that row's results; -inf is a token that cannot be drawn."""

    def row_statistics(
        self,
        logits: Tensor,  # [t, V], any floating type, last dimension contiguous
        targets: Tensor,  # [t] int64; one out of range gives NaN
        head: Head,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability of the target, log-sum-exp, and entropy in nats of each row, in the accumulation type."""

    def row_gradient(
        self,
        logits: Tensor,  # [t, V], as above
        targets: Tensor,  # [t] int64
        head: Head,
        lse: Tensor,  # [t], from row_statistics
        entropy: Tensor | None,  # [t], likewise; needed with d_entropy
        d_logps: Tensor | None,  # [t]
        d_entropy: Tensor | None,  # [t]
        rows: Tensor | None,  # [m] int64, rising: the rows to compute; None: all
        out: Tensor,  # [m, V], any floating type: row i gets the gradient of row rows[i]; or `logits` itself:
        # then row rows[i] is overwritten in its place
    ) -> None:
        """The gradient with respect to the logits as given; 0 in all of a row whose incoming gradients are 0."""

    def select_tokens(self, inputs: LossInputs, tokens: int, options: LossOptions) -> Selection:
        """The tokens in the loss, without those that have no signal.

        `inputs` are of T = `tokens` tokens, with weights [S]; logps and entropy are not looked at. Where
        `LossOptions.skips_zero_advantages` holds, a token has no signal if its advantage is 0; where the loss needs
        whole sequences, if that of each loss token of its sequence is. A GPU is waited for at most once: for N, unless
        that must be T, and for the borders where they are needed.
        """

    def sequence_loss(
        self, inputs: LossInputs, options: LossOptions, want_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, metrics and gradient by `reference.grpo_loss`'s definition.

        Returns float64 sums over each sequence's tokens [S, len(PARTIALS)]; the gradients of their total loss with
        respect to `logps` and `entropy` [T], in the type of `logps`, 0 where nothing flows. Without `want_gradient`
        both are empty, [0]; the second also while `entropy_coef` is 0.
        """

    def scale(
        self,
        values: Tensor,  # of any shape, contiguous
        by: Tensor,  # a number, without dimensions
        out: Tensor,  # of the same shape, contiguous, any floating type; or `values` itself
    ) -> None:
        """The product in the accumulation type of the two, rounded to the type of `out`."""

    def group_advantages(
        self,
        rewards: Tensor,  # [S] fp32 or float64
        group_ids: Tensor,  # [S] int64
        scale_rewards: ScaleRewards,
        eps: float,
    ) -> Tensor:
        """[S], in the type of `rewards`."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton computes with tensors beside this one: on CUDA, or in its interpreter."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def backend_of(tensor: Tensor) -> Backend:
    """The backend for tensors beside this one.

    Raises:
        RuntimeError: the device has none, or the extension is not built.
    """
    if uses_triton(tensor):
        name = "triton_backend"
    elif tensor.device.type == "cpu":
        name = "cpu"
    else:
        raise RuntimeError(
            f"thinktwice_kernels has no kernels for {tensor.device.type}: move the tensors to the CPU or CUDA, or use "
            "thinktwice_kernels.reference"
        )
    return cast(Backend, importlib.import_module(f"thinktwice_kernels.backends.{name}"))
