"""How a C++ extension is built: that of this distribution, and that of the trainer, whose setup.py lies a folder above.

The libraries register their ops with torch through the stable ABI (PyTorch 2.10 and later) and link no Python:
one build serves every supported Python and torch version. They are loaded with ``torch.ops.load_library``.
"""

from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

TORCH_2_10 = "0x020a000000000000"
SOURCES, HEADERS = {".cpp", ".cu"}, {".h", ".inc", ".cuh"}


def build(package: str, *folders: str, nvcc: Sequence[str] | None = None) -> None:
    """Run setuptools in the folder of a setup.py; what is not about the extension stands in the pyproject.toml there.

    Args:
        package: what gets the extension ``_csrc``.
        folders: of its sources and their headers. The headers of csrc/common, beside this file, are every extension's.
        nvcc: flags for the CUDA sources; None: the folders hold none.
    """
    here = Path(__file__).resolve().relative_to(Path.cwd())  # setuptools takes no absolute names
    common = here.parent / "csrc" / "common"
    files = sorted(path for folder in (*map(Path, folders), common) for path in folder.iterdir())
    kind, flags = (CppExtension, {"cxx": _cxx()}) if nvcc is None else (CUDAExtension, _cuda(nvcc))
    extension = kind(
        name=f"{package}._csrc",
        sources=[str(path) for path in files if path.suffix in SOURCES],
        # When one of these changes it is built anew; a source distribution has them too.
        depends=[str(path) for path in (*files, here) if path == here or path.suffix in HEADERS],
        include_dirs=[str(Path(folder).resolve()) for folder in ("csrc", common.parent)],
        extra_compile_args=flags,
        py_limited_api=True,
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )


def _cxx() -> list[str]:
    torch_headers = [f"-isystem{path}" for path in include_paths()]  # no warnings about torch's own headers
    warnings = ["-Wall", "-Wextra", *torch_headers]
    return ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_2_10}", *warnings]


def _cuda(nvcc: Sequence[str]) -> dict[str, list[str]]:
    # USE_CUDA: torch's headers then declare what they have for CUDA.
    return {"cxx": [*_cxx(), "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++17", *nvcc]}
