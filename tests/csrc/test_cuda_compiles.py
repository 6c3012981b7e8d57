"""The CUDA sources compile without a GPU, for several generations of them, and their kernels fit the registers."""

import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

from tests.csrc.stable_abi import (
    CSRC,
    INCLUDES,
    LIST,
    NVCC,
    VERSIONS,
    compile_gpu_ops,
    known_names,
    sources,
    used_names,
)

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
INCLUDE = Path(include_paths()[0])
GPUS = ["80", "90a", "100"]  # compute capabilities
# What torch's build adds for every CUDA source.
TORCH_MACROS = [
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
FAMILIES = (
    "advance", "list_parts", "parts", "merge", "prefill", "sample_max", "sample_cut", "sample_race", "sample_finish",
    "write_kv", "rotary_write_kv", "copy_blocks",
)  # fmt: skip
BLOCK_REGISTERS = 65536  # of a multiprocessor, for all threads of its blocks

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


class Kernel(NamedTuple):
    """What ptxas says of one kernel for one GPU."""

    gpu: str
    name: str
    registers: int
    shared: int  # bytes, without what a launch adds
    spilled: int  # bytes stored and loaded


def compile_source(source: Path, folder: Path) -> str:
    targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings", *INCLUDES, *TORCH_MACROS, *targets]
    command = [str(NVCC), "-c", *flags, str(source), "-o", str(folder / f"{source.stem}.o")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return built.stdout + built.stderr


def kernels(log: str) -> Iterator[Kernel]:
    pattern = (
        r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<gpu>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    )
    for found in re.finditer(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spilled = int(found["stores"]) + int(found["loads"])
        yield Kernel(found["gpu"], found["name"], int(found["registers"]), int(shared[1]) if shared else 0, spilled)


def readable(names: list[str]) -> list[str]:
    """The kernels' names as they stand in the sources."""
    if not (filt := shutil.which("c++filt")):
        return names
    text = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = re.compile(r"thinktwice::gpu::|\(anonymous namespace\)::|^void |\([^()]*\)$")
    return [plain.sub("", line.replace("(anonymous namespace)::", "")) for line in text.splitlines()]


def threads(name: str) -> int:
    """Of a block."""
    return 512 if "sample_cut" in name else 256 if re.search("rotary|sample|list_parts", name) else 128


def test_every_kernel_compiles_and_spills_no_registers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda source: compile_source(source, tmp_path), SOURCES))
    found = [kernel for log in logs for kernel in kernels(log)]
    print(f"\n{'registers':>9} {'shared':>7} {'spilled':>7}  sm")
    for kernel, name in zip(found, readable([kernel.name for kernel in found]), strict=True):
        print(f"{kernel.registers:9} {kernel.shared:7} {kernel.spilled:7}  {kernel.gpu:4} {name}")
    for gpu in GPUS:
        names = [kernel.name for kernel in found if kernel.gpu == gpu]
        for family in FAMILIES:
            mangled = f"{len(family) + len('_kernel')}{family}_kernel"
            assert any(mangled in name for name in names), f"{family} is not built for sm_{gpu}"
    assert not [kernel for kernel in found if kernel.spilled]
    # A block that asks for more is never started.
    assert all(k.registers * threads(k.name) <= BLOCK_REGISTERS for k in found)


def test_the_ops_compile_against_torch(tmp_path: Path) -> None:
    """With torch's headers of this machine, also where its torch is built without CUDA; `make headers` takes others."""
    assert not compile_gpu_ops(INCLUDE, tmp_path)


def test_the_sources_use_no_name_that_an_older_torch_lacks() -> None:
    new = used_names(sources(*CSRC), INCLUDE) - set(LIST.read_text().split())
    assert not new, f"run `make headers`, which looks whether torch {', '.join(VERSIONS)} have {sorted(new)}"


def test_names_of_torch_are_found_in_sources(tmp_path: Path) -> None:
    (tmp_path / "some.cpp").write_text(
        "using torch::stable::Tensor;  // torch::stable::Old\n"
        "STD_CUDA_CHECK(call(x.numel(), y->mutable_data_ptr<float>(), z.own()), aoti_torch_some);\n"
    )
    expected = {"Tensor", "STD_CUDA_CHECK", "numel", "mutable_data_ptr", "aoti_torch_some"}
    assert used_names(sources(tmp_path), INCLUDE) == expected
    assert expected - known_names(INCLUDE) == {"aoti_torch_some"}


def test_the_build_holds_ptx_for_later_gpus() -> None:
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    assert build["gpu_targets"]("8.0;9.0a 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    # What is made for one GPU alone ("a") runs on no later one, nor does its PTX.
    assert build["gpu_targets"]("9.0a")[-1] == "-gencode=arch=compute_90,code=compute_90"
