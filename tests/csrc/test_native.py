"""The C++ parts on their own, under the address and undefined-behaviour sanitizers, and the built library's face."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.csrc.stable_abi import CSRC, INCLUDES, sources

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")


def build_and_run(folder: Path, files: list[Path]) -> None:
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    includes = [*INCLUDES, *(f"-isystem{path}" for path in include_paths())]
    program = folder / "program"
    command = [COMPILER, *flags, "-fno-sanitize-recover=all", *includes, *map(str, files), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_block_manager_against_a_model_of_it(tmp_path: Path) -> None:
    build_and_run(tmp_path, [ROOT / "csrc" / "block_manager.cpp", HERE / "block_manager_test.cpp"])


def test_arena_over_a_driver_that_fails(tmp_path: Path) -> None:
    build_and_run(tmp_path, [ROOT / "csrc" / "cuda" / "arena.cpp", HERE / "arena_test.cpp"])


@pytest.mark.parametrize("program", ["kernels_test.cpp", "prefix_kernels_test.cpp"])
def test_kernels_of_every_instruction_set(program: str, tmp_path: Path) -> None:
    build_and_run(tmp_path, [HERE / program])


def test_no_stream_formats_a_message() -> None:
    """Built by g++ 13 and run beside a torch built by an older one, streams crashed at the first number."""
    streams = re.compile(r"<(sstream|iostream|ostream|locale)>|stringstream")
    assert not [path for path in sources(*CSRC) if streams.search(path.read_text())]


def test_library_needs_only_the_stable_abi() -> None:
    if not (nm := shutil.which("nm")):
        pytest.skip("binutils' nm is not installed")
    (library,) = (ROOT / "thinktwice_fast").glob("_csrc*.so")
    listing = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    torch_symbols = [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    assert torch_symbols
    assert not [name for name in symbols if name.startswith("Py") or "_ZN2at" in name or "_ZN3c10" in name]


def test_missing_library_is_one_clear_line(tmp_path: Path) -> None:
    package = tmp_path / "thinktwice_fast"
    shutil.copytree(ROOT / "thinktwice_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = "import thinktwice_fast.model.csrc"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ran.returncode != 0
    assert (
        ran.stderr.strip()
        .splitlines()[-1]
        .endswith("UserError: the C++ extension of thinktwice_fast is not built: run `make`")
    )
