"""Grading beside sampling: groups of responses are handed in as they finish and their rewards collected later."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks import graders, user_reward
from thinktwice_fast.tasks.user_reward import Failure
from thinktwice_fast.tasks.workers import Worker, WorkerDied, WorkerNotStarted, Workers

_LOOK_SECONDS = 0.2  # how often who waits for rewards looks whether something has failed
_ATTEMPTS = 2  # a worker may die of something else than its call (a signal, the kernel's memory killer)

Rewards = list[float | None]


@dataclass(frozen=True)
class _Lost(Failure):
    """A call that cost its process."""

    hung: bool = False  # past its time limit


class Grading(Protocol):
    """Rewards on their way."""

    def done(self) -> bool:
        """Whether `result` has something to give or to raise without waiting."""
        ...

    def result(self) -> Rewards:
        """Reward of each sample, in order; None leaves a sample out. Waits as long as the time limits allow.

        Raises:
            UserError: as `Grader.look`, and as soon.
        """


class Grader:
    """Grades groups of responses to one problem each.

    Args:
        reward: a name in `graders.GRADERS`, or "my_file.py:function" (see `user_reward`).
        timeout: seconds per answer. A math answer that takes longer gets 0 and is counted in `timeouts`; a user's
            function has this long times the number of samples of a call, and is an error beyond.
        workers: processes. A user's function that keeps state from call to call needs to run in one. They start when
            first needed: never, where every answer is a plain number.
        stop: called by `look`; raises where there is another reason to stop.

    Raises:
        UserError: unknown reward, a file or function that is missing or cannot be imported, a bad number.
    """

    def __init__(self, reward: str, timeout: float, workers: int, stop: Callable[[], None] = lambda: None) -> None:
        if timeout <= 0:
            raise UserError(f"reward_timeout is {timeout}; it takes seconds above 0")
        if workers < 1:
            raise UserError(f"reward_workers is {workers}; a grader needs at least 1 process")
        self.reward = reward
        self.timeout = timeout
        self.timeouts = 0  # math answers graded 0 because they took too long or too much memory
        self._stop = stop
        self._failure: UserError | None = None
        self._user: tuple[str, str] | None = None
        if reward in graders.GRADERS:
            self.workers = Workers(workers, graders.prepare, bounded=True)
            return
        path, function = user_reward.split_reward(reward)
        self._user = str(path), function
        self.workers = Workers(workers, user_reward.load_function, *self._user, bounded=False)
        self._check_user_function(*self._user)

    def check(self, problem: Problem) -> None:
        """Refuse a problem that this reward cannot grade, whatever the response; cheap, no process is asked.

        Raises:
            UserError: a gold answer that is no letter, with `choice`, or neither yes nor no, with `yes_no`. The other
                rewards take any text.
        """
        if self._user is None:
            graders.GRADERS[self.reward].check(problem)

    def submit(self, problem: Problem, prompt: Sequence[Message], completions: Sequence[str]) -> Grading:
        """Start grading the responses to one prompt; returns at once.

        Args:
            problem: whose gold answer and columns the reward sees.
            prompt: the messages that were answered (in a refine step not those of the problem).
            completions: the responses' texts, without their stop tokens.

        Raises:
            UserError: see `check` and `look`.
        """
        self.look()
        if self._user is not None:
            return _UserGrading(self, self._user, problem, prompt, completions)
        return _BuiltInGrading(self, graders.GRADERS[self.reward], problem, completions)

    def look(self) -> None:
        """Raise what has failed since grading began, in whichever call; cheap, to be called while others work.

        Raises:
            UserError: a user's function raised, returned something else than rewards, took too long, or ended its
                process; or no process can be started. Nothing is graded after that.
        """
        if self._failure is not None:
            raise self._failure
        self._stop()

    def wait(self, futures: Iterable["Future[Any]"]) -> None:
        """Until they are done; raises as `look`."""
        waiting = set(futures)
        while waiting:
            waiting = wait(waiting, _LOOK_SECONDS).not_done
            self.look()
            assert not self.workers.closed, "the grader is closed"

    def fail(self, what: str) -> None:
        """From a worker's thread: have everybody who waits or looks raise this, and stop the other processes."""
        if not self.workers.closed:
            self._failure = UserError(f"reward {self.reward} {what}")
            self.workers.stop()

    def close(self) -> None:
        """Stop the grader processes. Results not collected yet are lost."""
        self.workers.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_user_function(self, path: str, function: str) -> None:
        def load(worker: Worker) -> Failure | None:
            try:
                return worker.call(self.timeout, user_reward.load_function, path, function)
            except WorkerNotStarted as error:
                return Failure(f"cannot be imported: {error}")

        failure = self.workers.submit(load).result()
        if failure is not None:
            self.close()
            raise UserError(f"reward {self.reward} {failure.what}")


class _BuiltInGrading:
    def __init__(self, grader: Grader, built_in: graders.BuiltIn, problem: Problem, completions: Sequence[str]) -> None:
        self._grader = grader
        self._verify = built_in.verify
        self._grades = [built_in.grade(text, problem) for text in completions]
        self._verdicts: dict[graders.Doubt, Future[bool | None]] = {}  # one per different answer
        for grade in self._grades:
            if isinstance(grade, graders.Doubt) and grade not in self._verdicts:
                self._verdicts[grade] = grader.workers.submit(partial(self._verdict, grade))

    def done(self) -> bool:
        return all(verdict.done() for verdict in self._verdicts.values())

    def result(self) -> Rewards:
        if self._verdicts:
            self._grader.wait(self._verdicts.values())
            verdicts = {doubt: verdict.result() for doubt, verdict in self._verdicts.items()}
            self._verdicts = {}
            self._grader.timeouts += list(verdicts.values()).count(None)
            self._grades = [
                float(verdicts[grade] or False) if isinstance(grade, graders.Doubt) else grade for grade in self._grades
            ]
        return [grade for grade in self._grades if not isinstance(grade, graders.Doubt)]

    def _verdict(self, doubt: graders.Doubt, worker: Worker) -> bool | None:
        """None: it takes too long or too much memory."""
        assert self._verify is not None
        for _ in range(_ATTEMPTS):
            try:
                return worker.call(self._grader.timeout, self._verify, *doubt)
            except TimeoutError:
                break
            except WorkerDied:
                pass
            except WorkerNotStarted as error:
                self._grader.fail(f"cannot be computed: {error}")
                break
        return None


class _UserGrading:
    def __init__(
        self,
        grader: Grader,
        function: tuple[str, str],
        problem: Problem,
        prompt: Sequence[Message],
        completions: Sequence[str],
    ) -> None:
        self._grader = grader
        self._function = function
        self._problem = problem
        self._prompt = prompt
        self._completions = completions
        self._rewards = grader.workers.submit(self._grade)

    def done(self) -> bool:
        return self._rewards.done()

    def result(self) -> Rewards:
        self._grader.wait([self._rewards])
        return self._rewards.result()

    def _grade(self, worker: Worker) -> Rewards:
        outcome = self._outcome(worker)
        if not isinstance(outcome, Failure):
            return outcome
        samples = f"sample {outcome.sample}"
        if outcome.sample is None:
            samples = f"samples 0 to {len(self._completions) - 1} together"
        self._grader.fail(
            f"{outcome.what}, on problem {self._problem.index}, {samples} (counted from 0); mend the function, or let "
            "it return None for a sample to leave out"
        )
        return []

    def _outcome(self, worker: Worker) -> Rewards | Failure:
        """Where the call costs its process, each sample is tried alone, which again takes the call's time at most."""
        whole = self._call(worker, self._completions)
        if not isinstance(whole, _Lost):
            return whole
        if whole.hung and len(self._completions) == 1:
            return replace(whole, sample=0)
        for sample, text in enumerate(self._completions):
            alone = self._call(worker, [text])
            if isinstance(alone, Failure):
                return replace(alone, sample=sample)
        return whole if whole.hung else self._call(worker, self._completions)

    def _call(self, worker: Worker, completions: Sequence[str]) -> Rewards | Failure:
        limit = self._grader.timeout * len(completions)
        keywords = user_reward.keyword_arguments(self._problem, self._prompt, completions)
        try:
            return worker.call(limit, user_reward.call_function, *self._function, keywords, limit)
        except TimeoutError:
            what = f"took longer than {limit:g} s (reward_timeout times {len(completions)} samples)"
            return _Lost(what, hung=True)
        except WorkerDied as error:
            return _Lost(f"ended its process ({error})")
        except WorkerNotStarted as error:
            return Failure(f"cannot be imported again: {error}")
