"""Tables of torch's profiler: which kernels a piece of work launched, how often, and how long they took."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.core.measure import seconds_of
from thinktwice_fast.run.profiling import apart, rows_of, table

_KERNELS, _CALLS = 24, 12


@dataclass(frozen=True)
class Profiled:
    """One piece of work."""

    seconds: float
    launches: int  # of kernels; on the CPU calls of ops
    table: str


def profiled(work: Callable[[], Any], device: torch.device) -> Profiled:
    """Do it once: its wall-clock time, with what profiling adds, and its kernels and calls that took longest."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        seconds = seconds_of(work, device)
    kernels, calls = apart(rows_of(profiler))
    tables = [table("calls on the host", calls, _CALLS)]
    if on_gpu:
        tables.insert(0, table("kernels", kernels, _KERNELS))
    return Profiled(seconds, sum(row.calls for row in (kernels if on_gpu else calls)), "\n".join(tables))
