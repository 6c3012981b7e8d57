"""A process that has imported what a run needs, and forks itself for each command that a client asks for.

The imports take most of a short run's time. It has one thread, and has used nothing of what it imported but the parser
of options.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

# What commands import sooner or later, but for datasets, whose import starts a thread. One that is missing here is
# imported by them, in their own time.
MODULES = (
    *("thinktwice_fast.run.loop", "thinktwice_fast.run.options", "thinktwice_fast.run.plan", "torch.utils.tensorboard"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "olmo3", "qwen2", "qwen3")),
    *("math_verify", "matplotlib.backends.backend_agg", "peft", "torch.distributed.run"),
)
_LARGEST = 1 << 20  # bytes of a request


def serve(listener: socket.socket) -> list[str]:
    """Fork for every request until standard input ends. Returns in the forks alone: the arguments to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in ready:
            sys.exit()
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        content, files, _, _ = socket.recv_fds(connection, _LARGEST, 3)
        if not content:
            os._exit(0)
        pid = os.fork()
        if pid:
            _supervise(pid, connection)
        connection.close()
        return _become(json.loads(content), files)


def _supervise(pid: int, connection: socket.socket) -> None:
    """Pass signals on until the process ends, and end it when the client is gone; never returns."""
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([ended, connection.fileno()], [], [])
        if ended in ready:
            break
        message = connection.recv(1)
        os.kill(pid, message[0] if message else signal.SIGKILL)
        if not message:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Take over the client's files, folder, environment and arguments."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments: list[str] = request["arguments"]
    return arguments[1:] if arguments[0] == "-u" else arguments


def run(arguments: list[str]) -> None:
    """As ``python`` runs them."""
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        sys.modules.pop(arguments[1], None)  # runpy warns of one that is imported already
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _leave(status: int) -> None:
    """End as the interpreter does, but for freeing all that was imported, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # also tells the threads of executors to end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        for name in MODULES:
            importlib.import_module(name)
        sys.modules["thinktwice_fast.run.options"].parse_command([])  # whose help texts are then read for all forks
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, "a fork has only one of its parent's threads: import less"
        gc.freeze()  # a collection would copy every page
        arguments = serve(listener)
    try:
        run(arguments)
        _leave(0)
    except SystemExit as wanted:
        if isinstance(wanted.code, str):
            print(wanted.code, file=sys.stderr)
        _leave(wanted.code if isinstance(wanted.code, int) else int(wanted.code is not None))
    except BaseException:
        traceback.print_exc()
        _leave(1)


if __name__ == "__main__":
    main()
