"""Figures of a phase's samples, over all processes; what each means stands in run/metrics.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.sampler import SamplingTimes
from thinktwice_fast.records import Group
from thinktwice_fast.tasks.answers import extract_boxed


@dataclass(frozen=True)
class Sample:
    """What is counted of one rollout, and all that other processes need to know of it."""

    slot: int
    reward: float | None
    tokens: int
    sampled: int  # of these, those that the policy drew
    prompt_tokens: int
    finished: bool
    boxed: bool
    entropy: float  # summed over its tokens

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "list[Sample]":
        """One for each rollout of this process's groups."""
        return [
            cls(
                group.slot,
                rollout.reward,
                len(rollout.response),
                rollout.sampled,
                len(group.prompt),
                rollout.finished,
                extract_boxed(rollout.text) is not None,
                sum(rollout.entropies),
            )
            for group in groups
            for rollout in group.rollouts
        ]


def rollout_metrics(own: Sequence[Sample], times: SamplingTimes) -> dict[str, float]:
    """Figures of drawing this process's samples, which took it these times. Collective."""
    everyone = parallel.gather(times)
    tokens = sum(parallel.gather(sum(sample.sampled for sample in own)))
    slowest_rollout = max(other.rollout for other in everyone)
    return {
        "tokens_per_second": tokens / slowest_rollout,
        "seconds_rollout": slowest_rollout,
        "seconds_grading": max(other.grading for other in everyone),
        "grading_timeouts": float(sum(other.timeouts for other in everyone)),
        "preemptions": float(sum(other.preemptions for other in everyone)),
    }


def sample_metrics(own: Sequence[Sample]) -> dict[str, float]:
    """Figures of the samples themselves; those of one slot are a group. Collective."""
    samples = parallel.gather_flat([*own])
    count, tokens = len(samples), sum(sample.tokens for sample in samples)
    metrics = {
        "response_tokens": tokens / count,
        "response_tokens_max": float(max(sample.tokens for sample in samples)),
        "prompt_tokens": sum(sample.prompt_tokens for sample in samples) / count,
        "truncation_rate": sum(not sample.finished for sample in samples) / count,
        "boxed_rate": sum(sample.boxed for sample in samples) / count,
        "entropy": sum(sample.entropy for sample in samples) / sum(sample.sampled for sample in samples),
        "rewards_missing": float(sum(sample.reward is None for sample in samples)),
    }
    rewards: dict[int, list[float]] = {}
    for sample in samples:
        if sample.reward is not None:
            rewards.setdefault(sample.slot, []).append(sample.reward)
    if rewards:
        graded = [reward for group in rewards.values() for reward in group]
        metrics["reward"] = sum(graded) / len(graded)
        metrics["reward_std"] = sum(stdev(group) for group in rewards.values() if len(group) > 1) / len(rewards)
        metrics["group_signal_rate"] = sum(min(group) < max(group) for group in rewards.values()) / len(rewards)
    return metrics
