"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

The library registers its ops with torch through the stable ABI (PyTorch 2.10 and later) and links no Python:
one build serves every supported Python and torch version. It is loaded with ``torch.ops.load_library``.
"""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent
TORCH_2_10 = "0x020a000000000000"

library = CppExtension(
    name="thinktwice_fast._csrc",
    sources=sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]),
    depends=sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.[hi]*")]),
    include_dirs=[str(ROOT / "csrc")],
    extra_compile_args=[
        *("-O3", "-g0", "-std=c++17", "-Wall", "-Wextra"),
        f"-DTORCH_TARGET_VERSION={TORCH_2_10}",
        *(f"-isystem{path}" for path in include_paths()),  # no warnings about torch's own headers
    ],
    py_limited_api=True,
)

setup(
    ext_modules=[library],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
