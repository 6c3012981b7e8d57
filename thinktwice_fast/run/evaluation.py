"""Held-out evaluation: sample solutions, refine each once, and count."""

from collections.abc import Mapping, Sequence

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.sampler import Sampler, SampleSpec
from thinktwice_fast.config import Config
from thinktwice_fast.records import Problem, Rollout, Sampling, is_right
from thinktwice_fast.run.figures import Response, Solved, figures, values
from thinktwice_fast.run.metrics import AVERAGE
from thinktwice_fast.tasks.answers import extract_boxed

# Random numbers of evaluations are apart from those of any training step.
_STREAM = 1 << 30


Outcome = tuple[int, Solved]  # a problem's number, and a solution with its refinement


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
        metrics |= {f"eval/{AVERAGE}/{metric}": value for metric, value in average_metrics(by_set).items()}
    return metrics


def average_metrics(by_set: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The plain mean of each metric over the sets that have it."""
    known: dict[str, list[float]] = {}
    for measured in by_set:
        for name, value in measured.items():
            known.setdefault(name, []).append(value)
    return {name: sum(shown) / len(shown) for name, shown in known.items()}


def set_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Figures of one set; fix-wrong and damage-correct are absent where nothing was wrong or right."""
    problems: dict[int, list[Solved]] = {}
    for problem, solved in outcomes:
        problems.setdefault(problem, []).append(solved)
    samples = min(map(len, problems.values()))
    return values(figures(list(problems.values()), [1 << power for power in range(samples.bit_length())]))


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
    return problem, Solved(_response(rollout), (_response(refinement),))


def _response(rollout: Rollout) -> Response:
    boxed = extract_boxed(rollout.text)
    return Response(is_right(rollout.reward), boxed is not None, len(rollout.response), rollout.finished, vote=boxed)
