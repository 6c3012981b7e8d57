"""Builds the C++ extensions; everything else about the packages stands in pyproject.toml.

The libraries register their ops with torch through the stable ABI (PyTorch 2.10 and later) and link no Python:
one build serves every supported Python and torch version. They are loaded with ``torch.ops.load_library``.
"""

from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent
TORCH_2_10 = "0x020a000000000000"
HEADERS = ("csrc/*.h", "csrc/cpu/*.[hi]*", "csrc/loss/*.[hi]*")


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def library(package: str, *sources: str) -> Extension:
    return CppExtension(
        name=f"{package}._csrc",
        sources=files(*sources),
        depends=files(*HEADERS),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[
            *("-O3", "-g0", "-std=c++17", "-Wall", "-Wextra"),
            f"-DTORCH_TARGET_VERSION={TORCH_2_10}",
            *(f"-isystem{path}" for path in include_paths()),  # no warnings about torch's own headers
        ],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        library("thinktwice_fast", "csrc/*.cpp", "csrc/cpu/*.cpp"),
        library("thinktwice_kernels", "csrc/loss/*.cpp"),
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
