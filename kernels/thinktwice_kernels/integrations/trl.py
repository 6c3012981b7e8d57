"""`patch` makes TRL's GRPOTrainer compute with the ops of this package.

Letters: B completions, padded to L tokens; N scored tokens, V vocabulary, H hidden size. A is the advantage.
"""

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor

from thinktwice_kernels import linear_logprobs
from thinktwice_kernels.integrations.padded import CLIPPED, GLOBAL_TOKEN_MEAN, PaddedLoss

SUPPORTED = ("1.16",)
_DEVICES = ("cpu", "cuda")
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# Set while a GRPOTrainer scores tokens; TRL's other trainers share the code below it and keep their own.
_scoring: ContextVar[bool] = ContextVar("scoring", default=False)
_logger = logging.getLogger(__name__)


class Patch:
    """What `patch` put in place; leaving it as a context, or `undo`, takes it away again."""

    _originals: ClassVar[list[tuple[Any, str, Any]]] = []  # owner, name, value; of all patches together
    _count: ClassVar[int] = 0

    def __init__(self) -> None:
        self._active = True
        if Patch._count == 0:
            _install(Patch._originals)
        Patch._count += 1

    def undo(self) -> None:
        """Take the patch away; while another patch holds, its ops stay. A second call does nothing."""
        if not self._active:
            return
        self._active = False
        Patch._count -= 1
        while Patch._count == 0 and Patch._originals:
            owner, name, value = Patch._originals.pop()
            setattr(owner, name, value)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch() -> Patch:
    """Make every `trl.GRPOTrainer`, also one that exists already, score tokens and compute its loss with these ops.

    Log-probabilities and entropies come from `linear_logprobs`, the loss from `grpo_loss`; losses, gradients and
    logged metrics stay TRL's. For option sets that the ops don't cover, TRL's own code runs on the new
    log-probabilities, and a line in the log says so once: an entropy bonus, the auxiliary loss of mixtures of experts,
    a delta that is not above 1 + epsilon_high or that the loss type does not read. TRL's own scoring runs on devices
    other than CPU and CUDA, under DeepSpeed ZeRO-3, and with a logit scale that is not positive.

    Under autocast the output layer's inputs are rounded to autocast's type, as TRL does it, and so is the gradient
    of its weight, once.

    Returns:
        A handle with `undo`, which is also a context manager. Patching twice is harmless.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a TRL version that is not in `SUPPORTED`.
    """
    return Patch()


def _install(originals: list[tuple[Any, str, Any]]) -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"TRL is not installed: install trl {' or '.join(SUPPORTED)}") from error
    if not any(version == known or version.startswith(f"{known}.") for known in SUPPORTED):
        raise RuntimeError(f"TRL {version} is not supported: install trl {' or '.join(SUPPORTED)}")
    from trl.trainer import utils
    from trl.trainer.grpo_trainer import GRPOTrainer

    def replace(owner: Any, name: str, value: Any) -> None:
        originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    replace(utils, "_ChunkedLogProbFunction", _LogProbs(utils._ChunkedLogProbFunction))
    replace(utils, "_use_triton", _scores_valid_tokens_only(utils._use_triton))
    name = "_get_per_token_logps_and_entropies"
    replace(GRPOTrainer, name, _while_scoring(getattr(GRPOTrainer, name)))
    replace(GRPOTrainer, "_compute_loss", _with_ops(GRPOTrainer._compute_loss))


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)


def _while_scoring(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scored(*args: Any, **kwargs: Any) -> Any:
        token = _scoring.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            _scoring.reset(token)

    return scored


def _scores_valid_tokens_only(original: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """TRL asks this to know whether a varying number of tokens may be scored; of these ops any number may."""

    @functools.wraps(original)
    def use_triton(device: torch.device) -> bool:
        return original(device) or (_scoring.get() and device.type in _DEVICES)

    return use_triton


class _LogProbs:
    """In place of TRL's autograd function for the output layer."""

    def __init__(self, original: Any):
        self._original = original

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:  # [N] log-probabilities, [N] entropies, and three that GRPO does not ask for
        reason = _keeps_scoring(hidden, weight, logit_scale)
        if not _scoring.get() or reason or not {"log_probs", "entropy"}.issuperset(outputs):
            if _scoring.get() and reason:
                _log_once(f"log-probabilities by TRL's own code: {reason}")
            return self._original.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        # cap(s x) / t = cap'(x) / t', with the cap and the temperature divided by the scale s.
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        score = functools.partial(
            linear_logprobs, bias=bias, temperature=temperature / logit_scale, logit_softcap=softcap
        )
        if "entropy" not in outputs:
            return score(hidden, weight, targets), None, None, None, None
        return *score(hidden, weight, targets, return_entropy=True), None, None, None


def _keeps_scoring(hidden: Tensor, weight: Tensor, logit_scale: float) -> str | None:
    """Why TRL's own code has to score; None: it has not."""
    if hidden.device.type not in _DEVICES:
        return f"the ops have no kernels for {hidden.device.type}"
    if hasattr(weight, "ds_id"):
        return "ZeRO-3 would take the weight away before the backward pass"
    return None if logit_scale > 0 else f"the logits are scaled by {logit_scale}"


def _with_ops(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        try:
            settings = _settings(self)
        except ValueError as error:
            _log_once(f"GRPO loss by TRL's own code: {error}")
            return original(self, model, inputs)
        return _loss(self, model, inputs, settings)

    return compute_loss


def _settings(trainer: Any) -> PaddedLoss:
    """Raises ValueError for options that the ops don't cover."""
    if trainer._entropy_bonus_enabled:
        raise ValueError("an entropy bonus is set")
    if trainer.aux_loss_enabled:
        raise ValueError("the experts' auxiliary loss is set")
    args = trainer.args
    return PaddedLoss(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        beta=trainer.beta,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        max_completion_length=trainer.max_completion_length,
        use_bias_correction_kl=args.use_bias_correction_kl,
    )


def _loss(trainer: Any, model: Any, inputs: dict[str, Any], settings: PaddedLoss) -> Tensor:
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    logps, entropy = _score(trainer, model, inputs)
    advantages = inputs["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    old_logps = inputs.get("old_per_token_logps")
    ref_logps = inputs["ref_per_token_logps"] if settings.beta != 0 else None
    rollout_ratio = inputs.get("importance_sampling_ratio")
    if settings.loss_type != "vespo" and not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
        rollout_ratio = None
    training = trainer.model.training
    micro_batches = trainer.current_gradient_accumulation_steps if training else 1
    is_global_mean = settings.loss_type in GLOBAL_TOKEN_MEAN
    loss, _ = settings.loss(
        logps,
        mask != 0,
        advantages * _selection(trainer, inputs, mask, advantages, logps.detach(), entropy.detach()),
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_ratio=rollout_ratio,
        normalizer=_token_count(trainer, inputs, training) if is_global_mean else None,
    )
    with torch.no_grad():
        metrics = _Metrics(trainer, mask, trainer._metrics["train" if training else "eval"])
        if ref_logps is not None:
            metrics.mean("kl", settings.kl(logps, mask != 0, old_logps, ref_logps))
        metrics.mean("entropy", entropy)
        if settings.loss_type == "vespo":
            phi = settings.constant_weight(logps, mask != 0, advantages, old_logps, rollout_ratio)
            metrics.mean("vespo/phi_seq_mean", phi)
        elif settings.loss_type != "sapo":
            metrics.clipping(settings, settings.ratio(logps, mask != 0, old_logps), advantages)
    return loss if is_global_mean else loss / micro_batches


def _score(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completions' tokens, [B, L] each."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model,
        ids,
        attention_mask,
        inputs["completion_ids"].size(1),
        compute_entropy=True,
        compute_aux_loss=False,
        **{name: inputs.get(name) for name in _MODEL_INPUTS},
    )
    return logps, entropy


def _selection(
    trainer: Any,
    inputs: dict[str, Any],
    mask: Tensor,  # [B, L]
    advantages: Tensor,  # [B, 1] or [B, L]
    logps: Tensor,  # [B, L]
    entropy: Tensor,  # [B, L]
) -> Tensor:  # without dimensions, [B, 1] or [B, L]: 1 where the policy term is wanted, else 0
    selection = advantages.new_ones(())
    if trainer.off_policy_mask_threshold is not None:
        old_logps = inputs.get("old_per_token_logps")
        selection = selection * trainer.get_off_policy_mask(
            advantages=advantages,
            per_token_logps=logps,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", logps if old_logps is None else old_logps),
            mask=mask,
            off_policy_threshold=trainer.off_policy_mask_threshold,
        )
    if trainer.top_entropy_quantile < 1:
        selection = selection * trainer.get_high_entropy_mask(entropy, mask, 1 - trainer.top_entropy_quantile)
    return selection


def _token_count(trainer: Any, inputs: dict[str, Any], training: bool) -> Tensor:
    """One process's share of the tokens of an optimiser step (in evaluation: of the batch)."""
    count = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if training:
        count = count * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return count


class _Metrics:
    """Logs as TRL does: what comes as [B, 1] counts by sequences, what comes as [B, L] by tokens."""

    def __init__(
        self,
        trainer: Any,
        mask: Tensor,  # [B, L]
        log: dict[str, list[float]],
    ):
        self._accelerator = trainer.accelerator
        self._mask = mask
        self._log = log

    def mean(self, name: str, values: Tensor) -> None:
        """The mean over all processes."""
        if values.shape[1] == 1:
            total, count = values.sum(), torch.tensor(float(values.shape[0]), device=values.device)
        else:
            total, count = (values * self._mask).sum(), self._mask.sum().float()
        totals = self._accelerator.reduce(torch.stack([total, count]), reduction="sum")
        self._log[name].append((totals[0] / totals[1].clamp(min=1.0)).item())

    def clipping(
        self,
        settings: PaddedLoss,
        ratio: Tensor,  # [B, 1] or [B, L]
        advantages: Tensor,  # [B, 1] or [B, L]
    ) -> None:
        """The shares of clipped tokens or sequences."""
        if settings.loss_type not in CLIPPED:
            self.mean("cispo_clip_ratio", ((ratio > settings.epsilon_high) & (advantages > 0)).float())
            return
        from trl.trainer.utils import nanmax, nanmin

        low = (ratio < 1 - settings.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + settings.epsilon_high) & (advantages > 0)
        self.mean("clip_ratio/low_mean", low.float())
        self.mean("clip_ratio/high_mean", high.float())
        self.mean("clip_ratio/region_mean", (low | high).float())
        gather = self._accelerator.gather
        self._log["clip_ratio/low_min"].append(nanmin(gather(self._of_sequences(low.float()))).item())
        self._log["clip_ratio/high_max"].append(nanmax(gather(self._of_sequences(high.float()))).item())

    def _of_sequences(self, values: Tensor) -> Tensor:  # [B]
        if values.shape[1] == 1:
            return values.squeeze(1)
        return (values * self._mask).sum(1) / self._mask.sum(1)
