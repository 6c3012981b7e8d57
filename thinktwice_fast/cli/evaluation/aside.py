"""A thread for what nobody waits for: writing and grading, while the engine computes without the interpreter."""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Self

_Job = tuple[Callable[..., object], tuple[Any, ...]]


class Aside:
    """Does jobs one after another, in the order in which they come; a context manager that ends when all are done.

    Args:
        often: done between jobs, and every so many seconds without any.
        seconds: how many.
    """

    def __init__(self, often: Callable[[], None], seconds: float):
        self._often = often
        self._seconds = seconds
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="aside", daemon=True)

    def put(self, job: Callable[..., object], *arguments: Any) -> None:
        """Have ``job(*arguments)`` done."""
        self._jobs.put((job, arguments))

    def look(self) -> None:
        """Raise what a job raised; nothing is done after that."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self.look()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._seconds)
            except Empty:
                job = (self._often, ())
            if job is None:
                return
            if self._error is not None:
                continue
            try:
                do, arguments = job
                do(*arguments)
                self._often()
            except BaseException as error:
                self._error = error
