"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from thinktwice_fast.config import UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.lora import whole

MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2}
"""Of both moments of a parameter, by `update.optimizer`."""
_SMALL = 1 << 16  # elements of a weight, on average


def build_optimizer(
    module: torch.nn.Module, options: UpdateOptions, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over the module's trainable parameters, and the schedule of its learning rate.

    "adamw" is torch's fused one, "adamw8bit" that of bitsandbytes: both moments in 8 bits, block by block (Dettmers et
    al. 2022, arXiv 2110.02861), but in float32 for parameters below 4096 elements.

    Args:
        total_steps: optimizer steps until a decaying schedule reaches 0, where the options leave that open.

    Raises:
        UserError: 8 bits without bitsandbytes, or for sharded parameters.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    check_optimizer(options, sharded=any(isinstance(parameter, DTensor) for parameter in trained))
    make: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)
    if options.optimizer == "adamw8bit":
        make = import_module("bitsandbytes.optim").AdamW8bit
    optimizer = make(trained, lr=options.learning_rate, betas=options.adam_betas, weight_decay=options.weight_decay)
    clear_state(optimizer, at_once=trained[0].device.type == "cuda")
    return optimizer, LambdaLR(optimizer, _shape(options, options.lr_decay_steps or total_steps))


def clear_state(optimizer: torch.optim.Optimizer, *, at_once: bool) -> None:
    """Stand before the first step.

    Args:
        at_once: torch's AdamW gets its moments now. Made in its first step they would lie wherever gradients and
            activations leave room, and so keep a GPU from giving that memory to the KV cache afterwards.
    """
    optimizer.state.clear()
    if not at_once or not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
            }


def clip_gradients(module: torch.nn.Module, bound: float) -> float:
    """Scale all gradients together so that their norm is at most ``bound``; 0 = leave them. Collective if sharded.

    Returns:
        The norm as it was. A GPU is waited for.
    """
    parameters = list(module.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(whole(norm))
    if 0 < bound < value:  # else torch would read and write every gradient to multiply it by 1
        clip_grads_with_norm_(parameters, bound, norm)
    return value


@contextmanager
def few_threads(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """One thread for what goes over an optimizer's weights one by one, where they are small ones on the CPU.

    To wake another for each takes longer than what it would do.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    small = sum(weight.numel() for weight in weights) < _SMALL * len(weights)
    threads = torch.get_num_threads()
    if not small or weights[0].device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def continue_schedule(optimizer: torch.optim.Optimizer, schedule: LRScheduler, steps: int) -> None:
    """Stand where ``steps`` optimizer steps lead, under the learning rate and shape asked for now."""
    assert isinstance(schedule, LambdaLR), "as build_optimizer gives it"
    schedule.last_epoch = steps
    for group, peak, share in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * share(steps)


def check_optimizer(options: UpdateOptions, *, sharded: bool) -> None:
    """Raise UserError where the optimizer's library is missing, or does not take ``sharded`` weights."""
    if options.optimizer != "adamw8bit":
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "--update.optimizer adamw8bit needs bitsandbytes: install it (pip install bitsandbytes), or leave it out"
        )
    if sharded:
        raise UserError(
            "--update.optimizer adamw8bit can't take sharded weights: start one process (LoRA: in float32), or "
            "leave it out"
        )


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
