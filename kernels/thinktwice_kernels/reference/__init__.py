"""Every op once more as its definition: plain torch, whole logits, autograd; float64 inputs give float64 results.

The tests and benchmarks hold the fast versions against these, and so may you.
"""

from thinktwice_kernels.gate import swiglu_reference as swiglu
from thinktwice_kernels.norm import rms_norm_reference as rms_norm
from thinktwice_kernels.reference.advantages import group_advantages
from thinktwice_kernels.reference.linear_loss import linear_grpo_loss
from thinktwice_kernels.reference.logprobs import linear_logits, linear_logprobs, token_logprobs
from thinktwice_kernels.reference.loss import grpo_loss
from thinktwice_kernels.rotary import rotary_reference as rotary

__all__ = [
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logits",
    "linear_logprobs",
    "rms_norm",
    "rotary",
    "swiglu",
    "token_logprobs",
]
