"""Running the real command as a user does, in a process of its own."""

import atexit
import functools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "thinktwice_fast" / "train.py"
DATA = ROOT.parent / "shared" / "data"
LIMIT = 300  # seconds that any command may take


def environment(gpus: str = "", threads: int = 1) -> dict[str, str]:
    """No GPU but those named, no hub, and as many threads as said, so that results do not depend on the machine."""
    # A pytest that a test starts is no worker of the one that runs the test.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return own | {
        "CUDA_VISIBLE_DEVICES": gpus,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


@functools.cache
def forked_python(environment: tuple[tuple[str, str], ...]) -> str:
    """An executable that takes ``[-u] (-m MODULE | SCRIPT) ARGUMENT...`` and runs them as ``python`` does.

    Each command is a fork of a server that has imported, under ``environment``, what a run needs: the imports take most
    of a short run's time. The server starts with the first call and ends with this process.
    """
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    address, client, here = folder / "socket", folder / "python", Path(__file__).parent
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen(64)  # clients that come while it imports
        server = subprocess.Popen(
            [sys.executable, str(here / "fork_server.py"), str(listener.fileno())],
            env=dict(environment),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    atexit.register(_end, server, folder)
    command = shlex.join([sys.executable, "-IS", str(here / "fork_client.py"), str(address)])
    client.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    client.chmod(0o755)
    return str(client)


def _end(server: "subprocess.Popen[bytes]", folder: Path) -> None:
    try:
        server.communicate(timeout=60)  # its standard input ends
    except subprocess.TimeoutExpired:
        server.kill()
    shutil.rmtree(folder)


def quick_start() -> tuple[str, dict[str, str]]:
    """What to start commands with that are run again and again: a `forked_python`, and the environment for it.

    torchrun starts its processes with it too. Where the system lacks what it takes, or has a GPU, this is Python
    itself: CUDA does not live on in a fork of a process that has so much as counted the GPUs.
    """
    own = environment()
    if not hasattr(os, "pidfd_open") or torch.cuda.is_available():
        return sys.executable, own
    python = forked_python(tuple((name, value) for name, value in own.items() if name != "PYTEST_CURRENT_TEST"))
    return python, own | {"PYTHON_EXEC": python}


def train(
    *arguments: str | Path,
    processes: int = 0,
    cwd: Path = ROOT,
    gpus: str = "",
    threads: int = 1,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``python train.py ...``, or with ``processes`` under torchrun.

    It is started quickly (see `quick_start`) unless it is to be ``fresh``, to have more than one thread, or to see or
    ask for a GPU.
    """
    forked = not (fresh or gpus or threads > 1 or "cuda" in arguments)
    python, own = quick_start() if forked else (sys.executable, environment(gpus, threads))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    return subprocess.run(
        [python, *launcher, str(TRAIN), *map(str, arguments)],
        env=own,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
