"""A trainer that does one step for each line on stdin, and answers with a line of JSON on stdout.

``python -m bench.step_worker``. First line in: the fields of ``step_process.Ask``, unanswered. It ends with its stdin.
While it waits it does nothing, so that trainers can take turns.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from bench.memory import start_peak, status
from bench.step_process import WARM_UP, read_ask


class Desk:
    """Where orders come in and answers go out."""

    def __init__(self, orders: TextIO, answers: TextIO, cuda: bool):
        self._orders = orders
        self._answers = answers
        self._cuda = cuda
        self._steps = 0
        self.imports = self._memory("VmRSS")

    def wait(self) -> bool:
        """Until a step is ordered; False when there will be no more."""
        if self._steps == WARM_UP:
            self._start_peak()
        self._steps += 1
        return bool(self._orders.readline())

    @property
    def checking(self) -> bool:
        """The step that was ordered is the first one."""
        return self._steps == 1

    def report(self, seconds: Mapping[str, float], completions: int, tokens: int) -> None:
        """Seconds by part, and what was drawn."""
        memory = {"peak": self._memory("VmHWM"), "imports": self.imports}
        self.answer(dict(seconds) | {"completions": completions, "tokens": tokens} | memory)

    def answer(self, fields: Mapping[str, Any]) -> None:
        print(json.dumps(fields), file=self._answers, flush=True)

    def _start_peak(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            start_peak()

    def _memory(self, name: str) -> int:
        if not self._cuda:
            return status(name)
        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a trainer prints is no answer
    ask = read_ask(sys.stdin.readline())
    trainer = importlib.import_module(f"bench.step_{ask.trainer}")
    trainer.train(ask, Desk(sys.stdin, answers, ask.cuda))


if __name__ == "__main__":
    main()
