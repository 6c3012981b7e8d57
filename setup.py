"""Builds the C++ extensions; everything else about the packages stands in pyproject.toml.

The libraries register their ops with torch through the stable ABI (PyTorch 2.10 and later) and link no Python:
one build serves every supported Python and torch version. They are loaded with ``torch.ops.load_library``.

The CUDA kernels are built in where torch is a CUDA build, nvcc is found, and it is known which GPUs to build for: the
one of this machine, or those of the variable TORCH_CUDA_ARCH_LIST, such as "8.0;9.0".
"""

import os
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

ROOT = Path(__file__).parent
TORCH_2_10 = "0x020a000000000000"
HEADERS = (
    "csrc/*.h",
    "csrc/cpu/*.[hi]*",
    "csrc/cuda/*.h",
    "csrc/cuda/*.cuh",
    "csrc/loss/*.[hi]*",
    "csrc/layers/*.[hi]*",
)
OLDEST_GPU = (8, 0)  # compute capability; the first with bfloat16 tensor cores and asynchronous copies


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


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


def library(package: str, *sources: str, cuda: tuple[str, ...] = ()) -> Extension:
    torch_headers = [f"-isystem{path}" for path in include_paths()]  # no warnings about torch's own headers
    warnings = ["-Wall", "-Wextra", *torch_headers]
    cxx = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_2_10}", *warnings]
    kind, flags = CppExtension, {"cxx": cxx}
    if cuda and (gpus := wanted_gpus()):
        # USE_CUDA: torch's headers then declare what they have for CUDA.
        nvcc = ["-O3", "-std=c++17", *gpu_targets(gpus)]
        kind, flags = CUDAExtension, {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc}
        sources += cuda
    return kind(
        name=f"{package}._csrc",
        sources=files(*sources),
        depends=files(*HEADERS),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        py_limited_api=True,
    )


if __name__ == "__main__":
    setup(
        ext_modules=[
            library("thinktwice_fast", "csrc/*.cpp", "csrc/cpu/*.cpp", cuda=("csrc/cuda/*.cpp", "csrc/cuda/*.cu")),
            library("thinktwice_kernels", "csrc/loss/*.cpp", "csrc/layers/*.cpp"),
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
