"""What the figures were measured on: ``python -m bench.core.hardware`` prints it."""

import json
import os
import platform
import re
from typing import Any

import torch

from thinktwice_fast.cli.machine import cpu_model, gpu_driver
from thinktwice_fast.run.versions import installed_version

_PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "liger_kernel", "trl", "cut-cross-entropy", "verl"),
    "pytest-benchmark",
)

_PEAK_FLOP = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}  # dense


def describe() -> dict[str, Any]:
    """Hardware and versions; what is not there is None."""
    return {
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # over the minute before the start: of others, where the machine is shared
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": gpu_driver(),
        "cuda": torch.version.cuda,
    }


def peak_flop() -> float | None:
    """Of bfloat16 products a second by the data sheet of this GPU; None where it is not known."""
    return _PEAK_FLOP.get(short_name(torch.cuda.get_device_name())) if torch.cuda.is_available() else None


def short_name(gpu: str) -> str:
    """Of a GPU, for folders: "NVIDIA H100 80GB HBM3" is "h100"; its words up to the first with a digit."""
    words = [word for word in re.split(r"[^a-z0-9]+", gpu.lower()) if word not in ("nvidia", "geforce")]
    number = next((place for place, word in enumerate(words) if re.search(r"\d", word)), len(words))
    return "-".join(words[: number + 1])


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
