"""What test_sharded.py runs under torchrun: a head whose weight FSDP2 shards, with each op that takes one."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from thinktwice_kernels import grpo_loss, linear_grpo_loss, linear_logprobs

H, V, LENGTHS = 6, 13, [4, 3, 2, 5]  # 13 rows: uneven shards


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(H, H)
        self.out = nn.Linear(H, V)

    def forward(self, x: Tensor, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return loss(self.proj(x), self.out.weight, self.out.bias)


def fused(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, advantages: Tensor, cu: Tensor, count: int
) -> Tensor:
    return linear_grpo_loss(hidden, weight, targets, advantages, cu, bias=bias, normalizer=count, memory_budget=300)[0]


def in_two_steps(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, advantages: Tensor, cu: Tensor, count: int
) -> Tensor:
    return grpo_loss(linear_logprobs(hidden, weight, targets, bias=bias), advantages, cu, normalizer=count)[0]


def gradients(loss_of: Callable[..., Tensor], rank: int, world: int) -> list[Tensor]:
    """Of the whole batch's loss, each process having its share of the sequences. Collective where world > 1."""
    torch.manual_seed(0)
    head = Head()
    tokens = sum(LENGTHS)
    x, targets = torch.randn(tokens, H), torch.randint(0, V, (tokens,))
    advantages = torch.tensor([1.0, -0.5, 0.0, 2.0])
    if world > 1:
        fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
        assert isinstance(head.out.weight, DTensor)
    own = range(rank * len(LENGTHS) // world, (rank + 1) * len(LENGTHS) // world)
    start = sum(LENGTHS[: own.start])
    lengths = torch.tensor([0, *(LENGTHS[s] for s in own)])
    rows = slice(start, start + int(lengths.sum()))
    cu = lengths.cumsum(0).to(torch.int32)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss_of(hidden, weight, bias, targets[rows], advantages[own.start : own.stop], cu, tokens)

    (head(x[rows], loss) * world).backward()  # FSDP2 averages over the processes, and the loss is a share of a sum
    found = []
    for parameter in head.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {f.__name__: gradients(f, dist.get_rank(), dist.get_world_size()) for f in (fused, in_two_steps)}
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
