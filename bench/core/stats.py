"""The few statistics that the tables show."""

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, between the two nearest where it falls between them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of two things measured in turn: the median of the rounds' own ratios, which a slow spell of the machine moves
    less than the ratio of the medians."""
    return median([a / b for a, b in zip(numerators, denominators, strict=True)])
