"""Graders side by side, where evaluation sets are graded otherwise than the training problems."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks.pool import Grader, Grading


class Graders:
    """A `Grader` for each reward; a problem goes to that of its own `Problem.reward`, or to the first one.

    Args:
        reward: of problems that name none.
        others: rewards that problems may name.
        timeout: as of `Grader`.
        workers: as of `Grader`, for each.

    Raises:
        UserError: as `Grader`.
    """

    def __init__(self, reward: str, others: Iterable[str], timeout: float, workers: int) -> None:
        self._reward = reward
        with ExitStack() as opened:
            self._graders = {
                name: opened.enter_context(Grader(name, timeout, workers)) for name in dict.fromkeys((reward, *others))
            }
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

    def __enter__(self) -> "Graders":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _of(self, problem: Problem) -> Grader:
        return self._graders[problem.reward or self._reward]
