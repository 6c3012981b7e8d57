"""The policy-gradient loss straight from the last hidden state.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

from typing import Unpack

import torch
from torch import Tensor

from thinktwice_kernels.advantages import ADVANTAGE_EPS, group_advantages
from thinktwice_kernels.logprobs import check_head, check_targets, temperature_arguments
from thinktwice_kernels.loss import absent_metrics, check_advantages, check_normalizer, prepared_tensors
from thinktwice_kernels.ops import loss as ops
from thinktwice_kernels.options import LossKeywords, LossOptions, ScaleRewards
from thinktwice_kernels.packed import accumulation_dtype, check_cu_seqlens
from thinktwice_kernels.totals import loss_weights, metrics_of


def linear_grpo_loss(
    hidden: Tensor,  # [T, H], any floating type
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [T], integers in [0, V)
    advantages: Tensor | None,  # [S] or [T]
    cu_seqlens: Tensor,  # [S+1] int32
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or [T]
    logit_softcap: float | None = None,
    rewards: Tensor | None = None,  # [S]
    group_ids: Tensor | None = None,  # [S]
    scale_rewards: ScaleRewards = "none",
    advantage_eps: float = ADVANTAGE_EPS,
    old_logps: Tensor | None = None,  # [T]
    ref_logps: Tensor | None = None,  # [T]
    rollout_logps: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T], bool or 0/1
    guide_mask: Tensor | None = None,  # [T], bool or 0/1
    normalizer: float | Tensor | None = None,
    memory_budget: int | None = None,
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of `linear_logprobs`, with every gradient computed on the way: backward costs no second forward.

    ``linear_grpo_loss(hidden, weight, targets, advantages, cu_seqlens, epsilon_high=0.28)`` is
    ``grpo_loss(logps, advantages, cu_seqlens, entropy=entropy, epsilon_high=0.28)`` with
    ``logps, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True)``; all options of `grpo_loss` are
    options here, with the same meaning and defaults.

    Logits exist for one tile of tokens at a time and are fp32 accumulators, never rounded to the type of the inputs.
    A token that `grpo_loss` skips costs no matrix product at all, whatever its hidden state holds; a token whose
    objective is clipped leaves before the two products of the gradients. The gradient of the weight adds up in fp32
    over the tiles and is rounded to the weight's type once. Inputs that need no gradient (a frozen weight) cost none;
    under ``torch.no_grad()`` only the loss is computed. Beyond inputs and gradients the memory is that of the tile.

    Where a token's loss depends on its whole sequence (`importance_sampling_level` "sequence", `rollout_is`
    "sequence-*"), tiles hold whole sequences, and a sequence that is longer than a tile has its logits computed twice.

    A GPU is waited for once, to learn which tokens are skipped and where sequences end; not where none can be skipped
    (no `loss_mask`, and `beta` or `entropy_coef` is not 0) and borders don't matter. Where tokens may be clipped
    (`old_logps` with the clip objective, `guide_mask`, `rollout_is` "*-mask") it is waited for once a tile.
    `advantages`, `cu_seqlens` and the masks may lie on the CPU.

    Args:
        hidden: the last hidden state; need not be contiguous.
        weight: the output embedding; a plain tensor: under FSDP2 call this inside the module's forward.
        targets: for tokens that carry no loss any valid id.
        advantages, cu_seqlens, old_logps, ref_logps, rollout_logps, loss_mask, guide_mask, normalizer: see `grpo_loss`.
        bias, temperature, logit_softcap: see `linear_logprobs`.
        rewards, group_ids, scale_rewards, advantage_eps: in place of advantages, see `group_advantages`.
        memory_budget: bytes of logits, with their gradient, that may exist at a time, if one token's fit into them;
            None: 4 GiB on a GPU, 256 MiB on a CPU. Also the number of rows of each matrix product follows from it.

    Returns:
        The loss, without dimensions, fp32 (float64 if `hidden` or `weight` is float64), and the metrics that
        `thinktwice_kernels.METRICS` defines, `entropy` among them.

    Raises:
        ValueError: as `grpo_loss` and `linear_logprobs` do, and for a budget that is not positive.
    """
    parsed = LossOptions(**options)
    tokens, dtype = hidden.shape[0], accumulation_dtype(hidden, weight)
    check_head(hidden, weight, bias, logit_softcap)
    check_targets(targets, tokens, weight.shape[0])
    check_cu_seqlens(cu_seqlens, tokens)
    optional = {
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "loss_mask": loss_mask,
        "guide_mask": guide_mask,
    }
    given = prepared_tensors(optional, targets.shape, parsed, dtype, computed={"entropy"})
    check_advantages(advantages, rewards, group_ids, cu_seqlens, tokens, scale_rewards, advantage_eps)
    check_normalizer(normalizer)
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"memory_budget is {memory_budget}: pass a positive number of bytes, or None")
    if rewards is not None and group_ids is not None:
        advantages = group_advantages(rewards, group_ids, scale_rewards=scale_rewards, eps=advantage_eps)
    assert advantages is not None
    differentiable = (hidden, weight, bias)
    loss, totals, *_ = ops.linear_grpo_loss(
        hidden,
        weight,
        bias,
        targets.long(),
        *temperature_arguments(temperature, tokens),
        logit_softcap,
        advantages.detach().to(dtype).contiguous(),
        cu_seqlens.contiguous(),
        loss_weights(cu_seqlens, given["loss_mask"], parsed, normalizer, hidden.new_empty(tokens, dtype=dtype)),
        *given.values(),
        parsed.encode(),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable],
        None if memory_budget is None else int(memory_budget),
    )
    return loss, metrics_of(totals, loss.dtype, absent_metrics({**given, "entropy": hidden}))
