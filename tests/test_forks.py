"""What stands in for ``python`` in tests behaves as it does: streams, status, folder, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import LIMIT, quick_start, train

SCRIPT = """
import os, signal, sys, time
assert __name__ == "__main__" and sys.path[0] == os.path.dirname(sys.argv[0])
print(os.getpid(), os.getcwd(), os.environ["ONE"], *sys.argv[1:], "torch" in sys.modules, flush=True)
if sys.argv[1] == "waits":
    time.sleep(600)
elif sys.argv[1] == "handles":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
    print(flush=True)
    time.sleep(600)
print("an error", file=sys.stderr)
raise {"exits": SystemExit(3), "says": SystemExit("why"), "raises": ValueError("what")}[sys.argv[1]]
"""


def start(folder: Path, what: str) -> "subprocess.Popen[str]":
    script = folder / "script.py"
    script.write_text(SCRIPT)
    python, own = quick_start()
    if python == sys.executable:
        pytest.skip("there are no forks here")
    command, pipe = [python, str(script), what], subprocess.PIPE
    return subprocess.Popen(command, env=own | {"ONE": "1"}, cwd=folder, text=True, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize(
    ("what", "status", "error"), [("exits", 3, ""), ("says", 1, "why"), ("raises", 1, "ValueError: what")]
)
def test_streams_status_and_surroundings(what: str, status: int, error: str, tmp_path: Path) -> None:
    process = start(tmp_path, what)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == status
    assert out.split()[1:] == [str(tmp_path), "1", what, "True"]
    assert err.splitlines()[0] == "an error" and err.splitlines()[-1].endswith(error)


def test_a_signal_reaches_the_handler(tmp_path: Path) -> None:
    process = start(tmp_path, "handles")
    assert process.stdout is not None
    process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 5


@pytest.mark.parametrize(("sent", "status"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGKILL"), ("SIGKILL", "SIGKILL")])
def test_the_fork_ends_with_what_started_it(sent: str, status: str, tmp_path: Path) -> None:
    process = start(tmp_path, "waits")
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[0])
    process.send_signal(signal.Signals[sent])
    assert process.wait(LIMIT) == -signal.Signals[status]
    deadline = time.monotonic() + (LIMIT if sent == "SIGKILL" else 0)  # which its client could not wait for
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    ("gpu", "arguments"), [(True, ("--model.device", "cpu")), (True, ()), (False, ("--model.device", "cuda"))]
)
def test_nothing_that_could_use_cuda_is_forked(
    gpu: bool, arguments: tuple[str, ...], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], **rest: Any) -> None:
        started.append((command, env))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(subprocess, "run", run)
    train(*arguments, processes=processes)
    ((command, own),) = started
    assert command[0] == sys.executable and "PYTHON_EXEC" not in own


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
