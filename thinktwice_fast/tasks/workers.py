"""Killable grader processes: a pebble pool that starts with its first task and is started anew when it breaks."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from thinktwice_fast.errors import one_line
from thinktwice_fast.tasks.graders import prepare_math_verify

_LARGEST_MEMORY = 4 << 30  # bytes of one math worker; an answer such as 9**9**9 asks for any amount
_ATTEMPTS = 2  # a worker may die of something else than its task (a signal, the kernel's memory killer)
_LOOK_SECONDS = 1.0  # how often a wait looks whether the pool still lives
_ORPHAN_SECONDS = 3  # how long after its time limit a worker lives on if nobody is left to stop it


class Workers:
    """A pool of spawned processes. None runs before the first `submit`.

    Args:
        count: number of processes.
        math: prepare them for math-verify, limit their memory, and let no task outlive its time limit by much. A user's
            function is free to load a model and to use the alarm signal itself.
    """

    def __init__(self, count: int, math: bool) -> None:
        self._count = count
        self.math = math
        self._pool: Any = None
        self._closed = False

    def submit(self, seconds: float, function: Callable[..., Any], *args: Any) -> "Task":
        """Run ``function(*args)`` in a worker for at most ``seconds``, counted from when a worker begins with it."""
        return Task(self, seconds, function, args)

    def live_pool(self) -> Any:
        """The pebble pool, started (again) where none is alive."""
        assert not self._closed, "the grader is closed"
        if self._pool is not None and not self._pool.active:
            self._stop()
        if self._pool is None:
            self._pool = self._new_pool()
        return self._pool

    def close(self) -> None:
        """Kill the processes, for good; what they had not finished is lost."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def _new_pool(self) -> Any:
        import pebble

        # Spawned, not forked: the training process holds threads and perhaps a GPU.
        context = multiprocessing.get_context("spawn")
        return pebble.ProcessPool(
            max_workers=self._count, context=context, initializer=_prepare_worker, initargs=(self.math,)
        )


class WorkerDied(Exception):
    """The processes that tried a task ended during it."""


class Task:
    """One call in a worker, made once more where the worker dies or the pool breaks."""

    def __init__(self, workers: Workers, seconds: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._workers = workers
        self._seconds = seconds
        self._function: Callable[..., Any] = function
        self._args = args
        if workers.math:
            self._function, self._args = _run_with_alarm, (int(seconds) + 1 + _ORPHAN_SECONDS, function, args)
        self._schedule()

    def done(self) -> bool:
        """Whether `result` has something to give or to try again, without waiting."""
        return bool(self._future.done()) or not self._pool.active

    def result(self) -> Any:
        """What the function returned.

        Raises:
            TimeoutError: it took too long; its worker is dead.
            WorkerDied: its worker died, twice.
        """
        import pebble

        for attempt in range(_ATTEMPTS):
            if attempt:
                self._schedule()
            try:
                # A pool that breaks forgets what still stood in its queue, so waiting for the future alone could hang.
                while not wait([self._future], _LOOK_SECONDS).done:
                    if not self._pool.active:
                        raise BrokenProcessPool("the grader processes ended")
                return self._future.result()
            except (pebble.ProcessExpired, BrokenProcessPool, CancelledError) as error:
                died = error
        raise WorkerDied(one_line(died)) from died

    def _schedule(self) -> None:
        self._pool = self._workers.live_pool()
        self._future = self._pool.schedule(self._function, args=self._args, timeout=self._seconds)


def _prepare_worker(math: bool) -> None:
    # Ctrl-C and a launcher's SIGTERM go to the whole process group, but training finishes its step, and needs grades.
    os.setpgrp()
    # A long operation on integers would never reach a handler written in Python.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if math:
        _limit_memory()
        prepare_math_verify()
    else:
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = _LARGEST_MEMORY if hard == resource.RLIM_INFINITY else min(_LARGEST_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _run_with_alarm(seconds: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Should the training process be killed, nobody is left to stop a worker that hangs, and a thread of its own would
    # not get a turn during a long operation on integers: the kernel does it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        return function(*args)
    finally:
        signal.alarm(0)
