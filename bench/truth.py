"""What the results ought to be: `thinktwice_kernels.reference` in float64, some rows of logits at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.inputs import LinearBatch, LogitsBatch, RewardsBatch, TokensBatch, row_slices
from thinktwice_kernels import reference

Outputs = Mapping[str, Tensor]


def linear_logprobs(batch: LinearBatch) -> Outputs:
    weight = batch.weight.detach().double()
    logps = _logps(batch, weight)
    return {"logps": logps, **_head_gradients(batch, weight, batch.d_logps.double())}


def linear_grpo_loss(batch: LinearBatch) -> Outputs:
    weight = batch.weight.detach().double()
    logps = _logps(batch, weight).requires_grad_()
    loss, _ = reference.grpo_loss(logps, batch.loss.advantages.double(), batch.loss.cu_seqlens, **batch.loss.options())
    (d_logps,) = torch.autograd.grad(loss, logps)
    return {"loss": loss.detach(), **_head_gradients(batch, weight, d_logps)}


def _logps(batch: LinearBatch, weight: Tensor) -> Tensor:
    hidden = batch.hidden.detach()
    parts = []
    for rows in row_slices(hidden, weight.shape[0]):
        logps = reference.linear_logprobs(hidden[rows].double(), weight, batch.targets[rows])
        assert isinstance(logps, Tensor)
        parts.append(logps)
    return torch.cat(parts)


def _head_gradients(batch: LinearBatch, weight: Tensor, d_logps: Tensor) -> dict[str, Tensor]:
    hidden = batch.hidden.detach()
    d_hidden, d_weight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(weight)
    for rows in row_slices(hidden, weight.shape[0]):
        piece = hidden[rows].double()
        logits = (piece @ weight.t()).requires_grad_()
        logps = reference.token_logprobs(logits, batch.targets[rows])
        (d_logits,) = torch.autograd.grad(logps, logits, d_logps[rows])
        d_hidden[rows] = d_logits @ weight
        d_weight.addmm_(d_logits.t(), piece)
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def token_logprobs(batch: LogitsBatch, gradient: bool) -> Outputs:
    logits = batch.logits.detach()
    parts: dict[str, list[Tensor]] = {}
    for rows in row_slices(logits, logits.shape[1]):
        leaf = logits[rows].double().requires_grad_()
        logps, entropy = reference.token_logprobs(leaf, batch.targets[rows], return_entropy=True)
        found = {"logps": logps.detach(), "entropy": entropy.detach()}
        if gradient:
            incoming = (batch.d_logps[rows].double(), batch.d_entropy[rows].double())
            # Kept in fp32: its rounding is far below the error of what is compared with it.
            found["d_logits"] = torch.autograd.grad((logps, entropy), leaf, incoming)[0].float()
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def grpo_loss(batch: TokensBatch) -> Outputs:
    logps = batch.logps.detach().double().requires_grad_()
    loss, _ = reference.grpo_loss(logps, batch.loss.advantages.double(), batch.loss.cu_seqlens, **batch.loss.options())
    return {"loss": loss.detach(), "d_logps": torch.autograd.grad(loss, logps)[0]}


def group_advantages(batch: RewardsBatch) -> Outputs:
    return {"advantages": reference.group_advantages(batch.rewards.double(), batch.group_ids, scale_rewards="group")}
