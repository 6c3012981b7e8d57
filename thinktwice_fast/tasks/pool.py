"""Grading beside sampling: groups of responses are handed in as they finish and their rewards collected later."""

from collections.abc import Sequence
from typing import Protocol

from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks import graders, user_reward
from thinktwice_fast.tasks.workers import Task, WorkerDied, Workers

_IMPORT_SECONDS = 300.0  # for a user's file, which may load a model


class Grading(Protocol):
    """Rewards on their way."""

    def done(self) -> bool:
        """Whether `result` gives them without waiting (but for samples that have to be graded once more)."""
        ...

    def result(self) -> list[float | None]:
        """Reward of each sample, in order; None leaves a sample out. Waits as long as the time limits allow."""


class Grader:
    """Grades groups of responses to one problem each.

    Args:
        reward: "math", "choice", "yes_no", "exact" or "my_file.py:function" (see `user_reward`).
        timeout: seconds per answer. A math answer that takes longer gets 0 and is counted in `timeouts`; a user's
            function has this long times the number of samples of a call, and is an error beyond.
        workers: processes for `math`. A user's function runs in one, so that its module's state survives from call to
            call. They start when first needed: never, where every answer is a plain number.

    Raises:
        UserError: unknown reward, a file or function that is missing or cannot be imported, a bad number.
    """

    def __init__(self, reward: str, timeout: float, workers: int) -> None:
        if timeout <= 0:
            raise UserError(f"reward_timeout is {timeout}; it takes seconds above 0")
        if workers < 1:
            raise UserError(f"reward_workers is {workers}; math needs at least 1 grader process")
        self.reward = reward
        self.timeout = timeout
        self.timeouts = 0  # math answers graded 0 because they took too long or too much memory
        self._user: tuple[str, str] | None = None
        if reward not in ("math", "choice", "yes_no", "exact"):
            path, function = user_reward.split_reward(reward)
            self._user = str(path), function
        self._workers = Workers(workers if self._user is None else 1, math=reward == "math")
        if self._user is not None:
            self._check_user_function()

    def check(self, problem: Problem) -> None:
        """Refuse a problem that this reward cannot grade, whatever the response; cheap, no process is asked.

        Raises:
            UserError: a gold answer that is no letter, with `choice`, or neither yes nor no, with `yes_no`. The other
                rewards take any text.
        """
        if self.reward == "choice":
            graders.gold_letter(problem)
        elif self.reward == "yes_no":
            graders.gold_yes_no(problem)

    def submit(self, problem: Problem, prompt: Sequence[Message], completions: Sequence[str]) -> Grading:
        """Start grading the responses to one prompt; returns at once.

        Args:
            problem: whose gold answer and columns the reward sees.
            prompt: the messages that were answered (in a refine step not those of the problem).
            completions: the responses' texts, without their stop tokens.

        Raises:
            UserError: see `check`. Errors of a user's function come with the result.
        """
        if self._user is not None:
            return _UserGrading(self, self._workers, self._user, problem, prompt, completions)
        if self.reward == "math":
            return _MathGrading(self, self._workers, problem, completions)
        if self.reward == "choice":
            return _Settled([graders.grade_choice(text, problem) for text in completions])
        if self.reward == "yes_no":
            return _Settled([graders.grade_yes_no(text, problem) for text in completions])
        return _Settled([graders.grade_exact(text, problem.answer) for text in completions])

    def close(self) -> None:
        """Stop the grader processes. Results not collected yet are lost."""
        self._workers.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_user_function(self) -> None:
        failure = self.load_user_function()
        if failure is not None:
            self.close()
            raise UserError(f"reward {self.reward} {failure.what}")

    def load_user_function(self) -> user_reward.Failure | None:
        """Import the user's file in the worker, so that this does not count as time of a call."""
        assert self._user is not None
        try:
            return self._workers.submit(_IMPORT_SECONDS, user_reward.load_function, *self._user).result()
        except TimeoutError:
            return user_reward.Failure(f"takes over {_IMPORT_SECONDS:.0f} s to import; do less at import")
        except WorkerDied as error:
            return user_reward.Failure(f"cannot be imported: its process ends ({error})")


class _Settled:
    def __init__(self, rewards: Sequence[float | None]) -> None:
        self._rewards = list(rewards)

    def done(self) -> bool:
        return True

    def result(self) -> list[float | None]:
        return self._rewards


class _MathGrading:
    def __init__(self, grader: Grader, workers: Workers, problem: Problem, completions: Sequence[str]) -> None:
        self._grader = grader
        self._rewards: list[float | None] = []
        self._answers: list[str] = []
        self._tasks: dict[str, Task] = {}  # one per different answer
        gold = graders.gold_answer(problem.answer)
        for text in completions:
            reward, answer = graders.grade_math(text, gold)
            self._rewards.append(reward)
            self._answers.append(answer)
            if reward is None and answer not in self._tasks:
                self._tasks[answer] = workers.submit(grader.timeout, graders.verify_math, answer, gold)

    def done(self) -> bool:
        return all(task.done() for task in self._tasks.values())

    def result(self) -> list[float | None]:
        verdicts = {answer: self._verdict(task) for answer, task in self._tasks.items()}
        self._tasks = {}
        for sample, answer in enumerate(self._answers):
            if self._rewards[sample] is None:
                self._rewards[sample] = verdicts[answer]
        return self._rewards

    def _verdict(self, task: Task) -> float:
        try:
            return float(task.result())
        except (TimeoutError, WorkerDied, MemoryError):
            self._grader.timeouts += 1
            return 0.0


class _UserGrading:
    def __init__(
        self,
        grader: Grader,
        workers: Workers,
        function: tuple[str, str],
        problem: Problem,
        prompt: Sequence[Message],
        completions: Sequence[str],
    ) -> None:
        self._grader = grader
        self._workers = workers
        self._function = function
        self._problem = problem
        self._prompt = prompt
        self._completions = completions
        self._task = self._call(completions)

    def done(self) -> bool:
        return self._task.done()

    def result(self) -> list[float | None]:
        outcome = self._outcome(self._task, len(self._completions))
        if not isinstance(outcome, user_reward.Failure):
            return outcome
        if outcome.sample is not None:
            raise self._error(outcome.what, f"sample {outcome.sample}")
        for sample, text in enumerate(self._completions):
            alone = self._outcome(self._call([text]), 1)
            if isinstance(alone, user_reward.Failure):
                raise self._error(alone.what, f"sample {sample}")
        raise self._error(outcome.what, f"samples 0 to {len(self._completions) - 1} together")

    def _call(self, completions: Sequence[str]) -> Task:
        keywords = user_reward.keyword_arguments(self._problem, self._prompt, completions)
        seconds = self._grader.timeout * len(completions)
        return self._workers.submit(seconds, user_reward.call_function, *self._function, keywords)

    def _outcome(self, task: Task, samples: int) -> list[float | None] | user_reward.Failure:
        try:
            return task.result()
        except TimeoutError:
            # The next call finds a fresh process; importing the file must not count as its time.
            self._grader.load_user_function()
            limit = self._grader.timeout * samples
            return user_reward.Failure(f"took longer than {limit:g} s (reward_timeout times {samples} samples)")
        except WorkerDied as error:
            return user_reward.Failure(f"ended its process ({error})")

    def _error(self, what: str, samples: str) -> UserError:
        return UserError(
            f"reward {self._grader.reward} {what}, on problem {self._problem.index}, {samples} (counted from 0); mend "
            "the function, or let it return None for a sample to leave out"
        )
