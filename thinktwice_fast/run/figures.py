"""What is counted of solutions and their refinements: each figure as a quotient of sums over problems.

So that its spread can be told by drawing problems again, without going back to the responses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class Response:
    """What counts of a solution or a refinement."""

    right: bool
    boxed: bool  # it has a closed \\boxed{}
    tokens: int  # stop token included
    finished: bool = True  # False = cut off
    vote: str | None = None  # the answer it gives, for the majority


@dataclass(frozen=True)
class Solved:
    """A solution and its refinements."""

    solution: Response
    refinements: tuple[Response, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of a set of problems: a sum over the problems by another."""

    numerators: np.ndarray  # float64 [problems]
    denominators: np.ndarray  # float64 [problems]

    @property
    def value(self) -> float | None:
        """None where there is nothing to divide by: no wrong solution to fix, say."""
        below = self.denominators.sum()
        return float(self.numerators.sum() / below) if below else None


def figures(problems: Sequence[Sequence[Solved]], ks: Iterable[int]) -> dict[str, Figure]:
    """Every figure of a set, by name: those of the refinements where there are any.

    Args:
        problems: the solutions of each problem; of each problem equally many, with equally many refinements.
        ks: of pass@k; those above the number of samples are left out. Refinements of a problem count together.
    """
    ks = tuple(ks)
    solutions = [[pair.solution for pair in pairs] for pairs in problems]
    refinements = [[refined for pair in pairs for refined in pair.refinements] for pairs in problems]
    found = _of_responses("solve", "", solutions, ks)
    if not any(refinements):
        return found
    found |= _of_responses("refine", "refine_", refinements, ks)
    for name, was_right in (("fix_wrong", False), ("damage_correct", True)):
        changed = [
            [refined.right != was_right for pair in pairs if pair.solution.right is was_right
             for refined in pair.refinements]
            for pairs in problems
        ]  # fmt: skip
        found[name] = Figure(_array(map(sum, changed)), _array(map(len, changed)))
    return found


def values(found: dict[str, Figure]) -> dict[str, float]:
    """The figures that have a value."""
    return {name: value for name, figure in found.items() if (value := figure.value) is not None}


def unbiased_pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the chance that k of n samples, drawn without repetition, hold a right one."""
    return 1 - comb(n - correct, k) / comb(n, k)


def majority(responses: Iterable[Response]) -> float | None:
    """How right the most frequent answer is: the mean over those that are most frequent. None: nobody votes."""
    votes: dict[str, list[bool]] = {}
    for response in responses:
        if response.vote is not None:
            votes.setdefault(response.vote, []).append(response.right)
    if not votes:
        return None
    most = max(map(len, votes.values()))
    leading = [sum(rights) / most for rights in votes.values() if len(rights) == most]
    return sum(leading) / len(leading)


def _of_responses(
    phase: str, prefix: str, problems: Sequence[Sequence[Response]], ks: Sequence[int]
) -> dict[str, Figure]:
    counts = [(len(responses), sum(response.right for response in responses)) for responses in problems]
    n = min(count for count, _ in counts)
    found = {f"{phase}_accuracy": _mean(right / count for count, right in counts)}
    elected = [majority(responses) for responses in problems]
    if n > 1 and any(share is not None for share in elected):
        found[f"{phase}_majority"] = _mean(share or 0.0 for share in elected)
    for k in ks:
        if n > 1 and k <= n:
            chances: dict[tuple[int, int], float] = {pair: unbiased_pass_at_k(*pair, k) for pair in set(counts)}
            found[f"{phase}_pass@{k}"] = _mean(chances[pair] for pair in counts)
    found[f"{prefix}boxed_rate"] = _mean(_share(response.boxed for response in own) for own in problems)
    found[f"{prefix}truncation_rate"] = _mean(_share(not response.finished for response in own) for own in problems)
    found[f"{phase}_tokens"] = _mean(_share(response.tokens for response in own) for own in problems)
    return found


def _share(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _mean(values: Iterable[float]) -> Figure:
    numerators = _array(values)
    return Figure(numerators, np.ones_like(numerators))


def _array(values: Iterable[float]) -> np.ndarray:
    return np.fromiter(values, dtype=np.float64)
