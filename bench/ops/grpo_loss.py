"""`grpo_loss`, forward and backward, from log-probabilities. It gives metrics too, which plain torch leaves out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.core.contender import OURS, PLAIN, Contender, Outputs, compiled
from bench.core.op import Op
from bench.ops.inputs import EPSILON_HIGH, EPSILON_LOW, LossBatch, RowsCase, loss_batch, normals, number_cases
from thinktwice_kernels import grpo_loss, reference


@dataclass(frozen=True)
class TokensBatch:
    logps: Tensor  # [T]
    loss: LossBatch


def tokens_batch(case: RowsCase, device: torch.device) -> TokensBatch:
    normal, _ = normals(device)
    logps = -normal(case.shape.tokens).abs()
    old_logps = logps + 0.2 * normal(case.shape.tokens)  # some tokens are clipped
    return TokensBatch(logps.requires_grad_(), loss_batch(case, old_logps, device))


def plain_loss(
    logps: Tensor,  # [T]
    loss: LossBatch,
) -> Tensor:
    """The clipped objective, averaged over the loss tokens, as few lines of torch."""
    advantages = loss.advantages.repeat_interleave(loss.shape[1], output_size=logps.numel())
    ratio = torch.exp(logps - (logps.detach() if loss.old_logps is None else loss.old_logps))
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH) * advantages)
    if loss.loss_mask is None:
        return per_token.mean()
    return (per_token * loss.loss_mask).sum() / loss.loss_mask.sum()


def with_metrics(op: Callable[..., Any]) -> Callable[[Tensor, LossBatch], Tensor]:
    """The loss alone of an op that gives metrics beside it."""
    return lambda logps, loss: op(logps, loss.advantages.to(logps.dtype), loss.cu_seqlens, **loss.options())[0]


def outputs(op: Callable[[Tensor, LossBatch], Tensor]) -> Callable[[TokensBatch], Outputs]:
    def run(batch: TokensBatch) -> Outputs:
        loss = op(batch.logps, batch.loss)
        return {"loss": loss.detach(), "d_logps": torch.autograd.grad(loss, batch.logps)[0]}

    return run


def truth(batch: TokensBatch) -> Outputs:
    wide = TokensBatch(batch.logps.detach().double().requires_grad_(), batch.loss)
    return outputs(with_metrics(reference.grpo_loss))(wide)


OPS = [
    Op(
        name="grpo_loss",
        cases=number_cases(),
        inputs=tokens_batch,
        truth=truth,
        contenders={
            OURS: Contender(outputs(with_metrics(grpo_loss))),
            PLAIN: Contender(outputs(plain_loss)),
            "torch.compile": Contender(outputs(lambda *tensors: compiled(plain_loss)(*tensors)), compiled=True),
            "torch with metrics": Contender(outputs(with_metrics(reference.grpo_loss))),
        },
        short=True,
    )
]
