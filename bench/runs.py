"""Many runs of the real command, two at a time, that can be stopped and resumed."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.run.progress import clock

Options = Mapping[str, str | int | float]
"""Of the command, name by name."""

SIDE_BY_SIDE = 2  # runs, of one thread each: two threads of one run gain less
_OPTIONS, _FINISHED = "options.json", "finished"


@dataclass(frozen=True)
class Run:
    """One run of ``train.py``, in a folder of its own.

    Args:
        folder: where it writes; its name is what progress calls it.
        options: of the command, without ``--output`` and ``--resume``.
        threads: of its process.
    """

    folder: Path
    options: Options
    threads: int = 1

    def arguments(self) -> list[str]:
        """What the command gets."""
        options = [argument for name, value in self.options.items() for argument in (f"--{name}", str(value))]
        return [*options, "--output", str(self.folder), "--resume", "auto"]

    def finished(self) -> bool:
        """Whether it ended, with these options."""
        return (self.folder / _FINISHED).exists() and self._as_before()

    def records(self) -> list[Record]:
        """Its metrics."""
        return read_metrics(self.folder / "metrics.jsonl")

    def train(self) -> None:
        """Run it to its end, from its newest checkpoint if it has one with these options.

        Raises:
            RuntimeError: it failed; the text is the end of what it printed.
        """
        if not self._as_before():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _OPTIONS).write_text(json.dumps(self.arguments()))
        log = self.folder / "log.txt"
        command = [sys.executable, str(ROOT / "thinktwice_fast" / "train.py"), *self.arguments()]
        # No GPU: figures are of CPU cores, wherever they are made.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(self.threads)}
        with log.open("a") as file:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        if done.returncode:
            last = log.read_text().strip().rpartition("\n")[2]  # empty where it was killed before it said anything
            raise RuntimeError(f"{self.folder}: ended with status {done.returncode}: {last}")
        (self.folder / _FINISHED).touch()

    def _as_before(self) -> bool:
        path = self.folder / _OPTIONS
        return path.exists() and json.loads(path.read_text()) == self.arguments()


def train_all(runs: Sequence[Run], side_by_side: int = SIDE_BY_SIDE) -> None:
    """Bring every run to its end, in this order; those that ended before are not repeated.

    Prints a line for each, with the time that is about left.

    Raises:
        RuntimeError: one failed; those under way end first, and those that had not begun don't begin.
    """
    started = time.monotonic()
    left = [run for run in runs if not run.finished()]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before", flush=True)

    durations: list[float] = []  # of the runs that ended

    def train(run: Run) -> None:
        began = time.monotonic()
        run.train()
        durations.append(time.monotonic() - began)
        seconds = _seconds_left(durations, len(left) - len(durations), side_by_side)
        progress = f"{len(durations)} of {len(left)}, about {clock(seconds)} left"
        print(f"{clock(time.monotonic() - started)}  {run.folder.name}  ({progress})", flush=True)

    with ThreadPoolExecutor(side_by_side) as threads:
        futures = [threads.submit(train, run) for run in left]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def _seconds_left(durations: Sequence[float], left: int, side_by_side: int) -> float:
    """Of so many runs, if those that are under way are half done."""
    under_way = min(side_by_side - 1, left)
    return statistics.mean(durations) * (left - under_way / 2) / side_by_side
