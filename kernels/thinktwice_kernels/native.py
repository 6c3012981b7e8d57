"""The library's C++ extension (csrc/loss/ and csrc/layers/), which computes on the CPU."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_REMEDY = "run `make`, or `pip install .` in the repository"


@cache
def load() -> None:
    """Registers its ops with torch. Raises RuntimeError where it is not built, or for another torch."""
    found = sorted(Path(__file__).parent.glob("_csrc*.so"))
    if not found:
        raise RuntimeError(f"the C++ extension of thinktwice_kernels is not built: {_REMEDY}")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = f"does not load with torch {torch.__version__} ({str(error).splitlines()[0]})"
        raise RuntimeError(f"the C++ extension of thinktwice_kernels {reason}: {_REMEDY}") from error


def computes(*tensors: Tensor | None) -> bool:
    """Whether `layer_ops` take these: float32 on the CPU."""
    return all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)


def layer_ops() -> Any:
    """The ops of csrc/layers/."""
    load()
    return torch.ops.thinktwice_layers


def contiguous(x: Tensor | None) -> Tensor | None:
    """As they take a tensor that may be absent."""
    return None if x is None else x.contiguous()
