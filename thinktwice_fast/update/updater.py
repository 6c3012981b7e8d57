"""One phase's update: mini-batches to optimizer steps, micro-batches to gradients.

Letters: S sequences, T tokens of a row, N response tokens.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LRScheduler

from thinktwice_fast import parallel
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.flash import flash_for
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.lists import float32, upload
from thinktwice_fast.model.policy import Policy, attention_heads
from thinktwice_fast.model.products import WithValue, exact_logprobs, exact_product
from thinktwice_fast.model.sharding import ModelPair, set_trained_shards, trained_shards
from thinktwice_fast.records import Rollout
from thinktwice_fast.update.batches import Example, PackedRow, Trainable, pack, pack_shared
from thinktwice_fast.update.microbatches import plan_microbatches, row_budget
from thinktwice_fast.update.objective import loss_arguments
from thinktwice_fast.update.optimizer import clear_state, clip_gradients, continue_schedule, few_threads
from thinktwice_fast.update.phase import Metrics, Phase, combined, mismatch, noted, shaping_shares
from thinktwice_kernels import grpo_loss, linear_grpo_loss, linear_logits, linear_logprobs

S = TypeVar("S", bound=Trainable)
_HIT_ROWS = 256  # rows of logits that exist at a time for an accuracy
# one micro-batch -> its share of the loss (already divided by the mini-batch's normaliser), its metrics
Share = tuple[torch.Tensor, Metrics]
LossOf = Callable[[list[S]], Share]


class NonFiniteLoss(UserError):
    """A loss or gradient that is not a number; ``evidence`` is what led to it."""

    def __init__(self, text: str, evidence: dict[str, Any]):
        super().__init__(text)
        self.evidence = evidence


class Updater:
    """Turns samples into weights.

    Args:
        models: trained and read weights; read ones are refreshed after each call.
        reference: frozen initial policy, where the loss has a KL term.
        optimizer, schedule: as ``build_optimizer`` gives them.
        config: the run's.
        begin: called before anything is computed, to make room.
    """

    def __init__(
        self,
        models: ModelPair,
        reference: Policy | None,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        config: Config,
        begin: Callable[[], None] = lambda: None,
    ):
        self.models = models
        self._begin = begin
        self.optimizer = optimizer
        self.schedule = schedule
        self.version = 0  # of the weights; grows with each optimizer step
        self._reference = reference
        self._loss = config.loss
        self._counts_kept = config.loss.rollout_is_denominator == "kept"
        self._thinktuning = config.thinktuning
        self._options = config.update
        self._row_tokens = row_budget(config)
        self._temperature = config.rollout.temperature
        self._max_response_tokens = config.rollout.max_response_tokens
        self._device = models.policy.device
        self._learning_rate = 0.0  # of the latest optimizer step
        self._flops = Flops.of(models.rollout)
        self._flash = flash_for(self._device, models.rollout.dtype, *attention_heads(models.rollout))
        self._exact = config.rollout.exact
        # In place of recomputed ones.
        self._takes_rollout_logps = self._exact or config.update.old_logps == "rollout"

    def policy_update(self, minibatches: list[list[Rollout]]) -> dict[str, float]:
        """One optimizer step per mini-batch of graded rollouts. Collective.

        Every normaliser counts the whole mini-batch over all processes and micro-batches, so the gradient
        does not depend on how the samples are spread. Samples without advantage are not computed where only
        the advantage could give them a gradient; the normalisers count them all the same. The others are dealt
        out anew, so that no process waits long for another.

        Args:
            minibatches: this process's part of each, with advantages set.

        Returns:
            The loss metrics over all mini-batches and processes, ``grad_norm`` (mean), ``learning_rate``
            (the last step's) and ``seconds_update``.

        Raises:
            NonFiniteLoss: on every process; the weights are those before the mini-batch that failed.
        """
        started = time.perf_counter()
        self._begin()
        minibatches, normalizers, guided = self._graded(minibatches)
        with_signal = [[rollout for rollout in part if self._has_signal(rollout)] for part in minibatches]
        work = [self._microbatches(part) for part in with_signal]
        phase = self._phase(work, guided)
        if self._counts_kept:
            counts = [sum(phase.count(part) for part in parts if part) for parts in work]
            normalizers = [sum(column) for column in zip(*parallel.gather(counts), strict=True)]
        collected: list[Metrics] = []
        losses: list[float] = []
        norms: list[float] = []
        for microbatches, normalizer in zip(work, normalizers, strict=True):

            def loss_of(part: list[Rollout], normalizer: int = normalizer, moved: bool = bool(losses)) -> Share:
                loss, metrics = self._policy_loss(part, normalizer, phase)
                if moved and self._takes_rollout_logps:
                    # The weights that sampled are gone, and what they made of these tokens was never computed.
                    del metrics["mismatch"]
                return loss, metrics

            loss, norm, parts = self._optimizer_step(microbatches, loss_of)
            losses.append(loss)
            norms.append(norm)
            collected += parts
        self.models.updated()
        metrics = combined(parallel.gather_flat(collected))
        if "tokens_masked" in metrics:
            metrics = shaping_shares(metrics)
        drawn, kept = (sum(len(r.response) for part in parts for r in part) for parts in (minibatches, with_signal))
        skipped = sum(parallel.gather(drawn - kept))
        for name in ("tokens", "tokens_skipped"):
            metrics[name] = metrics.get(name, 0.0) + skipped
        # The rollout engine's entropy is the one reported: it covers every sampled token.
        metrics.pop("entropy", None)
        return metrics | self._step_metrics(losses, norms, started)

    def supervised_update(self, examples: list[Example]) -> dict[str, float]:
        """One optimizer step on the cross-entropy of the examples' responses, a token mean. Collective.

        Returns:
            ``loss`` (nats per token), ``token_accuracy``, ``grad_norm``, ``learning_rate``, ``seconds_update``.
        """
        started = time.perf_counter()
        self._begin()
        tokens = sum(parallel.gather(sum(len(example.response) for example in examples)))

        def loss_of(part: list[Example]) -> tuple[torch.Tensor, Metrics]:
            row = self._pack(part)

            def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
                logps = linear_logprobs(hidden, weight, row.targets, bias=bias)
                return logps, _hits(hidden, weight, bias, row.targets)

            logps, hits = self._run(self.models.policy, row, head)
            return -logps.sum() / tokens, {"hits": hits}

        loss, norm, metrics = self._optimizer_step(self._microbatches(examples), loss_of)
        self.models.updated()
        hits = sum(float(part["hits"]) for part in parallel.gather_flat(metrics))
        return {"token_accuracy": hits / tokens} | self._step_metrics([loss], [norm], started)

    def logps(self, rollouts: list[Rollout]) -> dict[int, list[float]]:
        """Each response token's log-probability by the present weights, by sample id, for all processes. Collective."""
        self._begin()
        parts = self._microbatches(rollouts)
        found = self._logps(self.models.policy, parts)
        own = {rollout.sample_id: found[id(rollout)].tolist() for part in parts for rollout in part}
        if isinstance(self.models.policy, FSDPModule):  # no backward pass will let its embedding and head go
            self.models.policy.reshard()
        return {sample: logps for part in parallel.gather(own) for sample, logps in part.items()}

    def trained_weights(self) -> list[torch.Tensor]:
        """Copies on the CPU of what this process has of the trained weights, for ``restart``."""
        return trained_shards(self.models.masters)

    def restart(self, weights: Sequence[torch.Tensor]) -> None:
        """Begin anew from other weights: optimizer and learning rate stand where they stood at the start. Collective.

        Args:
            weights: as ``trained_weights`` gave them.
        """
        set_trained_shards(self.models.masters, weights)
        self.models.sync()
        clear_state(self.optimizer, at_once=self.models.masters.device.type == "cuda")
        continue_schedule(self.optimizer, self.schedule, 0)
        self.version += 1

    def _optimizer_step(self, microbatches: list[list[S]], loss_of: LossOf[S]) -> tuple[float, float, list[Metrics]]:
        """The mini-batch's loss and gradient norm over all processes, and this process's micro-batch metrics."""
        collected: list[Metrics] = []
        shares: list[torch.Tensor] = []
        for part in microbatches:
            if not part:
                # AdamW's decay and momentum go on also where no sample has a gradient.
                (self._idle() * 0).backward()
                continue
            loss, metrics = loss_of(part)
            # FSDP2 averages gradients over processes, and the loss is a share of the global mean already.
            (loss * parallel.world_size()).backward()
            shares.append(loss.detach())
            collected.append(metrics)
        with few_threads(self.optimizer):
            norm = clip_gradients(self.models.masters, self._options.grad_clip)
            self._learning_rate = float(self.optimizer.param_groups[0]["lr"])
            total = sum(parallel.gather_flat([float(share) for share in shares]))
            if not (math.isfinite(total) and math.isfinite(norm)):
                self.optimizer.zero_grad()
                raise NonFiniteLoss(
                    f"the loss or its gradient is not finite (loss {total}, gradient norm {norm}): lower "
                    "--update.learning_rate",
                    {"sequences": list(chain.from_iterable(microbatches)), "loss": total, "grad_norm": norm},
                )
            self.optimizer.step()
        self.models.stepped()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.version += 1
        return total, norm, [{name: value.cpu() for name, value in metrics.items()} for metrics in collected]

    def _policy_loss(self, part: list[Rollout], normalizer: int, phase: Phase) -> tuple[torch.Tensor, Metrics]:
        row = self._pack(part)
        (advantages,) = upload([float32([rollout.advantage for rollout in part])], self._device)
        tensors = phase.tensors(part)
        arguments: dict[str, Any] = {**tensors, **phase.arguments, "normalizer": max(normalizer, 1)}

        def fused(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> tuple[torch.Tensor, Metrics]:
            return linear_grpo_loss(
                hidden, weight, row.targets, advantages, row.cu_seqlens, bias=bias, temperature=self._temperature,
                **arguments,
            )  # fmt: skip

        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Share:
            entropy = None
            logps = linear_logprobs(
                hidden, weight, row.targets, bias=bias, temperature=self._temperature,
                return_entropy=self._loss.entropy_coef != 0,
            )  # fmt: skip
            if isinstance(logps, tuple):
                logps, entropy = logps
            if self._exact:
                logps = self._exact_value(logps, hidden, weight, bias, row)
            loss, metrics = grpo_loss(logps, advantages, row.cu_seqlens, entropy=entropy, **arguments)
            # grpo_loss takes the old ones for the trainer's; every token here is one that it computed.
            metrics["mismatch"] = mismatch(logps.detach(), noted(part, self._device), tensors["guide_mask"])
            return loss, metrics

        return self._run(self.models.policy, row, head if self._takes_rollout_logps else fused)

    def _exact_value(
        self,
        logps: torch.Tensor,  # [N], with the gradient
        hidden: torch.Tensor,  # [N, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        row: PackedRow,
    ) -> torch.Tensor:  # [N]
        value = exact_logprobs(hidden, weight, bias, row.targets, self._temperature)
        return cast(torch.Tensor, WithValue.apply(logps, value))

    def _microbatches(self, sequences: list[S]) -> list[list[S]]:
        """This process's share of all processes' sequences; it may be idle in some of them. Collective."""
        everyone = parallel.gather_flat(sequences)
        plan = plan_microbatches(
            everyone,
            self._row_tokens,
            parallel.world_size(),
            self._flops,
            shared_prefix=self._options.shared_prefix,
        )
        return [[everyone[i] for i in part] for part in plan[parallel.rank()]]

    def _pack(self, part: Sequence[Trainable]) -> PackedRow:
        return (pack_shared if self._options.shared_prefix else pack)(part, self._device, self._flash)

    def _has_signal(self, rollout: Rollout) -> bool:
        return rollout.advantage != 0 or self._loss.beta != 0 or self._loss.entropy_coef != 0 or self._counts_kept

    def _graded(self, minibatches: list[list[Rollout]]) -> tuple[list[list[Rollout]], list[int], bool]:
        """The mini-batches that any process has tokens in, what the loss of each is divided by, and whether a teacher
        wrote into any rollout. Collective."""
        own = [(sum(len(r.response) for r in part), len(part), sum(any(r.guide) for r in part)) for part in minibatches]
        by_minibatch = zip(*parallel.gather(own), strict=True)
        totals = [tuple(sum(column) for column in zip(*counts, strict=True)) for counts in by_minibatch]
        kept = [(part, total) for part, total in zip(minibatches, totals, strict=True) if total[0]]
        divisor = 0 if self._loss.loss_agg_mode == "token-mean" else 1
        guided = any(total[2] for total in totals)
        return [part for part, _ in kept], [total[divisor] for _, total in kept], guided

    def _phase(self, work: list[list[list[Rollout]]], guided: bool) -> Phase:
        """Of the micro-batches of each mini-batch. Collective."""
        old = self._old_logps(work)
        falls_back = guided and self._thinktuning.guide_fallback == "clip"
        if falls_back and self._takes_rollout_logps and len(work) > 1:  # on every process, also where it has nothing
            old |= self._logps_with_guidance(work)
        parts = chain.from_iterable(work)
        reference = self._logps(self._reference, parts) if self._reference is not None else {}
        arguments = loss_arguments(self._loss, self._max_response_tokens, self._thinktuning, guided)
        return Phase(arguments, guided, old, reference, self._device)

    def _old_logps(self, work: list[list[list[Rollout]]]) -> dict[int, torch.Tensor]:
        """Of the rollouts whose loss needs them, by id(): recomputed ones are the first mini-batch's own.

        Args:
            work: micro-batches of each mini-batch.
        """
        if self._counts_kept:
            return self._logps(self.models.policy, chain.from_iterable(work))
        if len(work) < 2:
            return {}
        if self._takes_rollout_logps:
            rollouts = chain.from_iterable(chain.from_iterable(work))
            return {id(rollout): noted([rollout], self._device) for rollout in rollouts}
        return self._logps(self.models.policy, chain.from_iterable(work[1:]))

    def _logps_with_guidance(self, work: list[list[list[Rollout]]]) -> dict[int, torch.Tensor]:
        """Of guided rollouts, by id(): the noted ones, and recomputed ones where a teacher wrote and none was noted."""
        guided = [[rollout for rollout in part if any(rollout.guide)] for parts in work for part in parts]
        recomputed = self._logps(self.models.policy, guided)
        return {
            id(rollout): torch.where(
                torch.tensor(rollout.guide, device=self._device),
                recomputed[id(rollout)],
                noted([rollout], self._device),
            )
            for rollout in chain.from_iterable(guided)
        }

    @torch.no_grad()
    def _logps(self, policy: Policy, microbatches: Iterable[list[Rollout]]) -> dict[int, torch.Tensor]:
        """Log-probabilities [tokens of the response] of each rollout, by its id()."""
        found: dict[int, torch.Tensor] = {}
        for part in microbatches:
            if not part:
                self._idle(policy)
                continue
            row = self._pack(part)

            def head(
                hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, row: PackedRow = row
            ) -> torch.Tensor:
                return linear_logprobs(hidden, weight, row.targets, bias=bias, temperature=self._temperature)

            pieces = self._run(policy, row, head).split([len(rollout.response) for rollout in part])
            found.update((id(rollout), piece) for rollout, piece in zip(part, pieces, strict=True))
        return found

    def _idle(self, policy: Policy | None = None) -> torch.Tensor:
        """Take part in the collectives of a micro-batch that only other processes have."""
        result: torch.Tensor = self._run(
            policy or self.models.policy, pack([_IDLE], self._device, self._flash), _sum_of_hidden
        )
        return result

    def _run(self, policy: Policy, row: PackedRow, head: Callable[..., Any]) -> Any:
        product = exact_product if self._exact else self.models.product
        return policy(row.input_ids, row.position_ids, row.attention, row.select, head, product)

    def _step_metrics(self, losses: list[float], norms: list[float], started: float) -> dict[str, float]:
        return {
            "loss": sum(losses) / max(len(losses), 1),
            "grad_norm": sum(norms) / max(len(norms), 1),
            "learning_rate": self._learning_rate,
            "seconds_update": time.perf_counter() - started,
        }


_IDLE = Example((0,), [0])


def _sum_of_hidden(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return (hidden.sum() + weight.sum() + (bias.sum() if bias is not None else 0)).float()


@torch.no_grad()
def _hits(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
    targets: torch.Tensor,  # [N]
) -> torch.Tensor:
    """How many targets are the likeliest token."""
    pieces = zip(hidden.split(_HIT_ROWS), targets.split(_HIT_ROWS), strict=True)
    return torch.stack([(linear_logits(h, weight, bias).argmax(-1) == t).sum() for h, t in pieces]).sum()
