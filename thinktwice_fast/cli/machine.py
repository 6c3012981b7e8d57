"""What of this machine a run will use: hardware, driver, libraries, and what the extensions were built with."""

import importlib
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from thinktwice_fast.run.versions import installed_version

OLDEST_GPU = (8, 0)  # compute capability that the CUDA kernels are built for, as in setup.py
_OPTIONAL = {
    "peft": "--model.lora_rank",
    "bitsandbytes": "--update.optimizer adamw8bit",
    "wandb": "--track wandb",
    "trackio": "--track trackio",
}
_GIB = 1 << 30


class Fact(NamedTuple):
    """One line of what was found."""

    what: str
    found: str
    advice: str = ""  # how it would be better
    broken: bool = False  # nothing runs before that is done


def machine_facts() -> Iterator[Fact]:
    """All there is to say, in the order in which one thing stands on another."""
    driver = gpu_driver()
    yield Fact("Python", platform.python_version())
    yield _torch_fact(driver)
    yield _cpu_fact()
    yield from _gpu_facts(driver)
    yield Fact("transformers", version("transformers"))
    yield from _extension_facts()
    for package, option in _OPTIONAL.items():
        found = installed_version(package)
        yield Fact(package, found or f"not installed: {option} needs it")


def gpu_driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = finished.stdout.split()
    return lines[0] if lines and not finished.returncode else None


def cpu_model() -> str:
    """The name that the processor gives itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _torch_fact(driver: str | None) -> Fact:
    built = torch.version.cuda
    advice = ""
    if driver is not None and built is None:
        advice = "there is a GPU, which this torch can't use: install torch built for CUDA (pytorch.org)"
    elif driver is not None and not torch.cuda.is_available():
        advice = "there is a GPU that it does not see: look at CUDA_VISIBLE_DEVICES, and whether the driver is too old"
    return Fact("torch", f"{torch.__version__}, built {f'for CUDA {built}' if built else 'without CUDA'}", advice)


def _cpu_fact() -> Fact:
    sets = torch.backends.cpu.get_cpu_capability()
    tiles = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    advice = "" if sets != "DEFAULT" else "without AVX2 the CPU kernels run at their slowest"
    return Fact("CPU", f"{cpu_model()}, {sets}{tiles}, {torch.get_num_threads()} threads a process", advice)


def _gpu_facts(driver: str | None) -> Iterator[Fact]:
    if not torch.cuda.is_available():
        yield Fact("GPU", "none: the CPU computes")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        old = (about.major, about.minor) < OLDEST_GPU
        advice = f"older than {OLDEST_GPU[0]}.{OLDEST_GPU[1]}: too old for the CUDA kernels" if old else ""
        size = f"{about.total_memory / _GIB:.0f} GiB"
        yield Fact(f"GPU {index}", f"{about.name}, compute capability {about.major}.{about.minor}, {size}", advice)
    yield Fact("driver", driver or "unknown (no nvidia-smi)")
    triton = installed_version("triton")
    yield Fact("Triton", triton or "not installed", "" if triton else "run `pip install triton`", broken=not triton)
    yield _attention_fact()


def _attention_fact() -> Fact:
    what = "attention in updates"
    if torch.backends.cuda.is_flash_attention_available():
        return Fact(what, "torch's flash attention")
    return Fact(what, "plain torch", "slow: take a torch that is built with flash attention")


def _extension_facts() -> Iterator[Fact]:
    from thinktwice_kernels.launch import in_cpp

    try:
        csrc = importlib.import_module("thinktwice_fast.model.csrc")
    except ValueError as error:  # a UserError, with its remedy
        yield Fact("thinktwice_fast/_csrc", "does not load", str(error), broken=True)
    else:
        on_gpu = "paged_attention" not in csrc.torch_versions
        slow = torch.cuda.is_available() and not on_gpu
        advice = "plain torch stands in, slowly: install nvcc, then `make clean setup`" if slow else ""
        yield Fact("thinktwice_fast/_csrc", "CPU and CUDA kernels" if on_gpu else "CPU kernels", advice)
    try:
        in_cpp("thinktwice_layers")
    except RuntimeError as error:
        yield Fact("thinktwice_kernels/_csrc", "does not load", str(error), broken=True)
    else:
        yield Fact("thinktwice_kernels/_csrc", "CPU kernels")
