"""SIGINT and SIGTERM: stop where nothing is lost."""

import os
import signal
import sys
from types import FrameType
from typing import Self

from thinktwice_fast import launch


class StopSignals:
    """While it is entered, a first SIGINT or SIGTERM sets ``requested``, and a second one ends the process.

    Until ``training`` is set there is nothing to save: the first one ends the process, with one line.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            self._say("stopped before the first step of this session")
            # Not by an exception: a library's import in progress may swallow it.
            os._exit(128 + number)
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True
        self._say("finishing this step, then saving; once more to stop at once")

    def _say(self, text: str) -> None:
        if launch.env_rank() == 0:
            print(text, file=sys.stderr, flush=True)
