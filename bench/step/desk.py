"""What a trainer's process is asked for, and where in it orders come in and answers go out."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

import torch

from bench.core.memory import start_peak, status
from bench.step.cases import StepWorkload

WARM_UP = 2  # steps that nobody times: the first one is checked, which takes memory of its own
LEARNING_RATE, BETAS, CLIP = 5e-5, (0.9, 0.99), 1.0


@dataclass(frozen=True)
class Ask:
    """A worker's first line. Its first step is one to check: the answer is its errors."""

    trainer: Literal["ours", "trl"]
    workload: StepWorkload
    folder: str  # of the model
    problems: str  # file of jsonl
    cuda: bool
    phase: Literal["solve", "refine"]
    options: dict[str, Any]  # ours: of the configuration, by dotted name; TRL: of GRPOConfig

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_line(cls, line: str) -> "Ask":
        fields = json.loads(line)
        return cls(**{**fields, "workload": StepWorkload(**fields["workload"])})


class Desk:
    """Where orders come in and answers go out."""

    def __init__(self, orders: TextIO, answers: TextIO, cuda: bool):
        self._orders = orders
        self._answers = answers
        self._cuda = cuda
        self._steps = 0
        # For a trainer with memory of a GPU that is not torch's: one that gives the peak, and one to start it anew.
        self.gpu_peak: Callable[[], int] = torch.cuda.max_memory_allocated
        self.restart_gpu_peak: Callable[[], None] = torch.cuda.reset_peak_memory_stats
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
            self.restart_gpu_peak()
        else:
            start_peak()

    def _memory(self, name: str) -> int:
        if not self._cuda:
            return status(name)
        return self.gpu_peak() if torch.cuda.is_initialized() else 0
