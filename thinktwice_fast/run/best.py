"""Which checkpoint is the best one: that of the evaluated step with the highest value of a metric."""

from collections.abc import Sequence
from dataclasses import dataclass

from thinktwice_fast.run.metrics import AVERAGE

_RISING = ("solve_accuracy", "refine_accuracy", "fix_wrong", "boxed_rate", "refine_boxed_rate")
_RISING_AT_K = ("solve_pass@", "refine_pass@")


@dataclass(frozen=True)
class Best:
    """The highest value so far, and the step that it was measured after."""

    step: int
    metric: str
    value: float


def rising_metrics(sets: Sequence[str], samples: int) -> list[str]:
    """Names of the metrics that are better the higher they are, in evaluations of these sets.

    Args:
        sets: their names.
        samples: solutions drawn per problem.
    """
    counts = [1 << power for power in range(samples.bit_length())] if samples > 1 else []
    metrics = [*_RISING, *(f"{metric}{count}" for metric in _RISING_AT_K for count in counts)]
    return [f"eval/{name}/{metric}" for name in (*sets, *((AVERAGE,) if len(sets) > 1 else ())) for metric in metrics]
