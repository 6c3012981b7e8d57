"""verl's two ways from hidden states to log-probabilities and entropies, with their call signatures and shapes.

Results are fp32 whatever the type of the inputs; verl's `FusedLinearForPPO` rounds them to it.

Letters: B sequences of L tokens, T tokens in all, V vocabulary, H hidden size.
"""

import torch.distributed as dist
from torch import Tensor, nn

from thinktwice_kernels import linear_logprobs


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """In place of ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``.

    Args:
        hidden, labels: [B, L, H] and [B, L], or [T, H] and [T].
        reduction: "none", "sum" or "mean", of the log-probabilities; the entropies stay as they are.
        dist_process_group: over which the vocabulary is split: None, or a group of one.

    Returns:
        Log-probabilities [T] (without dimensions if reduced) and entropies [T] in nats, both differentiable.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a vocabulary split over processes.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}: choose one of none, sum, mean")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise ValueError(
            "dist_process_group splits the vocabulary over several processes: gather the weight, and pass None"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, labels {list(labels.shape)}: pass [..., H] and [...] alike"
        )
    logps, entropy = linear_logprobs(
        hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature, return_entropy=True
    )
    if reduction != "none":
        logps = logps.sum() if reduction == "sum" else logps.mean()
    return logps, entropy


class FusedLinearForPPO(nn.Module):
    """In place of ``verl.utils.experimental.torch_functional.FusedLinearForPPO``."""

    def __init__(self, chunk_size: int = 512):
        """`chunk_size` only says how verl computes, and changes nothing here."""
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,  # [B, L, H] or [T, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [B, L] or [T]
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies in the shape of `input_ids`: the ids to score, already shifted.

        Raises:
            ValueError: shapes that do not fit.
        """
        logps, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return logps.view(input_ids.shape), entropy.view(input_ids.shape)
