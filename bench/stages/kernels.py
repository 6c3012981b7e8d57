"""Tables of torch's profiler: which kernels a piece of work launched, how often, and how long they took."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.core.measure import seconds_of

_NAME = 90  # characters of a kernel's name
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
    events = profiler.key_averages()
    calls = [_Row(e.key, e.count, e.self_cpu_time_total) for e in events if not _on_device(e)]
    kernels = [_Row(e.key, e.count, e.self_device_time_total) for e in events if _on_device(e) and not _only_named(e)]
    tables = [_table("calls on the host", calls, _CALLS)]
    if on_gpu:
        tables.insert(0, _table("kernels", kernels, _KERNELS))
    return Profiled(seconds, sum(row.count for row in (kernels if on_gpu else calls)), "\n".join(tables))


@dataclass(frozen=True)
class _Row:
    name: str
    count: int
    microseconds: float


def _on_device(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def _only_named(event: Any) -> bool:
    """A range of time that the program named, over kernels that have rows of their own."""
    return bool(event.is_user_annotation)


def _table(what: str, rows: list[_Row], most: int) -> str:
    """The rows that took longest, and the sum of all."""
    total = sum(row.microseconds for row in rows) or 1.0
    lines = [f"{'ms':>10} {'share':>6} {'count':>8} {'us each':>9}  {what}"]
    for row in sorted(rows, key=lambda row: -row.microseconds)[:most]:
        lines.append(
            f"{row.microseconds / 1000:10.3f} {row.microseconds / total:6.1%} {row.count:8d} "
            f"{row.microseconds / row.count:9.2f}  {row.name[:_NAME]}"
        )
    count = sum(row.count for row in rows)
    return "\n".join([*lines, f"{total / 1000:10.3f} {'':6} {count:8d} {'':9}  all {len(rows)}"])
