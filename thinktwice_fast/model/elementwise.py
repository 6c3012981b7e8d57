"""What known architectures do between their products, in one pass over memory each; float32 on the CPU.

Transformers computes an RMS norm in five steps, a rotation in five and a gated MLP's activation in two, autograd their
gradients in about twice as many. Each reads and writes a tensor of all tokens, which takes longer than its arithmetic.
Products of one input (queries, keys and values; gate and up) are one product here.

    rms_norm     y = x / sqrt(mean(x^2) + eps) * weight
    qkv_heads    q, k, v = split(x); rotate(norm(q)), rotate(norm(k)), v
                 rotate(x) = x cos + (-high, low) sin, of a head's halves low and high
    swiglu       y = silu(gate) * up, of x = [gate, up]

Letters: T tokens, H elements that a norm goes over, Hq / Hkv query / key-value heads, D head size, I inner size of an
MLP.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo3.modeling_olmo3 import Olmo3Attention, Olmo3MLP, Olmo3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from thinktwice_fast.model.attention import PrefixAttention
from thinktwice_kernels.native import layer_ops

ops = layer_ops()
_FEW = 64  # rows of a product


def fuse_elementwise(model: nn.Module) -> None:
    """Have a model's norms, attentions and MLPs run the fused steps where they can; others stay as they are."""
    for module in model.modules():
        if type(module) in _MLPS and not isinstance(module.act_fn, SiLUActivation):
            continue
        module.__class__ = _FUSED.get(type(module), type(module))


def fuses(model: nn.Module) -> bool:
    """Whether ``fuse_elementwise`` knows modules of the model, and has not been asked to fuse them yet."""
    return any(type(module) in _FUSED for module in model.modules())


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before ``fuse_elementwise``."""
    return _OWN.get(type(module), type(module))


def rms_norm(
    x: Tensor,  # float32 [..., H]
    weight: Tensor,  # float32 [H]
    eps: float,
) -> Tensor:  # [..., H]
    """RMS norm (Zhang and Sennrich 2019) on the CPU, differentiable once. Its gradient does not depend on threads."""
    return cast(Tensor, _Norm.apply(x, weight, eps))


def qkv_heads(
    x: Tensor,  # float32 [T, (Hq + 2 * Hkv) * D], a token's queries, keys and values
    cos: Tensor,  # float32 [T, D]
    sin: Tensor,  # float32 [T, D]
    heads: tuple[int, int],  # Hq, Hkv
    norms: tuple[Tensor, Tensor] | None = None,  # of queries and keys: [D] both, or [Hq * D] and [Hkv * D]
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # [T, Hq, D], [T, Hkv, D], [T, Hkv, D]
    """Heads as attention takes them, queries and keys normed (where there are norms) and rotated; on the CPU.

    RMS norms over each head or over all of them, rotary positions (Su et al. 2021, arXiv 2104.09864). Differentiable
    once, in ``x`` and the norms; the gradient does not depend on threads.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _Heads.apply(x, cos, sin, *heads, *(norms or (None, None)), eps))


def swiglu(
    x: Tensor,  # float32 [T, 2 * I], a token's gate, then its up
) -> Tensor:  # [T, I]
    """Gate of an MLP (Shazeer 2020, arXiv 2002.05202) on the CPU, differentiable once."""
    return cast(Tensor, _Gate.apply(x))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return cast(Tensor, ops.rms_norm(x.contiguous(), None, weight, eps)[0]).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ops.rms_norm_backward(grad.contiguous(), None, x.contiguous(), weight, ctx.eps, True)
        return of_x.view(x.shape), of_weight, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Any:
        tables = cos.contiguous(), sin.contiguous()
        return ops.rotary(x.contiguous(), *tables, heads, kv_heads, q_norm, k_norm, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, cos, sin, _, _, *norms, ctx.eps = inputs
        ctx.save_for_backward(x if norms[0] is not None else None, cos, sin, *norms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, cos, sin, *norms = ctx.saved_tensors
        tables = cos.contiguous(), sin.contiguous()
        whole = [grad.contiguous() for grad in grads]
        rows = x.contiguous() if x is not None else None
        of_x, *of_norms = ops.rotary_backward(
            *whole, rows, *tables, *norms, ctx.eps, norms[0] is not None, norms[1] is not None
        )
        of_norms = [of if norm is not None else None for of, norm in zip(of_norms, norms, strict=True)]
        return of_x, None, None, None, None, *of_norms, None


class _KeepsInputs(torch.autograd.Function):
    """Of tensors alone; the gradient needs all of them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _Gate(_KeepsInputs):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, ops.swiglu(x.contiguous()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ops.swiglu_backward(grad.contiguous(), ctx.saved_tensors[0].contiguous())


class _JointProduct(_KeepsInputs):
    """x [W1; W2; ...]^T; keeps the weights as they are, not the copy that has them side by side."""

    @staticmethod
    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        return linear(x, torch.cat(weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        of_x = grad @ torch.cat(weights) if ctx.needs_input_grad[0] else None
        of_weights: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[1:]):
            of_weights = list((grad.T @ x).split([len(weight) for weight in weights]))
        return of_x, *of_weights


def _joint(x: Tensor, *modules: nn.Module) -> Tensor:  # [T, inputs] -> [T, outputs of all]
    """The modules' results side by side: one product, where they are plain linear layers with or without biases.

    Of few rows the products cost less than putting the weights side by side.
    """
    linears = [module for module in modules if type(module) is nn.Linear]
    biases = [module.bias for module in linears if module.bias is not None]
    if len(x) < _FEW or len(linears) < len(modules) or len(biases) not in (0, len(linears)):
        return torch.cat([module(x) for module in modules], 1)
    out = cast(Tensor, _JointProduct.apply(x, *(module.weight for module in linears)))
    return out + torch.cat(tuple(biases)) if biases else out


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


class _FusedAttention(nn.Module):
    """Stands before an attention's class."""

    q_norm: Any  # some have none
    k_norm: Any
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        attention = options.get("attention")
        dropout = self.training and self.attention_dropout  # which the class's own forward refuses
        if dropout or not _fits(hidden_states) or not isinstance(attention, PrefixAttention):
            return cast(Any, super()).forward(hidden_states, position_embeddings, *rest, **options)
        cos, sin = (table[0] for table in position_embeddings)
        x = _joint(hidden_states[0], self.q_proj, self.k_proj, self.v_proj)
        heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = qkv_heads(x, cos, sin, heads, *self._norms())
        window = getattr(self, "sliding_window", None) or 0
        out = attention.attend(self.layer_idx, q, k, v, self.scaling, window)
        return self.o_proj(out.flatten(1))[None], None

    def _norms(self) -> tuple[tuple[Tensor, Tensor] | None, float]:
        if not hasattr(self, "q_norm"):
            return None, 0.0
        return (self.q_norm.weight, self.k_norm.weight), self.q_norm.variance_epsilon


class _FusedMLP(nn.Module):
    """Stands before an MLP's class."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if _fits(x):
            inner = swiglu(_joint(x.flatten(0, -2), self.gate_proj, self.up_proj))
            return cast(Tensor, self.down_proj(inner.unflatten(0, x.shape[:-1])))
        return cast(Tensor, super().forward(x))


def _before(fused: type[nn.Module], *kinds: type[nn.Module]) -> dict[type[nn.Module], type[nn.Module]]:
    return {kind: type(f"Fused{kind.__name__}", (fused, kind), {}) for kind in kinds}


_NORMS = _before(_FusedNorm, LlamaRMSNorm, Olmo3RMSNorm, Qwen3RMSNorm)
_MLPS = _before(_FusedMLP, LlamaMLP, Olmo3MLP, Qwen3MLP)
_ATTENTIONS = _before(_FusedAttention, LlamaAttention, Olmo3Attention, Qwen3Attention)
_FUSED = _NORMS | _ATTENTIONS | _MLPS
_OWN = {fused: own for own, fused in _FUSED.items()}
