"""Process groups for tests: this process alone, or two under torchrun."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.command import ROOT, quick_start
from thinktwice_fast import parallel

_SECONDS = 120  # that the two processes may take


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    parallel.start(torch.device("cpu"), 60.0)
    yield
    dist.destroy_process_group()


def run_in_two(module: str, folder: Path, processes: int = 2) -> Any:
    """Run ``module`` in two (or so many) processes with ``folder`` as its argument; what rank 0 saved with `save`."""
    count = ["--nproc-per-node", str(processes)]
    python, own = quick_start()
    command = [python, "-m", "torch.distributed.run", "--standalone", *count, "-m", module]
    done = subprocess.run(
        [*command, str(folder)],
        env=own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "result.pt", weights_only=False)


def save(result: Any, folder: Path) -> None:
    """Rank 0 writes what its test reads. Collective."""
    if parallel.rank() == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
