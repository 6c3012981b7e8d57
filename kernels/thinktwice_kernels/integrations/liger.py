"""Liger-Kernel's fused linear GRPO loss, with its call signature (0.8.5), computed by the ops of this package.

Letters: B sequences, padded to L tokens; V vocabulary, H hidden size. A is the advantage, r the importance ratio.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinktwice_kernels import linear_grpo_loss, linear_logprobs
from thinktwice_kernels.integrations.padded import GLOBAL_TOKEN_MEAN, PaddedLoss, flat, sequence_starts


class LigerFusedLinearGRPOLoss(nn.Module):
    """In place of ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``: same arguments, same results.

    Differences, all on purpose:

    - Logits, log-probabilities and the sums of gradients are fp32; each gradient is rounded to its tensor's type
      once. Liger rounds the weight's after every chunk.
    - Masked tokens never count, whatever their inputs hold. Liger's luspo averages over all B L positions, masked
      ones included; here a sequence's own tokens are summed and the sums averaged over B, which without padding is
      the same. Liger's vespo takes `vllm_is_ratio` of masked tokens into a sequence's weight; here they stay out.
    - A token whose `vllm_is_ratio` is 0 has no policy term and does not count as clipped.
    - `delta` has to be above 1 + epsilon_high, and None where the loss type has no clipping; Liger goes without a
      word. Reference tensors are refused with `use_ref_model=False`, which would not read them.
    - `compiled` and `chunk_size` only say how Liger computes, and change nothing here.

    cispo and vespo, and `use_bias_correction_kl`, need each log-probability before the loss; their logits are computed
    twice (8 V H per token in all, against 6).
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        """`PaddedLoss` says what each loss type computes.

        Args:
            beta: weight of the KL term (k3).
            use_ref_model: whether there is a reference; without one, KL and its gradient are 0.
            max_completion_length: for dr_grpo.
            temperature: the logits are divided by it.

        Raises:
            ValueError: options out of range, or that do not fit together.
        """
        super().__init__()
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.temperature = temperature
        self._loss = PaddedLoss(
            loss_type=loss_type,
            importance_sampling_level=importance_sampling_level,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            beta=beta if use_ref_model else 0.0,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
            max_completion_length=max_completion_length,
            use_bias_correction_kl=use_bias_correction_kl,
        )

    def forward(
        self,
        _input: Tensor,  # [B, L, H]
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L], bool or 0/1
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, L]
        old_per_token_logps: Tensor | None = None,  # [B, L]
        ref_input: Tensor | None = None,  # [B, L, H]
        ref_weight: Tensor | None = None,  # [V, H]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B], [B, 1] or [B, L]
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics.

        Args:
            old_per_token_logps: None: the current ones, detached.
            ref_input, ref_weight, ref_bias: the reference's last hidden states and head, read where beta is not 0 and
                there are no `ref_per_token_logps`.
            vllm_is_ratio: constant factor of each token's policy term.
            num_items_in_batch: tokens that dapo, cispo and vespo divide by, of all processes together; None: count.

        Returns:
            The loss, and the metrics: mean KL if beta is not 0, then the share of clipped tokens; over unmasked tokens.

        Raises:
            ValueError: shapes that do not fit, missing or superfluous tensors.
        """
        if self._loss.importance_sampling_level == "sequence" and self._loss.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={self._loss.loss_type!r}: set "
                "importance_sampling_level='token'"
            )
        _check_shapes(_input, selected_token_ids, attention_mask, advantages)
        for values, name in (
            (ref_per_token_logps, "ref_per_token_logps"),
            (old_per_token_logps, "old_per_token_logps"),
        ):
            _check_per_token(values, name, selected_token_ids)
        if not self.use_ref_model and not (ref_per_token_logps is None and ref_input is None):
            raise ValueError(
                "there is a reference but use_ref_model is False: set it to True, or leave the reference out"
            )
        mask = attention_mask != 0
        ids = torch.where(mask, selected_token_ids, 0)
        if self._loss.beta != 0 and ref_per_token_logps is None:
            ref_per_token_logps = self._reference_logps(ref_input, ref_weight, ref_bias, ids, mask)
        loss, kl, clipped = self._compute(
            _input,
            lin_weight,
            bias,
            ids,
            mask,
            advantages.detach()[:, None],
            old_per_token_logps,
            ref_per_token_logps if self._loss.beta != 0 else None,
            _rollout_ratio(vllm_is_ratio, mask),
            self._normalizer(mask, num_items_in_batch),
        )
        return loss, (clipped,) if self.beta == 0 else (kl, clipped)

    def _compute(
        self,
        hidden: Tensor,  # [B, L, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        ids: Tensor,  # [B, L]
        mask: Tensor,  # [B, L] bool
        advantages: Tensor,  # [B, 1]
        old_logps: Tensor | None,  # [B, L]
        ref_logps: Tensor | None,  # [B, L]
        rollout_ratio: Tensor | None,  # [B, 1] or [B, L]
        normalizer: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, mean KL, and share of clipped tokens."""
        if self._loss.has_constant_weight() or self._loss.corrects_kl():
            logps = self._logps(hidden, weight, bias, ids, mask)
            loss, metrics = self._loss.loss(
                logps,
                mask,
                advantages,
                old_logps=old_logps,
                ref_logps=ref_logps,
                rollout_ratio=rollout_ratio,
                normalizer=normalizer,
            )
        else:
            policy = advantages if rollout_ratio is None else advantages * rollout_ratio
            loss, metrics = linear_grpo_loss(
                hidden.flatten(0, 1),
                weight,
                ids.flatten(),
                policy.expand_as(ids).flatten(),
                sequence_starts(mask),
                bias=bias,
                temperature=self.temperature,
                old_logps=flat(old_logps),
                ref_logps=flat(ref_logps),
                loss_mask=mask.flatten(),
                normalizer=normalizer,
                **self._loss.arguments(),
            )
        kl = metrics.get("kl_ref", loss.new_zeros(()))
        tokens = metrics["tokens"].clamp(min=1)
        if self._loss.loss_type == "cispo":
            beyond = self._loss.ratio(logps.detach(), mask, old_logps) > self._loss.epsilon_high
            return loss, kl, (beyond & mask & (advantages > 0)).sum() / tokens
        if self._loss.loss_type == "vespo":
            return loss, kl, loss.new_zeros(())
        share = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
        return loss, kl, share * (metrics["tokens"] - metrics["tokens_skipped"]) / tokens

    def _logps(
        self,
        hidden: Tensor,  # [B, L, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        ids: Tensor,  # [B, L]
        mask: Tensor,  # [B, L] bool
    ) -> Tensor:  # [B, L], 0 where masked
        logps = linear_logprobs(hidden[mask], weight, ids[mask], bias=bias, temperature=self.temperature)
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)

    @torch.no_grad()
    def _reference_logps(
        self,
        ref_input: Tensor | None,  # [B, L, H]
        ref_weight: Tensor | None,  # [V, H]
        ref_bias: Tensor | None,  # [V]
        ids: Tensor,  # [B, L]
        mask: Tensor,  # [B, L] bool
    ) -> Tensor:  # [B, L]
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"beta is {self.beta} but there is no reference: pass ref_per_token_logps, or ref_input and "
                "ref_weight, or set use_ref_model=False"
            )
        if ref_input.shape[:2] != ids.shape:
            raise ValueError(f"ref_input has shape {list(ref_input.shape)}: pass [B, L, H], here {[*ids.shape, 'H']}")
        return self._logps(ref_input, ref_weight, ref_bias, ids, mask)

    def _normalizer(
        self,
        mask: Tensor,  # [B, L] bool
        num_items_in_batch: float | Tensor | None,
    ) -> Tensor | None:
        """This process's share of the tokens that all processes divide by; None: the mode's own count."""
        if self._loss.loss_type not in GLOBAL_TOKEN_MEAN:
            return None
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is not None:
            count = torch.as_tensor(num_items_in_batch, device=mask.device, dtype=torch.float32)
        elif processes == 1:
            return None
        else:
            count = mask.sum(dtype=torch.float32)
            dist.all_reduce(count)
        return (count / processes).clamp(min=1)


def _check_shapes(hidden: Tensor, ids: Tensor, mask: Tensor, advantages: Tensor) -> None:
    if hidden.dim() != 3 or ids.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"_input has shape {list(hidden.shape)}, selected_token_ids {list(ids.shape)}, attention_mask "
            f"{list(mask.shape)}: pass [B, L, H], [B, L] and [B, L]"
        )
    # On a GPU this look would wait for the device.
    if mask.device.type == "cpu" and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask holds other values than 0 and 1: pass the weights as part of the advantages")
    if advantages.shape != hidden.shape[:1]:
        raise ValueError(f"advantages has shape {list(advantages.shape)}: pass one per sequence, [{hidden.shape[0]}]")


def _check_per_token(values: Tensor | None, name: str, ids: Tensor) -> None:
    if values is not None and values.shape != ids.shape:
        raise ValueError(f"{name} has shape {list(values.shape)}: pass one value per token, {list(ids.shape)}")


def _rollout_ratio(
    ratio: Tensor | None,  # [B], [B, 1] or [B, L]
    mask: Tensor,  # [B, L]
) -> Tensor | None:  # [B, 1] or [B, L]
    if ratio is None:
        return None
    if ratio.dim() == 1:
        ratio = ratio[:, None]
    sequences, length = mask.shape
    if ratio.shape not in ((sequences, 1), (sequences, length)):
        raise ValueError(
            f"vllm_is_ratio has shape {list(ratio.shape)}: pass [{sequences}], [{sequences}, 1] or "
            f"[{sequences}, {length}]"
        )
    return ratio.detach()
