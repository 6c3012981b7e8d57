"""A process that answers questions over stdin and stdout, a line of JSON each, and waits without working in between."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SECONDS_TO_END = 10  # by itself, once its stdin has ended


def python() -> str:
    """What starts modules of this project in processes of their own; PYTHON_EXEC in place of it, as for torchrun."""
    return os.environ.get("PYTHON_EXEC", sys.executable)


class LineProcess:
    """Lives as long as this object.

    Args:
        name: for error messages.
        command: program and arguments.
        log: file for what it writes to stderr.
        environment: all of its variables.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self._name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=dict(environment),
            )
        weakref.finalize(self, _end, self._process)

    def tell(self, question: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def hear(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the process ended; with the last line that it wrote to stderr.
        """
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._ended()
        return json.loads(answer)

    def ask(self, question: Mapping[str, Any]) -> Any:
        self.tell(question)
        return self.hear()

    def _ended(self) -> RuntimeError:
        self._process.wait()  # its last words are in the log then
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return RuntimeError(f"{self._name} ended: {''.join(last) or 'without a word'}")


def _end(process: "subprocess.Popen[str]") -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
