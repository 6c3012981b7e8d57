"""Which names of torch's headers the C++ uses, and whether every torch that it is meant for has them.

``make headers`` runs this file: it fetches the headers of the oldest versions and of the newest, compiles ``csrc/`` and
``kernels/csrc/`` against each, and writes the names to ``csrc/stable_abi.txt``. ``make test`` holds them to that list.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = (ROOT / "csrc", ROOT / "kernels" / "csrc")  # the second is on the include path of the first
INCLUDES = tuple(f"-I{folder}" for folder in CSRC)
LIST = CSRC[0] / "stable_abi.txt"
VERSIONS = ("2.10.0", "2.11.0", "2.15.0")  # the oldest two, which lack the most, and the newest
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
_STABLE = ("torch/csrc/stable/**/*.h", "torch/headeronly/**/*.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FLAGS = ("-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", *INCLUDES)
_WHEEL = ("--no-deps", "--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64")


def sources(*folders: Path) -> list[Path]:
    """C++ and CUDA sources and headers, at any depth."""
    suffixes = (".cpp", ".h", ".inc", ".cu", ".cuh")
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)


def used_names(files: Sequence[Path], include: Path) -> set[str]:
    """Macros, functions and types of torch in files, and methods that its tensors of ``include`` have."""
    tensor = _text(include / "torch" / "csrc" / "stable" / "tensor_struct.h")
    methods = set(re.findall(r"\b([a-z_]\w*)\(", tensor))
    names: set[str] = set()
    for path in files:
        text = _text(path)
        names.update(re.findall(r"\b(?:STD_|STABLE_|TORCH_|AOTI_|aoti_torch_|torch_)\w+", text))
        names.update(chain.split("::")[-1] for chain in re.findall(r"\b(?:torch|c10)(?:::\w+)+", text))
        names.update(methods.intersection(re.findall(r"(?:\.|->)([a-z_]\w*)(?:<\w+>)?\(", text)))
    return names


def known_names(include: Path) -> set[str]:
    """Every name in the stable headers of a torch."""
    return {name for pattern in _STABLE for path in include.glob(pattern) for name in re.findall(r"\w+", _text(path))}


def compile_cpu_ops(include: Path) -> str:
    """The compiler's words about the CPU's sources; none if there is nothing to say."""
    files = [str(path) for path in sources(*CSRC) if path.suffix == ".cpp" and path.parent.name != "cuda"]
    return "".join(_errors(["g++", "-fsyntax-only", *_FLAGS, f"-isystem{include}", file]) for file in files)


def compile_gpu_ops(include: Path, folder: Path) -> str:
    """The same of what the GPU's kernels are called from, which leaves objects in ``folder``."""
    # For C++ nvcc is g++ with the headers of CUDA.
    command = [str(NVCC), "-DUSE_CUDA", "-Xcompiler=-Wall,-Wextra,-Werror", *_FLAGS, f"-isystem={include}"]
    files = sorted((CSRC[0] / "cuda").glob("*.cpp"))
    return "".join(_errors([*command, "-c", str(file), "-o", str(folder / f"{file.stem}.o")]) for file in files)


def _errors(command: list[str]) -> str:
    built = subprocess.run(command, capture_output=True, text=True)
    return built.stderr if built.returncode else ""


def fetch(version: str, folder: Path) -> Path:
    """The headers of a torch, from its wheel."""
    include = folder / version / "torch" / "include"
    if not include.exists():
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *_WHEEL,
            f"--dest={folder}",
            f"torch=={version}",
        ]
        subprocess.run(download, check=True)
        (wheel,) = folder.glob(f"torch-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder / version, [name for name in archive.namelist() if name.startswith("torch/include/")]
            )
        wheel.unlink()
    return include


def main() -> int:
    """Check the C++ against every version, and write the list; status 1 if a version lacks something."""
    if NVCC is None:
        print("make headers needs nvcc", file=sys.stderr)
        return 2
    folder = ROOT / "build" / "headers"
    folder.mkdir(parents=True, exist_ok=True)
    includes = {version: fetch(version, folder) for version in VERSIONS}
    used = used_names(sources(*CSRC), includes[VERSIONS[-1]])
    failed = False
    for version, include in includes.items():
        missing = sorted(used - known_names(include))
        errors = compile_gpu_ops(include, folder) + compile_cpu_ops(include)
        print(f"torch {version}: {errors or 'compiles'}{f', lacks {missing}' if missing else ''}")
        failed |= bool(errors or missing)
    if not failed:
        LIST.write_text("".join(f"{name}\n" for name in sorted(used)))
    return int(failed)


def _text(path: Path) -> str:
    return _COMMENTS.sub(" ", path.read_text())


if __name__ == "__main__":
    sys.exit(main())
