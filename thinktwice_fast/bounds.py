"""Which numbers an option takes: said where the option is declared, checked in one place for all of them."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from thinktwice_fast.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Value = TypeVar("_Value")
_KEY = "bounds"
MOST_SECONDS = 1_000_000  # beyond, timers overflow
_MOST_INTEGER = 2**31 - 1  # what the kernels' arguments hold


@dataclass(frozen=True)
class Bounds:
    """The ends of a range; None = open to that side."""

    least: float | None
    above: float | None
    most: float | None
    below: float | None

    def hold(self, number: float) -> bool:
        """Whether ``number`` lies within."""
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """As the end of "must be ...": "at least 1", "above 0 and at most 1", "from 0 to 1", "from 0 to below 1"."""
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        if self.least is not None and self.below is not None:
            return f"from {self.least} to below {self.below}"
        ends = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {end}" for word, end in ends if end is not None)


def bounded(
    default: _Value,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> _Value:
    """The field of an option whose numbers lie in this range: the one that it is, or each one of a tuple.

    What is no number (null) is left alone. To a type checker this is the default, as ``dataclasses.field`` is.
    """
    return field(default=default, metadata={_KEY: Bounds(least, above, most, below)})


def bounds_of(option: Any) -> Bounds | None:  # of a dataclasses.Field
    """What ``bounded`` was told for an option; None where any finite number will do."""
    return option.metadata.get(_KEY)


def check_bounds(options: "DataclassInstance", prefix: str = "") -> None:
    """Raise UserError for the first number among ``options``, or in sections of them, that is out of its range.

    Bounds or none, a number has to be finite, and an integer to fit 32 bits.

    Args:
        options: a dataclass of options; one that lies in it is a section.
        prefix: what the names of the options begin with on the command line, after the dashes ("run.").
    """
    for option in fields(options):
        name, value = prefix + option.name, getattr(options, option.name)
        if is_dataclass(value) and not isinstance(value, type):
            check_bounds(value, f"{name}.")
        else:
            _check_value(name, value, bounds_of(option))


def _check_value(name: str, value: Any, bounds: Bounds | None) -> None:
    several = isinstance(value, (list, tuple))
    numbers = [member for member in (value if several else (value,)) if isinstance(member, (int, float))]
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"--{name} {number}: give a finite number")
    if bounds is not None and not all(bounds.hold(number) for number in numbers):
        shown, each = (list(value), "each ") if several else (value, "")
        raise UserError(f"--{name} {shown}: {each}must be {bounds}")
    for number in numbers:
        if isinstance(number, int) and number > _MOST_INTEGER:
            raise UserError(f"--{name} {number}: must be at most {_MOST_INTEGER}")
