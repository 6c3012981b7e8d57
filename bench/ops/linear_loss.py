"""`linear_grpo_loss`, forward and backward: loss and gradients from the last hidden state.

Letters: S sequences.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.contender import OURS, PLAIN, Contender, Outputs, compiled, from_project, needs
from bench.core.op import Op, Size
from bench.core.targets import Target, fastest_peer, memory_share, own, times_slower
from bench.ops.grpo_loss import plain_loss
from bench.ops.head import PEERS, PRODUCTS, flop, gradients, torch_logps, true_gradients, true_logps
from bench.ops.inputs import EPSILON_HIGH, EPSILON_LOW, LinearBatch, LossBatch, RowsCase, head_case, linear_batch
from thinktwice_kernels import linear_grpo_loss, reference
from thinktwice_kernels.triton import head_product

PRODUCT_IN_TRITON, PRODUCT_BY_CUBLAS = f"{OURS}, product in Triton", f"{OURS}, product by cuBLAS"


def outputs(loss: Tensor, batch: LinearBatch) -> Outputs:
    return {"loss": loss.detach(), **gradients(loss, batch)}


def ours(batch: LinearBatch) -> Outputs:
    tensors = batch.hidden, batch.weight, batch.targets, batch.loss.advantages, batch.loss.cu_seqlens
    loss, _ = linear_grpo_loss(*tensors, **batch.loss.options())
    return outputs(loss, batch)


def with_product(faster: Iterable[int]) -> Callable[[LinearBatch], Outputs]:
    """Ours where Triton's product of the logits, with exponentials in its epilogue, is the faster one on these alone.

    Args:
        faster: compute capabilities.
    """

    def run(batch: LinearBatch) -> Outputs:
        with patch.object(head_product, "MEASURED_FASTER", frozenset(faster)):
            return ours(batch)

    return run


def has_no_block(device: torch.device) -> str | None:
    """Why there is no choice of the product."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in head_product.BLOCKS:
        return None
    return "has blocks for Hopper and Blackwell only"


def truth(batch: LinearBatch) -> Outputs:
    logps = true_logps(batch).requires_grad_()
    loss, _ = reference.grpo_loss(logps, batch.loss.advantages.double(), batch.loss.cu_seqlens, **batch.loss.options())
    (d_logps,) = torch.autograd.grad(loss, logps)
    return {"loss": loss.detach(), **true_gradients(batch, d_logps)}


def with_loss(logps: Callable[[LinearBatch], Tensor]) -> Callable[[LinearBatch], Outputs]:
    return lambda batch: outputs(plain_loss(logps(batch), batch.loss), batch)


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
    return outputs(loss, batch)


def liger_triton_loss(batch: LinearBatch) -> Outputs:
    """From whole logits, of which it drops the last of each sequence."""
    triton_grpo_loss = from_project("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    padded = F.pad(batch.hidden.view(*batch.loss.shape, -1), (0, 0, 0, 1))
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
    return outputs(loss, batch)


def _in_rows(values: Tensor | None, loss: LossBatch) -> Tensor | None:
    return None if values is None else values.view(loss.shape)


def _padding_mask(loss: LossBatch) -> Tensor:  # [S, tokens of each]
    if loss.loss_mask is None:
        return torch.ones(loss.shape, device=loss.advantages.device)
    return loss.loss_mask.view(loss.shape).float()


CASES: dict[Size, list[RowsCase]] = {
    "toy": [
        head_case("toy", 64, only_targets=True),
        head_case("toy", 64, old_logps=False, only_targets=True, memory=False),
        head_case("toy", 64, skippable=True, only_targets=True, memory=False),
    ],
    # Groups of short responses, as the shipped task has them: that is what a CPU trains. In long ones Liger, which
    # takes a sequence at a time, has better products, and all contenders come nearer to the products alone.
    "cpu": [
        head_case("Qwen3 vocabulary", 512, length=64),
        head_case("Qwen3 vocabulary", 3072, length=64, only_targets=True),
        head_case("small vocabulary", 1024, length=64, only_targets=True, memory=False),
        head_case("small vocabulary", 1024, length=64, old_logps=False, only_targets=True, memory=False),
        head_case("small vocabulary", 1024, length=64, skippable=True, only_targets=True, memory=False),
        head_case("small vocabulary", 1024, length=256, counts=False, only_targets=True, memory=False),
    ],
    "gpu": [
        *(head_case("Qwen3-4B", tokens) for tokens in (4096, 1024, 8192, 16384, 32768)),
        head_case("Qwen3-4B", 8192, old_logps=False),
        head_case("Qwen3-4B", 8192, skippable=True),
        *(head_case("OLMo-3-7B", tokens) for tokens in (1024, 8192, 32768)),
        *(head_case("Llama-3.2-3B", tokens) for tokens in (1024, 8192, 32768)),
    ],
}
_CPU_TARGETS = (
    Target("times as fast as plain torch", times_slower(PLAIN), 1),
    Target("times as fast as Liger's chunked loss", times_slower("liger chunked"), 2),
    # For the most tokens: gradient and tile, which do not grow with them, are a floor.
    Target(
        "share of plain torch's peak memory, T=3072", memory_share(PLAIN), 0.1, at_most=True,
        only="Qwen3 vocabulary V=151936 H=256 T=3072",
    ),
)  # fmt: skip
_GPU_TARGETS = (
    Target("share of the rate of the bare products", own("of_ceiling"), 0.9),
    Target("times as fast as Liger's scaled CE + loss", times_slower("liger scaled CE + loss"), 1.4),
    Target("times as fast as Liger's chunked loss", times_slower("liger chunked"), 5),
    Target("times as fast as verl's kernel + loss", times_slower("verl + loss"), 2.5),
    Target("times as fast as the fastest peer", fastest_peer(), 1),
)
OPS = [
    Op(
        name="linear_grpo_loss",
        cases=CASES,
        inputs=linear_batch,
        truth=truth,
        contenders={
            OURS: Contender(ours),
            PRODUCT_IN_TRITON: Contender(with_product(head_product.BLOCKS), has_no_block),
            PRODUCT_BY_CUBLAS: Contender(with_product(()), has_no_block),
            **{
                name if name == PLAIN else f"{name} + loss": replace(peer, run=with_loss(peer.run))
                for name, peer in PEERS.items()
            },
            "torch.compile": Contender(lambda batch: outputs(compiled(_torch_loss)(batch), batch), compiled=True),
            "liger chunked": Contender(liger_chunked_loss, needs("liger_kernel"), in_targets=True),
            "liger triton loss": Contender(liger_triton_loss, needs("liger_kernel", "cuda")),
        },
        work=flop,
        unit="TFLOP/s",
        ceiling=PRODUCTS,
        targets={"cpu": _CPU_TARGETS, "cuda": _GPU_TARGETS},
    )
]
