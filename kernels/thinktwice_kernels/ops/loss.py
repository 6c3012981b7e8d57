"""The custom ops under `group_advantages`, `grpo_loss` and `linear_grpo_loss`: call those, not these.

An optional result that is not wanted is empty, [0]: schemas have no optional results. Temperatures come as a number,
or as a tensor [T] that then counts instead.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from thinktwice_kernels.backends import PARTIALS, LossInputs, backend_of
from thinktwice_kernels.first_order import first_order_only
from thinktwice_kernels.fused_loss import linear_loss_forward
from thinktwice_kernels.ops.common import NAMESPACE, fake_gradient, head_of
from thinktwice_kernels.options import LossOptions, ScaleRewards
from thinktwice_kernels.packed import accumulation_dtype
from thinktwice_kernels.products import hidden_gradient_dtype
from thinktwice_kernels.totals import totals_of


@torch.library.custom_op(f"{NAMESPACE}::group_advantages", mutates_args=())
def group_advantages(rewards: Tensor, group_ids: Tensor, scale_rewards: str, eps: float) -> Tensor:
    """[S], in the type of the rewards."""
    return backend_of(rewards).group_advantages(rewards, group_ids, cast(ScaleRewards, scale_rewards), eps)


@group_advantages.register_fake
def _(rewards: Tensor, group_ids: Tensor, scale_rewards: str, eps: float) -> Tensor:
    return torch.empty_like(rewards)


@torch.library.custom_op(f"{NAMESPACE}::grpo_loss", mutates_args=())
def grpo_loss(
    logps: Tensor,  # [T]
    advantages: Tensor | None,  # [S] or [T]
    rewards: Tensor | None,  # [S]
    group_ids: Tensor | None,  # [S]
    scale_rewards: str,
    advantage_eps: float,
    cu_seqlens: Tensor,  # [S+1]
    weights: Tensor,  # [S]
    old_logps: Tensor | None,  # [T]
    ref_logps: Tensor | None,  # [T]
    rollout_logps: Tensor | None,  # [T]
    entropy: Tensor | None,  # [T]
    loss_mask: Tensor | None,  # [T] bool
    guide_mask: Tensor | None,  # [T] bool
    options: Sequence[float],  # LossOptions.encode()
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the totals [len(PARTIALS)] float64, and the gradients of logps [T] and entropy [T]."""
    inputs = LossInputs(
        logps=logps,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        weights=weights,
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        entropy=entropy,
        loss_mask=loss_mask,
        guide_mask=guide_mask,
        rewards=rewards,
        group_ids=group_ids,
        scale_rewards=cast(ScaleRewards, scale_rewards),
        advantage_eps=advantage_eps,
    )
    backend = backend_of(logps)
    partials, d_logps, d_entropy = backend.sequence_loss(inputs, LossOptions.decode(options), want_gradient)
    totals = totals_of(partials)
    return totals[0].to(logps.dtype, copy=True), totals, d_logps, d_entropy


@grpo_loss.register_fake
def _(logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, want_gradient = rest[-2:]
    totals = logps.new_empty(len(PARTIALS), dtype=torch.float64)
    with_entropy = want_gradient and LossOptions.decode(options).entropy_coef != 0
    return (
        logps.new_empty(()),
        totals,
        logps.new_empty(logps.shape[0] if want_gradient else 0),
        logps.new_empty(logps.shape[0] if with_entropy else 0),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, totals, d_logps, d_entropy = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(totals, d_logps, d_entropy)
    ctx.save_for_backward(inputs[0], inputs[11], d_logps, d_entropy)


@first_order_only
def _loss_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 16
    *_, d_logps, d_entropy = ctx.saved_tensors
    of_logps = d_logps * gradient if ctx.needs_input_grad[0] else None
    of_entropy = d_entropy * gradient if ctx.needs_input_grad[11] and d_entropy.numel() else None
    return of_logps, *(None,) * 10, of_entropy, *(None,) * 4


grpo_loss.register_autograd(_loss_backward, setup_context=_loss_setup)


@torch.library.custom_op(f"{NAMESPACE}::linear_grpo_loss", mutates_args=())
def linear_grpo_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T] int64
    temperature: float,
    temperatures: Tensor | None,  # [T]
    softcap: float | None,
    advantages: Tensor,  # [S] or [T], here or on the CPU
    cu_seqlens: Tensor,  # [S+1], here or on the CPU
    weights: Tensor,  # [S]
    old_logps: Tensor | None,  # [T]
    ref_logps: Tensor | None,  # [T]
    rollout_logps: Tensor | None,  # [T]
    loss_mask: Tensor | None,  # [T] bool, here or on the CPU
    guide_mask: Tensor | None,  # [T] bool, here or on the CPU
    options: Sequence[float],  # LossOptions.encode()
    wanted: Sequence[bool],  # the gradients of hidden, weight, bias
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the totals [len(PARTIALS)] float64, and the gradients of hidden, weight (fp32) and bias (fp32)."""
    inputs = LossInputs(
        logps=hidden.new_empty(0),
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        weights=weights,
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        loss_mask=loss_mask,
        guide_mask=guide_mask,
    )
    head = head_of(bias, temperature, temperatures, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        totals, gradients = linear_loss_forward(
            hidden, weight, targets, head, inputs, LossOptions.decode(options), cast(Any, tuple(wanted)), memory_budget
        )
    return totals[0].to(accumulation_dtype(hidden, weight), copy=True), totals, *gradients


@linear_grpo_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden, weight)
    wanted = rest[-2]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(PARTIALS), dtype=torch.float64),
        fake_gradient(hidden, wanted[0], hidden_gradient_dtype(hidden, weight)),
        fake_gradient(weight, wanted[1], dtype),
        fake_gradient(weight.new_empty(0) if bias is None else bias, wanted[2], dtype),
    )


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else each backward pass fills zeros of the shape of every gradient below
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[2:])


@first_order_only
def _linear_loss_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 18
    inputs, saved = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    consume = type(gradient) is Tensor and not ctx.creates_graph and not _graph_is_kept()
    scaled = [
        _scaled(tensor, gradient, like.dtype, consume) if want else None
        for tensor, like, want in zip(saved, inputs, ctx.needs_input_grad, strict=False)
    ]
    return *scaled, *(None,) * 15


linear_grpo_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)


def _graph_is_kept() -> bool:
    """Whether the running backward pass was asked to retain its graph, so that it may run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype, consume: bool) -> Tensor:
    """The product in the given type; with `consume` in the memory of `gradient` where that can be."""
    if type(by) is Tensor and by.device.type == "cpu" and by == 1:  # a GPU would wait, a tracer's tensors have no value
        # What a graph that runs again hands out must be memory of its own.
        return gradient.to(dtype, copy=not consume)
    if type(by) is not Tensor:
        return (gradient * by).to(dtype)
    out = gradient if consume and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    backend_of(gradient).scale(gradient, by, out)
    return out
