"""How much memory a device has, and how much of it this process holds."""

import os
import resource
from pathlib import Path

import torch

from thinktwice_fast.model import arena

_PAGE = os.sysconf("SC_PAGE_SIZE")


def held_bytes(device: torch.device) -> int:
    """What this process holds of the device's memory now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def peak_bytes(device: torch.device) -> int:
    """The most that it has held since it started."""
    if device.type == "cuda":
        return arena.peak_bytes(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_bytes(device: torch.device, processes: int) -> int:
    """What each of ``processes`` on this machine may have: a GPU of its own, or its part of the main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    memory, granted = os.sysconf("SC_PHYS_PAGES") * _PAGE, _granted_bytes()
    return (memory if granted is None else min(memory, granted)) // processes


def free_bytes(device: torch.device) -> int:
    """What nobody holds of a GPU's memory, or of the main memory that this process may have, now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    granted = _granted_bytes()
    if granted is not None:  # what is no file's page can't be given back
        held = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in held if line.startswith("anon "))
        available = min(available, max(0, granted - anonymous))
    return available


def _granted_bytes() -> int | None:
    """Of main memory, by the control group of this process; None: no limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    granted = limit.read_text().strip() if limit.is_file() else ""
    return int(granted) if granted.isdecimal() else None
