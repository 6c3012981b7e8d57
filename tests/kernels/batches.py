"""Random packed batches for the loss tests."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = st.lists(st.integers(0, 5), max_size=5)


def make_batch(lengths: list[int], seed: int, **wanted: Any) -> dict[str, Any]:
    """Tensors of one batch in float64; `wanted` turns the optional ones on: ``old_logps=True``.

    Log-probabilities lie around log 0.02, log-ratios within about 1, so that every clip bound and both sides of the
    shaping's 0.01 are met.
    """
    rng = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(size: int, scale: float) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=rng) * scale

    logps = -4 + normal(total, 1.5).clamp(max=3.9)
    advantages = normal(total if wanted.get("token_advantages") else len(lengths), 1.0)
    if wanted.get("zero_advantages"):
        advantages[::2] = 0
    batch: dict[str, Any] = {
        "logps": logps.requires_grad_(),
        "advantages": advantages,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }
    for name in ("old_logps", "ref_logps", "rollout_logps"):
        if wanted.get(name):
            batch[name] = logps.detach() + normal(total, 0.6)
    if wanted.get("entropy"):
        batch["entropy"] = normal(total, 1.0).abs().requires_grad_()
    for name in ("loss_mask", "guide_mask"):
        if wanted.get(name):
            batch[name] = torch.rand(total, generator=rng) < 0.6
    return batch


def gradients(loss: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    leaves = [batch[name] for name in ("logps", "entropy") if name in batch]
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(
            torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True), leaves, strict=True
        )
    ]
