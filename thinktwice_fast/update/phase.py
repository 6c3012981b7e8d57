"""What the loss of a phase's rollouts takes beside what the model computes.

Letters: N response tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from thinktwice_fast.model.lists import float32, upload
from thinktwice_fast.records import Rollout
from thinktwice_kernels import combine_metrics, loss_count

Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Phase:
    """Log-probabilities [tokens of the response] are by a rollout's id()."""

    arguments: dict[str, Any]  # of grpo_loss
    guided: bool  # a teacher wrote into one of its rollouts, on whatever process
    old: dict[int, torch.Tensor]  # empty: the current ones
    reference: dict[int, torch.Tensor]  # empty: there is no reference
    device: torch.device

    def tensors(self, part: list[Rollout]) -> dict[str, torch.Tensor | None]:  # [N] each
        """Those that ``grpo_loss`` takes of a micro-batch's tokens."""
        return {
            "old_logps": _gathered(part, self.old),
            "ref_logps": _gathered(part, self.reference),
            "rollout_logps": noted(part, self.device),
            "guide_mask": self._guide_mask(part),
        }

    def count(self, part: list[Rollout]) -> int:
        """The micro-batch's share of what the loss is divided by."""
        given: dict[str, Any] = dict(self.tensors(part))
        del given["ref_logps"]
        ends = accumulate((len(rollout.response) for rollout in part), initial=0)
        return int(loss_count(torch.tensor(list(ends), device=self.device), **given, **self.arguments))

    def _guide_mask(self, part: list[Rollout]) -> torch.Tensor | None:  # bool [N]
        if not self.guided:
            return None
        whole = self.arguments["released_code_compat"]
        flags = [flag for rollout in part for flag in _guide_flags(rollout, whole)]
        return upload([torch.tensor(flags, dtype=torch.bool)], self.device)[0]


def noted(part: Iterable[Rollout], device: torch.device) -> torch.Tensor:  # float32 [N]
    """The log-probabilities that the rollout engine noted."""
    return upload([float32([logp for rollout in part for logp in rollout.logps])], device)[0]


def mismatch(
    logps: torch.Tensor,  # [N]
    rollout_logps: torch.Tensor,  # [N]
    guide_mask: torch.Tensor | None,  # bool [N]
) -> torch.Tensor:
    """Mean absolute difference of the sampled tokens' log-probabilities."""
    difference = (logps - rollout_logps).abs()
    if guide_mask is None:
        return difference.mean()
    return difference.masked_fill(guide_mask, 0).sum() / (~guide_mask).sum().clamp(min=1)


def combined(parts: list[Metrics]) -> dict[str, float]:
    """The metrics of all micro-batches together; ``mismatch`` over those that have it."""
    if not parts:
        return {}
    together = combine_metrics([{name: part[name] for name in part if name != "mismatch"} for part in parts])
    if measured := [part for part in parts if "mismatch" in part]:
        together["mismatch"] = combine_metrics(measured)["mismatch"]
    return {name: float(value) for name, value in together.items()}


def shaping_shares(metrics: dict[str, float]) -> dict[str, float]:
    """A guided phase's metrics, with shares in place of the shaping's counts; a mean over no tokens is left out."""
    counts = {name: metrics[name] for name in ("tokens_masked", "tokens_shaped_pos", "tokens_shaped_neg")}
    empty = {f"shaping_weight_{sign}" for sign in ("pos", "neg") if not counts[f"tokens_shaped_{sign}"]}
    kept = {name: value for name, value in metrics.items() if name not in counts.keys() | empty}
    computed, guided = metrics["tokens"] - metrics["tokens_skipped"], metrics["tokens_guided"]
    return kept | {"guided_share": guided / max(computed, 1), "masked_share": counts["tokens_masked"] / max(guided, 1)}


def _guide_flags(rollout: Rollout, whole: bool) -> list[bool]:
    """Which tokens of the response count as guided: those that a teacher wrote; with ``whole`` all, if it wrote any."""
    if whole or not rollout.guide:
        return [any(rollout.guide)] * len(rollout.response)
    assert len(rollout.guide) == len(rollout.response)
    return rollout.guide


def _gathered(part: list[Rollout], logps: dict[int, torch.Tensor]) -> torch.Tensor | None:  # [N]
    return torch.cat([logps[id(rollout)] for rollout in part]) if id(part[0]) in logps else None
