"""What the custom ops share."""

import torch
from torch import Tensor

from thinktwice_kernels.backends import Head

NAMESPACE = "thinktwice_kernels"


def head_of(bias: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float | None) -> Head:
    """The temperature is the tensor where there is one."""
    return Head(bias, temperature if temperatures is None else temperatures, softcap)


def fake_gradient(like: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    """A fake gradient: of the shape of `like`, or [0] where it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,), dtype=dtype)
