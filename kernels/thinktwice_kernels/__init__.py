"""Ops of group-relative policy optimisation, for any trainer; they need torch and nothing of thinktwice_fast.

Everything is packed: the T tokens of S sequences lie one after another without padding, and
``cu_seqlens`` [S+1] holds the offset at which each sequence starts, and T at its end.
"""

from thinktwice_kernels.advantages import group_advantages
from thinktwice_kernels.gate import swiglu
from thinktwice_kernels.linear_loss import linear_grpo_loss
from thinktwice_kernels.logprobs import linear_logits, linear_logprobs, token_logprobs
from thinktwice_kernels.loss import grpo_loss, loss_count
from thinktwice_kernels.merge import merge_attention
from thinktwice_kernels.metrics import METRICS, Metric, combine_metrics
from thinktwice_kernels.norm import rms_norm
from thinktwice_kernels.options import LossOptions
from thinktwice_kernels.presets import PRESETS, Preset
from thinktwice_kernels.rotary import rotary

__all__ = [
    "METRICS",
    "PRESETS",
    "LossOptions",
    "Metric",
    "Preset",
    "combine_metrics",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logits",
    "linear_logprobs",
    "loss_count",
    "merge_attention",
    "rms_norm",
    "rotary",
    "swiglu",
    "token_logprobs",
]
