"""How sure the figures of an evaluation are: 95 % intervals, from a bootstrap over problems.

Problems are drawn again, with replacement, as often as there are. What a figure then becomes gives its variance, and
how it goes together with that of another model, since figures of all models on a set see the same draws.

Percentiles of the draws alone would fail where it matters, near 0 and 1: sixty problems without a failure would be said
to have none for sure. So a share has Wilson's interval, for as many problems as would give its variance if each counted
0 or 1; means over sets and differences combine the intervals of their parts (the square-and-add rule of Newcombe,
Statistics in Medicine 17, 1998, for paired differences with the correlation of the draws).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from thinktwice_fast.run.figures import Figure

TIMES = 2000  # that problems are drawn again
_AT_ONCE = 100  # of them, which bounds the memory
_ENDS = (2.5, 97.5)  # percentiles
_Z = 1.959964  # the normal distribution's

Draws = Mapping[str, np.ndarray]  # of each figure float64 [TIMES]; NaN where it has no value


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


def redraw(found: Mapping[str, Figure], seed: int) -> Draws:
    """The figures of one set on problems drawn again; the same draws for every model with one ``seed``."""
    above = np.stack([figure.numerators for figure in found.values()], axis=1)  # [problems, figures]
    below = np.stack([figure.denominators for figure in found.values()], axis=1)
    problems, numbers = len(above), np.random.default_rng(seed)
    parts = []
    for _ in range(TIMES // _AT_ONCE):
        places = numbers.integers(problems, size=(_AT_ONCE, problems)) + problems * np.arange(_AT_ONCE)[:, None]
        weights = np.bincount(places.ravel(), minlength=problems * _AT_ONCE).reshape(_AT_ONCE, problems)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((weights @ above) / (weights @ below))
    return dict(zip(found, np.concatenate(parts).T, strict=True))


def estimate(name: str, figure: Figure, draws: np.ndarray) -> Estimate | None:
    """A figure with its interval; None where it has no value.

    Args:
        name: of the figure; all but lengths in tokens are shares, from 0 to 1.
        figure: of one set.
        draws: of it, float64 [TIMES].
    """
    value = figure.value
    if value is None:
        return None
    known = draws[np.isfinite(draws)]
    if name.endswith("_tokens"):
        low, high = np.percentile(known, _ENDS)
        return Estimate(value, float(low), float(high))
    variance, spread = value * (1 - value), float(known.var())
    problems = float(np.count_nonzero(figure.denominators))
    return Estimate(value, *_wilson(value, variance / spread if variance > 0 and spread > 0 else problems))


def mean_of_sets(sets: Sequence[Estimate]) -> Estimate:
    """Their plain mean; sets are independent of each other."""
    value = sum(part.value for part in sets) / len(sets)
    below = sqrt(sum((part.value - part.low) ** 2 for part in sets)) / len(sets)
    above = sqrt(sum((part.high - part.value) ** 2 for part in sets)) / len(sets)
    return Estimate(value, value - below, value + above)


def mean_draws(sets: Sequence[Draws]) -> Draws:
    """The draws of plain means, over the sets that have a figure."""
    names = dict.fromkeys(name for draws in sets for name in draws)
    return {name: np.mean([draws[name] for draws in sets if name in draws], axis=0) for name in names}


def difference(ours: Estimate, theirs: Estimate, draws: np.ndarray, their_draws: np.ndarray) -> Estimate:
    """Of two models on the same problems: ours less theirs; draws are float64 [TIMES]."""
    known = np.isfinite(draws) & np.isfinite(their_draws)
    one, other = draws[known], their_draws[known]
    varied = len(one) > 1 and one.std() > 0 and other.std() > 0
    together = float(np.corrcoef(one, other)[0, 1]) if varied else 0.0
    value = ours.value - theirs.value
    below = _combined(ours.value - ours.low, theirs.high - theirs.value, together)
    above = _combined(ours.high - ours.value, theirs.value - theirs.low, together)
    return Estimate(value, value - below, value + above)


def _wilson(share: float, count: float) -> tuple[float, float]:
    """The score interval of a share of so many."""
    square = _Z * _Z / count
    centre = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _combined(one: float, other: float, together: float) -> float:
    return sqrt(max(0.0, one * one + other * other - 2 * together * one * other))
