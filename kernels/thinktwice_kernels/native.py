"""The ops of a decoder layer in C++ (csrc/layers/), which computes on the CPU."""

from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels.launch import in_cpp


def computes(*tensors: Tensor | None) -> bool:
    """Whether `layer_ops` take these: float32 on the CPU."""
    return all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)


def layer_ops() -> Any:
    """The ops of csrc/layers/."""
    return in_cpp("thinktwice_layers")


def contiguous(x: Tensor | None) -> Tensor | None:
    """As they take a tensor that may be absent."""
    return None if x is None else x.contiguous()
