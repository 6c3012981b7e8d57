"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from thinktwice_fast.config import UpdateOptions


def build_optimizer(
    module: torch.nn.Module, options: UpdateOptions, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Fused AdamW over the module's trainable parameters, and the schedule of its learning rate.

    Args:
        total_steps: optimizer steps until a decaying schedule reaches 0, where the options leave that open.
    """
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        betas=options.adam_betas,
        weight_decay=options.weight_decay,
        fused=True,
    )
    return optimizer, LambdaLR(optimizer, _shape(options, options.lr_decay_steps or total_steps))


def continue_schedule(optimizer: torch.optim.Optimizer, schedule: LRScheduler, steps: int) -> None:
    """Stand where ``steps`` optimizer steps lead, under the learning rate and shape asked for now."""
    assert isinstance(schedule, LambdaLR), "as build_optimizer gives it"
    schedule.last_epoch = steps
    for group, peak, share in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * share(steps)


def _shape(options: UpdateOptions, decay_steps: int) -> Callable[[int], float]:
    """Share of the peak at each optimizer step, from 0.

    The usual warm-up starts at 0 and so wastes the first step; in a pair it would leave the weights where they
    were between solve and refine. This one starts one part above.
    """
    warmup = options.warmup_steps

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(decay_steps - warmup, 1), 1.0)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
            options.lr_schedule
        ]

    return share
