"""``--profile 3:5``: what those steps spend their time on, as torch's profiler sees it.

Of process 0 alone: the others do the same work, and wait for it while it writes. A step's trace is written when it
ends, so that no more than one is held.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from thinktwice_fast.errors import UserError

FOLDER = "profile"  # in the run's
MOST_STEPS = 10

_KERNELS, _CALLS = 40, 20  # that are listed one by one
_NAME = 90  # characters of one in the text


@dataclass(frozen=True)
class Row:
    """A kernel of the GPU, or a call on the host: how often, and how long without what it calls in turn."""

    name: str
    calls: int
    self_cpu_ms: float  # 0 for a kernel
    self_device_ms: float  # 0 for a call

    @property
    def ms(self) -> float:
        """The time where it runs."""
        return self.self_cpu_ms + self.self_device_ms


def profiled_steps(text: str | None) -> range:
    """The steps that the option ``profile`` names, the last included; none without it.

    Raises:
        UserError: no such text, or too many steps.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text)
    first, last = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    if not 1 <= first <= last:
        raise UserError(f"--profile {text}: give the first and the last step, as in 3:5, or one")
    if last - first >= MOST_STEPS:
        raise UserError(f"--profile {text}: {last - first + 1} steps: profile at most {MOST_STEPS}")
    return range(first, last + 1)


class StepProfiler:
    """Profiles steps into ``FOLDER`` of the run's folder.

    For each a trace for https://ui.perfetto.dev, and over all ``top.json``, a list of `Row`, and ``top.txt``.

    Args:
        steps: to profile.
        folder: of the run.
        device: that it computes on.
    """

    def __init__(self, steps: range, folder: Path, device: torch.device):
        self.folder = folder / FOLDER
        self._steps = steps
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._rows: list[Row] = []

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Profile what is done inside, where it is a step to profile and ends without an error."""
        if step not in self._steps:
            yield
            return
        with profile(activities=self._activities) as profiler:
            yield
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"step-{step:06d}.json.gz"))
        self._rows = _added([*self._rows, *rows_of(profiler)])
        kernels, calls = apart(self._rows)
        top = [*head(kernels, _KERNELS), *head(calls, _CALLS)]
        (self.folder / "top.json").write_text(json.dumps([asdict(row) for row in top], indent=1) + "\n")
        tables = [table(what, rows, most) for what, rows, most in
                  (("kernels", kernels, _KERNELS), ("calls on the host", calls, _CALLS)) if rows]  # fmt: skip
        (self.folder / "top.txt").write_text("\n\n".join(tables) + "\n")


def rows_of(profiler: profile) -> list[Row]:
    """What a profiler that has stopped saw, summed by name."""
    return [
        Row(event.key, event.count, 0.0, event.self_device_time_total / 1000)
        if _on_device(event)
        else Row(event.key, event.count, event.self_cpu_time_total / 1000, 0.0)
        for event in profiler.key_averages()
        # Over kernels that have rows of their own, a range of time that the program named.
        if not (_on_device(event) and event.is_user_annotation)
    ]


def apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Kernels, and calls on the host; the slowest first."""
    ordered = sorted(rows, key=lambda row: -row.ms)
    return [row for row in ordered if row.self_device_ms], [row for row in ordered if not row.self_device_ms]


def head(rows: Sequence[Row], most: int) -> list[Row]:
    """The first ``most``, and one for all others."""
    rest = rows[most:]
    if not rest:
        return list(rows)
    sums = (sum(getattr(row, name) for row in rest) for name in ("calls", "self_cpu_ms", "self_device_ms"))
    return [*rows[:most], Row(f"{len(rest)} others", *sums)]


def table(what: str, rows: Sequence[Row], most: int) -> str:
    """The first ``most`` of the rows, and the sum of all, as text."""
    total = sum(row.ms for row in rows) or 1.0
    lines = [f"{'ms':>10} {'share':>6} {'count':>8} {'us each':>9}  {what}"]
    for row in rows[:most]:
        each = 1000 * row.ms / row.calls
        lines.append(f"{row.ms:10.3f} {row.ms / total:6.1%} {row.calls:8d} {each:9.2f}  {row.name[:_NAME]}")
    return "\n".join([*lines, f"{total:10.3f} {'':6} {sum(row.calls for row in rows):8d} {'':9}  all {len(rows)}"])


def _on_device(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def _added(rows: Sequence[Row]) -> list[Row]:
    sums: dict[tuple[str, bool], Row] = {}
    for row in rows:
        key = row.name, bool(row.self_device_ms)
        old = sums.get(key, Row(row.name, 0, 0.0, 0.0))
        calls, cpu, device = (
            getattr(old, name) + getattr(row, name) for name in ("calls", "self_cpu_ms", "self_device_ms")
        )
        sums[key] = Row(row.name, calls, cpu, device)
    return list(sums.values())
