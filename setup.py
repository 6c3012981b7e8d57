"""Builds the C++ extension (csrc/); everything else about the package stands in pyproject.toml.

The CUDA kernels are built in where torch is a CUDA build, nvcc is found, and it is known which GPUs to build for: the
one of this machine, or those of the variable TORCH_CUDA_ARCH_LIST, such as "8.0;9.0".
"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from native_build import build

OLDEST_GPU = (8, 0)  # compute capability; the first with bfloat16 tensor cores and asynchronous copies


def wanted_gpus() -> str | None:
    """Compute capabilities to build the CUDA kernels for, as of TORCH_CUDA_ARCH_LIST; None: build none."""
    if torch.version.cuda is None or CUDA_HOME is None:
        return None
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST_GPU:
        return "{}.{}".format(*torch.cuda.get_device_capability())
    return None


def gpu_targets(capabilities: str) -> list[str]:
    """nvcc's flags for machine code of each capability and, of the last, PTX, which later GPUs compile."""
    numbers = [part.removesuffix("+PTX").replace(".", "") for part in capabilities.replace(";", " ").split()]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    last = numbers[-1].rstrip("af")
    return [*targets, f"-gencode=arch=compute_{last},code=compute_{last}"]


if __name__ == "__main__":
    sources = ["csrc", "csrc/cpu"]
    if gpus := wanted_gpus():
        build("thinktwice_fast", *sources, "csrc/cuda", nvcc=gpu_targets(gpus))
    else:
        build("thinktwice_fast", *sources)
