"""Held-out evaluation: sample solutions, refine each once, and count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.sampler import Sampler, SampleSpec
from thinktwice_fast.config import Config
from thinktwice_fast.records import Problem, Rollout, Sampling
from thinktwice_fast.run.metrics import AVERAGE
from thinktwice_fast.tasks.answers import extract_boxed

# Random numbers of evaluations are apart from those of any training step.
_STREAM = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """A solution and its refinement."""

    problem: int
    right: bool
    refined_right: bool
    boxed: bool
    refined_boxed: bool
    tokens: int
    refined_tokens: int


def evaluate(sets: Mapping[str, Sequence[Problem]], sampler: Sampler, config: Config, version: int) -> dict[str, float]:
    """Metrics of every set, and their plain mean where there are several. Collective.

    A sample is right when its reward is at least 1.
    """
    metrics: dict[str, float] = {}
    by_set: list[dict[str, float]] = []
    for number, (name, problems) in enumerate(sets.items()):
        extended = sampler.engine.counts.extended
        outcomes = parallel.gather_flat(_outcomes(problems, sampler, config, _STREAM + 2 * number, version))
        extended = sum(parallel.gather(sampler.engine.counts.extended - extended))
        measured = set_metrics(outcomes) | {"refine_extended": extended / len(outcomes)}
        by_set.append(measured)
        metrics |= {f"eval/{name}/{metric}": value for metric, value in measured.items()}
    if len(by_set) > 1:
        for metric in by_set[0]:
            values = [measured[metric] for measured in by_set if metric in measured]
            metrics[f"eval/{AVERAGE}/{metric}"] = sum(values) / len(values)
    return metrics


def set_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Figures of one set; fix-wrong and damage-correct are absent where nothing was wrong or right."""
    count = len(outcomes)
    wrong = [outcome for outcome in outcomes if not outcome.right]
    right = [outcome for outcome in outcomes if outcome.right]
    metrics = {
        "solve_accuracy": len(right) / count,
        "refine_accuracy": sum(outcome.refined_right for outcome in outcomes) / count,
        "boxed_rate": sum(outcome.boxed for outcome in outcomes) / count,
        "refine_boxed_rate": sum(outcome.refined_boxed for outcome in outcomes) / count,
        "solve_tokens": sum(outcome.tokens for outcome in outcomes) / count,
        "refine_tokens": sum(outcome.refined_tokens for outcome in outcomes) / count,
    }
    if wrong:
        metrics["fix_wrong"] = sum(outcome.refined_right for outcome in wrong) / len(wrong)
    if right:
        metrics["damage_correct"] = sum(not outcome.refined_right for outcome in right) / len(right)
    return metrics | _pass_metrics(outcomes)


def unbiased_pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the chance that k of n samples, drawn without repetition, hold a right one."""
    return 1 - comb(n - correct, k) / comb(n, k)


def _pass_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    problems: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        problems.setdefault(outcome.problem, []).append(outcome)
    n = min(len(samples) for samples in problems.values())
    metrics: dict[str, float] = {}
    k = 1
    while n > 1 and k <= n:
        for name, field in (("solve", "right"), ("refine", "refined_right")):
            chances = [
                unbiased_pass_at_k(len(samples), sum(getattr(sample, field) for sample in samples), k)
                for samples in problems.values()
            ]
            metrics[f"{name}_pass@{k}"] = sum(chances) / len(chances)
        k *= 2
    return metrics


def _outcomes(
    problems: Sequence[Problem], sampler: Sampler, config: Config, stream: int, version: int
) -> list[Outcome]:
    own = range(parallel.rank(), len(problems), parallel.world_size())
    solved = [sampler.solve_group(number, problems[number]) for number in own]
    options, limit = config.eval, config.rollout.max_response_tokens
    stops = config.rollout.stop_strings
    solutions = Sampling(options.temperature, options.top_p, options.top_k, max_tokens=limit, stop_strings=stops)
    spec = SampleSpec(options.samples, solutions, stream, config.seed, version)
    refined = sampler.fill_pairs(solved, spec, Sampling(0.0, max_tokens=limit, stop_strings=stops))
    pairs = [(group, rollout) for group in solved for rollout in group.rollouts]
    return [
        _outcome(group.slot, rollout, refinement.rollouts[0])
        for (group, rollout), refinement in zip(pairs, refined, strict=True)
    ]


def _outcome(problem: int, rollout: Rollout, refinement: Rollout) -> Outcome:
    return Outcome(
        problem,
        (rollout.reward or 0) >= 1,
        (refinement.reward or 0) >= 1,
        extract_boxed(rollout.text) is not None,
        extract_boxed(refinement.text) is not None,
        len(rollout.response),
        len(refinement.response),
    )
