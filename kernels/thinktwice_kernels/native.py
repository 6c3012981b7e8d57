"""The ops of a decoder layer in C++ (csrc/layers/), which computes on the CPU."""

from typing import Any

import torch
from torch import Tensor

from thinktwice_kernels.launch import op_in_cpp


def computes(*tensors: Tensor | None) -> bool:
    """Whether each `layer_op` takes these: float32 on the CPU."""
    return all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)


def layer_op(name: str) -> Any:
    """That of csrc/layers/."""
    return op_in_cpp("thinktwice_layers", name)


def contiguous(x: Tensor | None) -> Tensor | None:
    """As they take a tensor that may be absent."""
    return None if x is None else x.contiguous()
