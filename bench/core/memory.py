"""Peak memory of one call beyond its inputs; the results and gradients that it returns count.

On CUDA that is what the caching allocator handed out. On a CPU it is the peak of the resident memory of a process that
does nothing else: ``python -m bench.core.memory MODULE OP SIZE CASE CONTENDER`` prints the bytes.
"""

import ctypes
import gc
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.core.op import Case, Op, Size
from bench.core.process import python

_TIMEOUT = 300


def peak_memory(op: Op, case: Case[Any], contender: str, batch: Any, size: Size) -> int | None:
    """Bytes; None where it cannot be measured: on a CPU not for what compiles, whose compiler's memory would count."""
    if size == "gpu":
        return _on_cuda(op, contender, batch)
    if op.contenders[contender].compiled:
        return None
    command = [python(), "-m", "bench.core.memory", op.module, op.name, size, case.name, contender]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    return int(finished.stdout.split()[-1]) if finished.returncode == 0 else None


def _on_cuda(op: Op, contender: str, batch: Any) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = op.contenders[contender].run(batch)
    torch.cuda.synchronize()
    del outputs
    return torch.cuda.max_memory_allocated() - before


def _main(module: str, op_name: str, size: Size, case_name: str, contender_name: str) -> int:
    op: Op = next(op for op in importlib.import_module(module).OPS if op.name == op_name)
    contender, cpu = op.contenders[contender_name], torch.device("cpu")
    contender.run(op.inputs(op.cases["toy"][0], cpu))  # threads and libraries take memory once
    batch = op.inputs(next(case for case in op.cases[size] if case.name == case_name), cpu)
    start_peak()
    before = status("VmRSS")
    outputs = contender.run(batch)
    peak = status("VmHWM")
    del outputs
    return peak - before


def start_peak() -> None:
    """The resident memory's peak starts anew from what is in use now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> int:
    """Bytes, from a line like ``VmRSS:   1234 kB``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux only")


if __name__ == "__main__":
    print(_main(*sys.argv[1:]))  # type: ignore[arg-type]
