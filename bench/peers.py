"""What other projects offer for the same work, each called as its own trainer calls it.

Most give log-probabilities from hidden states and weight, as a function of a `LinearBatch`; `plain_loss` makes the loss
of them.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import EPSILON_HIGH, EPSILON_LOW, LinearBatch, LossBatch
from bench.measure import Contender, Outputs, always

Logps = Callable[[LinearBatch], Tensor]
Unable = Callable[[torch.device], str | None]


def needs(module: str, device_type: str | None = None) -> Unable:
    """Why it cannot run, if the module is not installed or the device is another."""

    def unable(device: torch.device) -> str | None:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"{module.partition('.')[0]} is not installed"
        if device_type is not None and device.type != device_type:
            return f"runs on {device_type} only"
        return None

    return unable


def from_project(module: str, name: str) -> Any:
    """What a project that may not be installed has under that name."""
    return getattr(importlib.import_module(module), name)


def plain_loss(logps: Tensor, loss: LossBatch) -> Tensor:
    """The clipped objective, averaged over the loss tokens, as few lines of torch."""
    advantages = loss.advantages.repeat_interleave(loss.shape[1], output_size=logps.numel())
    ratio = torch.exp(logps - (logps.detach() if loss.old_logps is None else loss.old_logps))
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH) * advantages)
    if loss.loss_mask is None:
        return per_token.mean()
    return (per_token * loss.loss_mask).sum() / loss.loss_mask.sum()


def torch_logps(batch: LinearBatch) -> Tensor:
    """Whole logits, rounded to the type of the inputs."""
    return -F.cross_entropy((batch.hidden @ batch.weight.t()).float(), batch.targets, reduction="none")


def liger_scaled_logps(batch: LinearBatch) -> Tensor:
    function = from_project("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    return -function.apply(batch.hidden, batch.weight, batch.targets)


def trl_logps(batch: LinearBatch) -> Tensor:
    function = from_project("trl.kernels", "ChunkedLogProbFunction")
    columns = from_project("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    return function.apply(batch.hidden, batch.weight, None, batch.targets, 1.0, columns, None, 1.0, ("log_probs",))[0]


def cce_logps(batch: LinearBatch, filter_eps: str | None = "high") -> Tensor:
    linear_cross_entropy = from_project("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if batch.hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, reduction="none", impl=impl, filter_eps=filter_eps
    )


def verl_logps(batch: LinearBatch) -> Tensor:
    linear_cross_entropy = from_project("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return linear_cross_entropy(batch.hidden, batch.weight, batch.targets, 1.0, "none")[0]


@dataclass(frozen=True)
class Peer:
    logps: Logps
    unable: Unable = always
    compiled: bool = False
    in_targets: bool = False


PEERS: Mapping[str, Peer] = {
    "torch": Peer(torch_logps),
    "liger scaled CE": Peer(liger_scaled_logps, needs("liger_kernel")),
    "trl chunked": Peer(trl_logps, needs("trl")),
    "cce": Peer(cce_logps, needs("cut_cross_entropy"), compiled=True),
    "cce without filter": Peer(partial(cce_logps, filter_eps=None), needs("cut_cross_entropy", "cuda")),
    "verl": Peer(verl_logps, needs("verl", "cuda")),
}


def head_gradients(loss: Tensor, batch: LinearBatch, incoming: Tensor | None = None) -> dict[str, Tensor]:
    d_hidden, d_weight = torch.autograd.grad(loss, (batch.hidden, batch.weight), incoming)
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def loss_outputs(loss: Tensor, batch: LinearBatch) -> Outputs:
    return {"loss": loss.detach(), **head_gradients(loss, batch)}


def loss_contenders() -> dict[str, Contender]:
    """Every peer's log-probabilities with the plain loss, and those that have a loss of their own."""

    def with_loss(logps: Logps) -> Callable[[LinearBatch], Outputs]:
        return lambda batch: loss_outputs(plain_loss(logps(batch), batch.loss), batch)

    found = {
        name if name == "torch" else f"{name} + loss": Contender(with_loss(peer.logps), peer.unable, peer.compiled)
        for name, peer in PEERS.items()
    }
    return {
        **found,
        "torch.compile": Contender(compiled_loss, compiled=True),
        "liger chunked": Contender(liger_chunked_loss, needs("liger_kernel"), in_targets=True),
        "liger triton loss": Contender(liger_triton_loss, needs("liger_kernel", "cuda")),
    }


def logps_contenders() -> dict[str, Contender]:
    def outputs(logps: Logps) -> Callable[[LinearBatch], Outputs]:
        def run(batch: LinearBatch) -> Outputs:
            values = logps(batch)
            return {"logps": values.detach(), **head_gradients(values, batch, batch.d_logps.to(values.dtype))}

        return run

    found = {name: Contender(outputs(peer.logps), peer.unable, peer.compiled) for name, peer in PEERS.items()}
    return {**found, "torch.compile": Contender(outputs(compiled_logps), compiled=True)}


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def compiled_logps(batch: LinearBatch) -> Tensor:
    return compiled(torch_logps)(batch)


def compiled_loss(batch: LinearBatch) -> Outputs:
    return loss_outputs(compiled(_torch_loss)(batch), batch)


def _torch_loss(batch: LinearBatch) -> Tensor:
    return plain_loss(torch_logps(batch), batch.loss)


def liger_chunked_loss(batch: LinearBatch) -> Outputs:
    layer = from_project("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH,
        loss_type="dapo",
        compiled=batch.hidden.is_cuda,  # on a CPU it is faster without
    )
    loss, _ = layer(
        batch.hidden.view(*batch.loss.shape, -1),
        batch.weight,
        batch.targets.view(batch.loss.shape),
        _padding_mask(batch.loss),
        batch.loss.advantages,
        old_per_token_logps=_in_rows(batch.loss.old_logps, batch.loss),
    )
    return loss_outputs(loss, batch)


def liger_triton_loss(batch: LinearBatch) -> Outputs:
    """From whole logits, of which it drops the last of each sequence."""
    triton_grpo_loss = from_project("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    sequences, length = batch.loss.shape
    padded = F.pad(batch.hidden.view(sequences, length, -1), (0, 0, 0, 1))
    loss, _ = triton_grpo_loss(
        padded @ batch.weight.t(),
        _in_rows(batch.loss.old_logps, batch.loss),
        None,
        batch.targets.view(batch.loss.shape),
        batch.loss.advantages,
        _padding_mask(batch.loss),
        temperature=1.0,
        beta=0.0,
        eps_low=EPSILON_LOW,
        eps_high=EPSILON_HIGH,
        loss_type="dapo",
        reduce=True,
    )
    return loss_outputs(loss, batch)


def _in_rows(values: Tensor | None, loss: LossBatch) -> Tensor | None:
    return None if values is None else values.view(loss.shape)


def _padding_mask(loss: LossBatch) -> Tensor:
    if loss.loss_mask is None:
        return torch.ones(loss.shape, device=loss.advantages.device)
    return loss.loss_mask.view(loss.shape).float()
