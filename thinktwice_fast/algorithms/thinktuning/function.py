"""A teacher that is a function in the user's file, in a process of its own that can be killed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self

from thinktwice_fast.algorithms.thinktuning.teacher import Answer, FeedbackRequest
from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.user_reward import Failure
from thinktwice_fast.tasks.user_teacher import call_teacher, load_teacher
from thinktwice_fast.tasks.workers import Worker, WorkerDied, WorkerNotStarted, Workers

_IMPORT_SECONDS = 300.0  # for a user's file, which may load a model


class FunctionTeacher:
    """Calls the function for one response after another, each with a time limit.

    Args:
        teacher: ``my_file.py:function``, see `user_teacher`.
        timeout: seconds for one answer. A call that takes longer costs the process, and the next one a new import.

    Raises:
        UserError: a file or function that is missing or cannot be imported.
    """

    def __init__(self, teacher: str, timeout: float):
        file, _, name = teacher.rpartition(":")
        if not Path(file).is_file():
            raise UserError(
                f"--thinktuning.teacher {teacher}: no file {file}; give its path relative to the current folder"
            )
        self._function = str(Path(file).resolve()), name
        self._timeout = timeout
        self._workers = Workers(1, load_teacher, *self._function, bounded=False)
        failure = self._workers.submit(self._load).result()
        if failure is not None:
            self._workers.close()
            raise UserError(f"--thinktuning.teacher {teacher} {failure.what}")

    def ask(self, asked: Sequence[FeedbackRequest]) -> list[Answer]:
        """See ``Teacher``."""
        calls = [self._workers.submit(partial(self._answer, one)) for one in asked]
        return [call.result() for call in calls]

    def _answer(self, asked: FeedbackRequest, worker: Worker) -> Answer:
        try:
            answer = worker.call(self._timeout, call_teacher, *self._function, asked.question, asked.response)
        except TimeoutError:
            return _unanswered(f"took longer than {self._timeout:g} s")
        except (WorkerDied, WorkerNotStarted) as error:
            return _unanswered(f"ended its process ({error})")
        if isinstance(answer, Failure):
            return _unanswered(answer.what)
        return _unanswered("returned None") if answer is None else Answer(answer)

    def _load(self, worker: Worker) -> Failure | None:
        try:
            return worker.call(_IMPORT_SECONDS, load_teacher, *self._function)
        except (TimeoutError, WorkerDied, WorkerNotStarted) as error:
            return Failure(f"cannot be imported: {error or 'it takes too long'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()


def _unanswered(what: str) -> Answer:
    return Answer(refusal="unanswered", detail=f"the function {what}")
