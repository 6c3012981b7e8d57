"""The definitions again, token by token in float64, for the tests to compare with. Autograd gives their gradients."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, float]


def slow_logprob(logits: list[Tensor], target: int, tau: float) -> tuple[Tensor, Tensor]:
    """Log-probability of one target and the entropy of its row."""
    scaled = [z / tau for z in logits]
    total = torch.stack([z.exp() for z in scaled]).sum()
    p = [z.exp() / total for z in scaled]
    return p[target].log(), -torch.stack([q * q.log() for q in p]).sum()


def slow_linear_logprobs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: list[int],
    bias: Tensor | None,
    tau: list[float],
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    logps, entropies = [], []
    for row, target, temperature in zip(hidden, targets, tau, strict=True):
        logits = [(row * column).sum() + (0 if bias is None else bias[v]) for v, column in enumerate(weight)]
        if softcap is not None:
            logits = [softcap * torch.tanh(z / softcap) for z in logits]
        logp, entropy = slow_logprob(logits, target, temperature)
        logps.append(logp)
        entropies.append(entropy)
    return torch.stack(logps), torch.stack(entropies)


def slow_advantages(rewards: list[float], ids: list[int], scale: str, eps: float) -> list[float]:
    def std(values: list[float]) -> float:
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    result = []
    for reward, label in zip(rewards, ids, strict=True):
        group = [r for r, other in zip(rewards, ids, strict=True) if other == label]
        centred = reward - math.fsum(group) / len(group) if len(group) > 1 else 0.0
        mean = math.fsum(group) / len(group)
        spread = {"none": 1.0, "group": std(group) + eps, "batch": std(rewards) + eps, "mean": mean}[scale]
        result.append(centred / spread if spread else 0.0)
    return result


def slow_loss(batch: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Numbers]:
    """`grpo_loss` from its docstring: `batch` holds the tensors, `options` the rest."""
    return _SlowLoss(batch, options).result()


class _SlowLoss:
    def __init__(self, batch: dict[str, Any], options: dict[str, Any]):
        self.batch, self.options = batch, options
        self.logps: Tensor = batch["logps"]
        self.values = self.logps.detach()
        offsets = batch["cu_seqlens"].tolist()
        self.spans = [list(range(a, b)) for a, b in pairwise(offsets)]
        self.span_of = {t: span for span in self.spans for t in span}
        self.sequence_of = {t: s for s, span in enumerate(self.spans) for t in span}

    def option(self, name: str, default: Any) -> Any:
        return self.options.get(name, default)

    def flag(self, name: str, t: int, default: bool) -> bool:
        mask = self.batch.get(name)
        return default if mask is None else bool(mask[t])

    def advantage(self, t: int) -> float:
        advantages = self.batch["advantages"]
        return float(advantages[self.sequence_of[t] if len(advantages) == len(self.spans) else t])

    def selected(self, t: int) -> bool:
        return self.flag("loss_mask", t, True)

    def in_loss(self, t: int) -> bool:
        kept_only = self.option("rollout_is_denominator", "all") == "kept"
        return self.selected(t) and not (kept_only and self.dropped(t))

    def dropped(self, t: int) -> bool:
        masks = self.option("rollout_is", "none").endswith("mask")
        return masks and not self.guided(t) and self.rollout_weight(t) == 0

    def guided(self, t: int) -> bool:
        span = self.span_of[t] if self.option("released_code_compat", False) else [t]
        return any(self.selected(u) and self.flag("guide_mask", u, False) for u in span)

    def old(self, t: int) -> Tensor:
        return (self.batch["old_logps"] if self.batch.get("old_logps") is not None else self.logps)[t].detach()

    def ordinary(self, t: int) -> bool:
        return self.in_loss(t) and not self.guided(t)

    def computed(self, t: int) -> bool:
        if self.option("beta", 0.0) or self.option("entropy_coef", 0.0):
            return self.in_loss(t)
        by_sequence = self.sequence_level() or self.option("rollout_is", "none").startswith("sequence")
        span = self.span_of[t] if by_sequence else [t]
        return self.in_loss(t) and any(self.in_loss(u) and self.advantage(u) != 0 for u in span)

    def sequence_level(self) -> bool:
        return self.option("importance_sampling_level", "token") == "sequence"

    def ratio(self, t: int) -> Tensor:
        if not self.sequence_level():
            return torch.exp(self.logps[t] - self.old(t))
        members = [u for u in self.span_of[t] if self.ordinary(u)]
        return torch.exp(torch.stack([self.logps[u] - self.old(u) for u in members]).mean())

    def rollout_weight(self, t: int) -> float:
        mode = self.option("rollout_is", "none")
        if mode == "none" or self.guided(t):
            return 1.0
        span = [t]
        if mode.startswith("sequence"):
            span = [u for u in self.span_of[t] if self.selected(u) and not self.guided(u)]
        weight = math.exp(sum(float(self.old(u) - self.batch["rollout_logps"][u]) for u in span))
        cap, floor = self.option("rollout_is_cap", 2.0), self.option("rollout_is_floor", None) or 0.0
        if mode.endswith("truncate"):
            return min(max(weight, floor), cap)
        return weight if floor <= weight <= cap else 0.0

    def masked(self, t: int) -> bool:
        return self.advantage(t) < 0 and float(self.values[t].exp()) < self.option("shaping_min_probability", 0.01)

    def shaping_weight(self, t: int) -> float:
        p, clamp = float(self.values[t].exp()), self.option("shaping_clamp", 1e-3)
        if self.option("released_code_compat", False):
            return released_weight(p, clamp)
        gamma = self.option("shaping_coefficient", 2.5e-4) * self.advantage(t)
        return p / (p + max(-clamp, min(clamp, gamma)))

    def policy(self, t: int) -> Tensor:
        a, logp = self.advantage(t), self.logps[t]
        if self.guided(t):
            if not self.masked(t):
                # The factor is 1, and its derivative too.
                return -a * self.shaping_weight(t) * torch.exp(logp - logp.detach()) if a != 0 else logp * 0
            if self.option("guide_fallback", "mask") == "mask":
                return logp * 0
        weight = self.rollout_weight(t)
        if a == 0 or weight == 0:
            return logp * 0
        return weight * {"clip": self.clip, "cispo": self.cispo, "sapo": self.sapo}[self.option("policy_loss", "clip")](
            t, a, self.ratio(t)
        )

    def clip(self, t: int, a: float, ratio: Tensor) -> Tensor:
        low, high = 1 - self.option("epsilon_low", 0.2), 1 + self.option("epsilon_high", 0.2)
        free = ratio if self.option("delta", None) is None else ratio.clamp(max=self.option("delta", None))
        loss = -torch.minimum(free * a, ratio.clamp(low, high) * a)
        if a < 0 and self.option("dual_clip", None) is not None:
            loss = torch.minimum(loss, torch.full_like(loss, -self.option("dual_clip", None) * a))
        return loss

    def cispo(self, t: int, a: float, ratio: Tensor) -> Tensor:
        high = 1 + self.option("epsilon_high", 0.2)
        return -min(ratio.item(), high) * a * self.logps[t]

    def sapo(self, t: int, a: float, ratio: Tensor) -> Tensor:
        tau = self.option("sapo_temperature_pos", 1.0) if a > 0 else self.option("sapo_temperature_neg", 1.05)
        return -a * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))

    def kl(self, t: int) -> Tensor:
        d = self.logps[t] - self.batch["ref_logps"][t].detach()
        return {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) + d - 1}[self.option("kl_estimator", "k3")]

    def token(self, t: int) -> Tensor:
        loss = self.policy(t)
        if self.option("beta", 0.0):
            loss = loss + self.option("beta", 0.0) * self.kl(t)
        if self.option("entropy_coef", 0.0):
            loss = loss - self.option("entropy_coef", 0.0) * self.batch["entropy"][t]
        return loss

    def result(self) -> tuple[Tensor, Numbers]:
        mode, normalizer = self.option("loss_agg_mode", "token-mean"), self.option("normalizer", None)
        total = self.logps.sum() * 0
        for span in self.spans:
            members = [t for t in span if self.in_loss(t)]
            part = sum((self.token(t) for t in members), self.logps.sum() * 0)
            total = total + (part / max(len(members), 1) if mode == "seq-mean-token-mean" else part)
        tokens = sum(self.in_loss(t) for t in self.span_of)
        count = self.count() if normalizer is None else normalizer
        loss = total / count
        if mode == "seq-mean-token-sum-norm":
            loss = loss / self.option("max_response_length", None)
        return loss, self.metrics(tokens, loss)

    def count(self) -> int:
        if self.option("loss_agg_mode", "token-mean") == "token-mean":
            return max(sum(self.in_loss(t) for t in self.span_of), 1)
        gone = [any(map(self.selected, span)) and not any(map(self.in_loss, span)) for span in self.spans]
        return max(len(self.spans) - sum(gone), 1)

    def clipped_low(self, t: int) -> bool:
        bound = 1 - self.option("epsilon_low", 0.2)
        return self.option("policy_loss", "clip") == "clip" and self.advantage(t) < 0 and self.ratio(t).item() < bound

    def clipped_high(self, t: int) -> bool:
        policy, bound = self.option("policy_loss", "clip"), 1 + self.option("epsilon_high", 0.2)
        binds = {"clip": self.advantage(t) > 0, "cispo": True, "sapo": False}[policy]
        return binds and self.ratio(t).item() > bound

    def metrics(self, tokens: int, loss: Tensor) -> Numbers:
        computed = [t for t in self.span_of if self.computed(t)]
        ordinary = [t for t in computed if self.ordinary(t)]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values) if values else 0.0

        difference = [float(self.values[t] - self.old(t)) for t in ordinary]
        ratios = [self.ratio(t).item() for t in ordinary]
        (gradient,) = torch.autograd.grad(loss, [self.logps], retain_graph=True)
        every = self.option("beta", 0.0) or self.option("entropy_coef", 0.0)
        found = {
            "tokens": tokens,
            "tokens_skipped": tokens - len(computed),
            "tokens_guided": len(computed) - len(ordinary),
            "tokens_with_gradient": len(computed) if every else int((gradient != 0).sum()),
            "clip_fraction_low": mean([self.clipped_low(t) for t in ordinary]),
            "clip_fraction_high": mean([self.clipped_high(t) for t in ordinary]),
            "ratio_mean": mean(ratios),
            "ratio_max": max(ratios, default=0.0),
            "approx_kl": mean([math.exp(d) - 1 - d for d in difference]),
        }
        if self.batch.get("guide_mask") is not None:
            found |= self.shaping_metrics([t for t in computed if self.guided(t)])
        if self.option("rollout_is", "none") != "none":
            kept_only = self.option("rollout_is_denominator", "all") == "kept"
            counted = [t for t in self.span_of if self.selected(t)] if kept_only else computed
            found["tokens_dropped"] = sum(map(self.dropped, counted))
            found["rollout_is_mean"] = mean([self.rollout_weight(t) for t in ordinary])
        if self.batch.get("ref_logps") is not None:
            found["kl_ref"] = mean([self.kl(t).item() for t in ordinary])
        if self.batch.get("rollout_logps") is not None:
            found["mismatch"] = mean([abs(float(self.old(t) - self.batch["rollout_logps"][t])) for t in ordinary])
        if self.batch.get("entropy") is not None:
            found["entropy"] = mean([self.batch["entropy"][t].item() for t in computed])
        return found

    def shaping_metrics(self, guided: list[int]) -> Numbers:
        shaped = [t for t in guided if not self.masked(t) and self.advantage(t) != 0]
        found: Numbers = {"tokens_masked": sum(map(self.masked, guided))}
        for name, sign in (("pos", 1), ("neg", -1)):
            weights = [self.shaping_weight(t) for t in shaped if self.advantage(t) * sign > 0]
            found |= {f"tokens_shaped_{name}": len(weights)}
            found |= {f"shaping_weight_{name}": sum(weights) / len(weights) if weights else 0.0}
        return found


def released_weight(p: float, clamp: float = 1e-3) -> float:
    """The weight of a guided token in the released code of ThinkTuning, as it is written there.

    Its gamma is -clamp whatever the advantage. Only where it would divide by 0 this is its limit from below.
    """
    denominator = p - clamp
    if denominator <= 0:
        return 1.0001
    return p / (p / 0.9999) if denominator > 1 else p / denominator
