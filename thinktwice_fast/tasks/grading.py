"""Graders side by side, where evaluation sets are graded otherwise than the training problems."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks.graders import GRADERS
from thinktwice_fast.tasks.pool import Grader, Grading

_MOST_WORKERS = 8


class Graders:
    """A `Grader` for each reward; a problem goes to that of its own `Problem.reward`, or to the first one.

    Args:
        reward: of problems that name none.
        others: rewards that problems may name.
        timeout: as of `Grader`.
        workers: as of `Grader`, for each; None = one per two CPU cores, at most 8, and 1 for a user's function.
        stop: as of `Grader`.

    Raises:
        UserError: as `Grader`.
    """

    def __init__(
        self,
        reward: str,
        others: Iterable[str],
        timeout: float,
        workers: int | None = None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._reward = reward
        self._graders: dict[str, Grader] = {}
        with ExitStack() as opened:
            for name in dict.fromkeys((reward, *others)):
                count = _usual_workers(name) if workers is None else workers
                self._graders[name] = opened.enter_context(Grader(name, timeout, count, stop))
            self._open = opened.pop_all()

    @property
    def timeouts(self) -> int:
        """Maths answers graded 0 because they took too long or too much memory."""
        return sum(grader.timeouts for grader in self._graders.values())

    def check(self, problem: Problem) -> None:
        """As `Grader.check`."""
        self._of(problem).check(problem)

    def submit(self, problem: Problem, prompt: Sequence[Message], completions: Sequence[str]) -> Grading:
        """As `Grader.submit`."""
        return self._of(problem).submit(problem, prompt, completions)

    def look(self) -> None:
        """As `Grader.look`, of all."""
        for grader in self._graders.values():
            grader.look()

    def __enter__(self) -> "Graders":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _of(self, problem: Problem) -> Grader:
        return self._graders[problem.reward or self._reward]


def _usual_workers(reward: str) -> int:
    return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // 2)) if reward in GRADERS else 1
