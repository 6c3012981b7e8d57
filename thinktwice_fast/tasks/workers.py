"""Killable grader processes, each with a thread of this process that waits for it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")

_START_SECONDS = 300.0  # for the imports of a new process; a user's file may load a model
_EXIT_SECONDS = 1.0  # from the end of its pipe to the end of a process
_LONGEST_WAIT = 1e6  # seconds; beyond, timers overflow
_LARGEST_MEMORY = 4 << 30  # bytes of one math worker; an answer such as 9**9**9 asks for any amount
_ORPHAN_SECONDS = 3  # how long after its time limit a worker lives on if nobody is left to stop it


class WorkerDied(Exception):
    """The process ended during a call."""


class WorkerNotStarted(Exception):
    """The process ended, or took too long, before it was ready for a call."""


class Workers:
    """A number of spawned processes. None runs before the first `submit`.

    Args:
        count: number of processes.
        prepare: what each of them runs before its first call, with ``arguments``; its time counts in no limit.
        bounded: limit their memory, and let no call outlive its time limit by much. A user's function is free to load a
            model and to use the alarm signal itself.
    """

    def __init__(self, count: int, prepare: Callable[..., object], *arguments: Any, bounded: bool) -> None:
        self._setup = bounded, prepare, arguments
        self._threads = ThreadPoolExecutor(count, "grader")
        self._own = threading.local()  # each thread's worker
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self.closed = False

    def submit(self, job: Callable[["Worker"], T]) -> "Future[T]":
        """Run ``job`` in a thread, with a worker to itself meanwhile; a cancelled future where they are stopped."""
        with self._lock:
            if not self.closed:
                return self._threads.submit(self._run, job)
        late: Future[T] = Future()
        late.cancel()
        return late

    def pids(self) -> list[int]:
        """Of the processes that live."""
        processes = [worker.process for worker in self._workers]
        return [process.pid for process in processes if process is not None and process.is_alive()]

    def stop(self) -> None:
        """Kill the processes, for good, and cancel what has not begun. Waits for no thread: any may call it."""
        with self._lock:
            self.closed = True
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.kill()

    def close(self) -> None:
        """`stop`, and wait for the threads."""
        self.stop()
        self._threads.shutdown()

    def start(self, worker: "Worker") -> None:
        """Start a worker's process, unless they are closed."""
        with self._lock:
            if self.closed:
                raise WorkerNotStarted("the grader is closed")
            worker.spawn(*self._setup)

    def _run(self, job: Callable[["Worker"], T]) -> T:
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker(self)
            with self._lock:
                self._workers.append(self._own.worker)
        return job(self._own.worker)


class Worker:
    """One process, started with its first call and anew after it ended. One thread at a time calls it."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.process: Any = None
        self._pipe: Connection | None = None

    def call(self, seconds: float, function: Callable[..., T], *arguments: Any) -> T:
        """What ``function(*arguments)`` returns in the process, which may take so many seconds (starting it aside).

        Raises:
            TimeoutError: it took too long; the process was killed.
            WorkerDied: the process ended.
            WorkerNotStarted: it could not be started.
        """
        if self.process is None:
            self._workers.start(self)
            try:
                self._receive(_START_SECONDS)
            except TimeoutError as error:
                raise WorkerNotStarted(f"its process takes over {_START_SECONDS:.0f} s to start") from error
            except WorkerDied as error:
                raise WorkerNotStarted(f"its process ends ({error})") from error
        assert self._pipe is not None
        with suppress(OSError):  # it ended since the last call: `_receive` says so
            self._pipe.send((seconds, function, arguments))
        result: T = self._receive(seconds)
        return result

    def spawn(self, *setup: Any) -> None:
        """Start the process; it reports when it is ready."""
        # Spawned, not forked: the training process holds threads and perhaps a GPU.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *setup), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        """Kill the process, from whichever thread; the call that waits for it raises `WorkerDied`."""
        if self.process is not None:
            _kill(self.process)

    def _receive(self, seconds: float) -> Any:
        assert self._pipe is not None
        try:
            if self._pipe.poll(min(seconds, _LONGEST_WAIT)):
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._end(_EXIT_SECONDS)) from error
        self._end(0.0)
        raise TimeoutError

    def _end(self, seconds: float) -> str:
        """Have the process end, by itself if it does so in this time, and say how it did."""
        process, self.process = self.process, None
        process.join(seconds)
        _kill(process)
        while process.exitcode is None:  # another thread that reaps it leaves `join` nothing to wait for
            process.join(_EXIT_SECONDS)
        status: int = process.exitcode
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def _kill(process: Any) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that a user's function started
    process.kill()


def _serve(pipe: Connection, bounded: bool, prepare: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C and a launcher's SIGTERM go to the whole process group, but training finishes its step, and needs grades.
    os.setpgrp()
    if bounded:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _limit_memory()
    else:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)
    pipe.send(None)
    with suppress(EOFError, OSError):  # nobody is left who asks
        while True:
            seconds, function, arguments = pipe.recv()
            pipe.send(_with_alarm(seconds, function, arguments) if bounded else function(*arguments))


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


def _with_alarm(seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    # Should the training process be killed, nobody is left to stop a worker that hangs, and a thread of its own would
    # not get a turn during a long operation on integers: the kernel does it.
    signal.alarm(int(seconds) + 1 + _ORPHAN_SECONDS)
    try:
        return function(*arguments)
    finally:
        signal.alarm(0)
