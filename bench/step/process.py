"""A trainer's processes, which do one step each time they are told to, and how they are checked and read.

``worker.py`` is what runs in them.
"""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import ROOT
from bench.core.contender import Contender, Outputs
from bench.core.process import LineProcess, python
from bench.core.stats import median
from bench.step.cases import StepBatch
from bench.step.desk import WARM_UP, Ask

PARTS = ("rollout", "grading", "update", "rest")
UPDATE_RATE = "update TFLOP/s"  # among a step's details
_LOGS = Path("build/bench")


@dataclass
class StepProcess:
    """As many processes as asked for, which are one trainer."""

    workers: list[LineProcess]
    answers: list[dict[str, float]] = field(default_factory=list)  # of the timed steps

    def step(self) -> dict[str, Any]:
        """Do one; the first process's answer.

        Raises:
            RuntimeError: a process ended.
        """
        for worker in self.workers:
            worker.tell({})
        answers = [worker.hear() for worker in self.workers]
        return answers[0]


@dataclass(frozen=True)
class Trained:
    """A contender: a trainer with these options; called, it does a step.

    Args:
        processes: how many, with ``threads`` each; 0 threads: as many as here.
    """

    trainer: Literal["ours", "trl"] = "ours"
    options: tuple[tuple[str, Any], ...] = ()
    phase: Literal["solve", "refine"] = "solve"
    processes: int = 1
    threads: int = 0

    def __call__(self, batch: StepBatch) -> Outputs:
        process: StepProcess = batch.kept[self]
        answer = process.step()
        wanted = batch.workload.sequences, batch.workload.tokens
        if (answer["completions"], answer["tokens"]) != wanted:
            raise RuntimeError(f"{answer['completions']} completions of {answer['tokens']} tokens, not {wanted}")
        process.answers.append(answer)
        return {}

    def start(self, batch: StepBatch) -> dict[str, float]:
        """Errors of a first step; then the process is ready to be timed."""
        process = batch.kept[self] = self._process(batch)
        errors: dict[str, float] = process.step()
        for _ in range(WARM_UP - 1):
            process.step()
        return errors

    def _process(self, batch: StepBatch) -> StepProcess:
        on_gpu, folder, problems = batch.device.type == "cuda", str(batch.folder), str(batch.problems)
        ask = Ask(self.trainer, batch.workload, folder, problems, on_gpu, self.phase, dict(self.options))
        command = [python(), "-m", "bench.step.worker"]
        workers, port = [], _free_port()
        for rank in range(self.processes):
            log = _LOGS / f"step-{self.trainer}-{rank}.log"
            workers.append(LineProcess(self.trainer, command, log, self._environment(batch.device, rank, port)))
            workers[-1].tell(ask.as_dict())
        return StepProcess(workers)

    def _environment(self, device: torch.device, rank: int, port: int) -> dict[str, str]:
        """Threads that wait do not spin, and nothing comes from a hub."""
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self.threads or torch.get_num_threads()),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        if device.type == "cpu":
            own["CUDA_VISIBLE_DEVICES"] = ""
        if self.processes > 1:
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
        return own


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def judge(batch: StepBatch, contender: Contender) -> dict[str, float]:
    """The errors that ``truth.errors`` finds in a first step."""
    return trainer_of(contender).start(batch)


def memory(batch: StepBatch, contender: Contender) -> int:
    """Bytes at the peak of the timed steps, of the largest process: all that is resident, or on a GPU allocated."""
    return int(max(answer["peak"] for answer in _timed(batch, contender)))


def details(batch: StepBatch, contender: Contender) -> dict[str, float]:
    """Seconds by part and rates, medians over the timed steps."""
    answers = _timed(batch, contender)
    seconds = {name: median([answer[name] for answer in answers]) for name in PARTS}
    whole = median([sum(answer[name] for name in PARTS) for answer in answers])
    # What is skipped, and longer prompts, are not in its count.
    counted = batch.workload.reward == "mixed" and trainer_of(contender).phase == "solve"
    return {
        **{f"{name} s": value for name, value in seconds.items()},
        "generations/s": batch.workload.sequences / whole,
        **({UPDATE_RATE: batch.flop.update / seconds["update"] / 1e12} if counted else {}),
        "MiB above imports": (memory(batch, contender) - answers[-1]["imports"]) / 2**20,
    }


def trainer_of(contender: Contender) -> Trained:
    assert isinstance(contender.run, Trained)
    return contender.run


def _timed(batch: StepBatch, contender: Contender) -> list[dict[str, float]]:
    process: StepProcess = batch.kept[trainer_of(contender)]
    return process.answers
