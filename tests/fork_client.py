"""Plays ``python [-u] (-m MODULE | SCRIPT) ...``: a fork of the server does the work, on this process's files.

Started by what ``forked_python`` of ``command.py`` writes, with the server's socket as the first argument. It imports
little, to start at once.
"""

import json
import os
import signal
import socket
import sys
from types import FrameType


def main(address: str, arguments: list[str]) -> int:
    """The exit status of the fork; a signal that ended it ends this process too."""
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])

        def forward(number: int, frame: FrameType | None) -> None:
            # Nobody can pass SIGKILL on: SIGUSR1 stands for it. From here on, when it has ended this process, the fork
            # is gone too; before, the fork ends once the server sees the connection closed.
            server.send(bytes([signal.SIGKILL if number == signal.SIGUSR1 else number]))

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, forward)
        answer = server.recv(16)
    if not answer:
        print("the fork server ended", file=sys.stderr)
        return 70
    status = int(answer)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
