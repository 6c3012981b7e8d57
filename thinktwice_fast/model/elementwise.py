"""Norms and gates of known architectures in one pass over memory each, forward and backward; float32 on the CPU.

Transformers computes an RMS norm in five steps and a gated MLP's activation in two, autograd their gradients in about
twice as many. Each reads and writes a tensor of all tokens, which takes longer than its arithmetic.

    rms_norm    y = x / sqrt(mean(x^2) + eps) * weight
    swiglu      y = silu(gate) * up

Letters: T tokens (or T times heads), H elements that a norm goes over, I inner size of an MLP.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo3.modeling_olmo3 import Olmo3MLP, Olmo3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from thinktwice_fast.model.csrc import ops


def fuse_elementwise(model: nn.Module) -> None:
    """Have the norms and MLPs of a model run the fused steps where they can, in place; others stay as they are."""
    for module in model.modules():
        if type(module) in _MLPS and not isinstance(module.act_fn, SiLUActivation):
            continue
        module.__class__ = _FUSED.get(type(module), type(module))


def fuses(model: nn.Module) -> bool:
    """Whether ``fuse_elementwise`` knows the model's norms and MLPs."""
    return any(type(module) in _FUSED for module in model.modules())


def rms_norm(
    x: Tensor,  # float32 [..., H]
    weight: Tensor,  # float32 [H]
    eps: float,
) -> Tensor:  # [..., H]
    """RMS norm (Zhang and Sennrich 2019) on the CPU, differentiable once. Its gradient does not depend on threads."""
    return cast(Tensor, _Norm.apply(x, weight, eps))


def swiglu(
    gate: Tensor,  # float32 [..., I]
    up: Tensor,  # float32 [..., I]
) -> Tensor:  # [..., I]
    """Gate of an MLP (Shazeer 2020, arXiv 2002.05202) on the CPU, differentiable once."""
    return cast(Tensor, _Gate.apply(gate, up))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return cast(Tensor, ops.rms_norm(x.contiguous(), weight, eps)).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ops.rms_norm_backward(grad.contiguous(), x.contiguous(), weight, ctx.eps)
        return of_x.view(x.shape), of_weight, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return cast(Tensor, ops.swiglu(gate.contiguous(), up.contiguous())).view(gate.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        of_gate, of_up = ops.swiglu_backward(grad.contiguous(), gate.contiguous(), up.contiguous())
        return of_gate.view(gate.shape), of_up.view(gate.shape)


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


class _FusedNorm(nn.Module):
    """Stands before an RMS norm's class."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if _fits(hidden_states):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return cast(Tensor, super().forward(hidden_states))


class _FusedMLP(nn.Module):
    """Stands before an MLP's class."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if _fits(x):
            return cast(Tensor, self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))))
        return cast(Tensor, super().forward(x))


def _before(fused: type[nn.Module], *kinds: type[nn.Module]) -> dict[type[nn.Module], type[nn.Module]]:
    return {kind: type(f"Fused{kind.__name__}", (fused, kind), {}) for kind in kinds}


_NORMS = _before(_FusedNorm, LlamaRMSNorm, Olmo3RMSNorm, Qwen3RMSNorm)
_MLPS = _before(_FusedMLP, LlamaMLP, Olmo3MLP, Qwen3MLP)
_FUSED = _NORMS | _MLPS
