"""The trained weights (float32 master, sharded with FSDP2 where that pays) and the weights rollouts read.

One process trains and samples with the very same tensors: in float32 they are the masters, in another type these stand
beside them and each optimizer step is copied over. Of several processes' the masters are sharded (over all, or over
those of a node and replicated over the nodes, which keeps the gathering inside a node) and compute in the compute type,
and rollouts read a whole copy in that type whose addresses never move; ``ModelPair.sync`` refreshes it once after each
update phase. With LoRA only the adapters have a float32 master, the weights below them stay in the compute type, and
the copy has the two merged.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from thinktwice_fast import parallel
from thinktwice_fast.model.lora import Adapters, merged_weights, whole
from thinktwice_fast.model.masters import MasterProduct, hand_over_gradients
from thinktwice_fast.model.policy import Model, Policy, decoder_layers, iterate_named
from thinktwice_fast.model.transformer import Product, Transformer

M = TypeVar("M", bound=nn.Module)


@dataclass
class ModelPair:
    """``policy`` computes losses, ``rollout`` is decoded with, ``masters`` are optimized and saved."""

    policy: Policy
    rollout: Model
    masters: Policy  # the policy itself, unless that computes in another type on its own
    product: Product = linear  # of the policy's weights

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the trained weights to where rollouts read them. Collective: every process calls it."""
        if self.rollout is self.masters.model:
            return
        trained = merged_weights(dict(self.masters.model.named_parameters()), self.masters.adapters)
        for (_, weight), read in zip(trained, self.rollout.parameters(), strict=True):
            # Sharded ones are rounded before they are gathered; a whole one is as it is copied.
            read.copy_(whole(weight.to(read.dtype)) if isinstance(weight, DTensor) else weight)

    def stepped(self) -> None:
        """The masters have moved: the policy is to compute with them."""
        if self.policy is not self.masters:
            self.sync()

    def updated(self) -> None:
        """The last of an update's steps is done: rollouts are to read its weights. Collective."""
        if self.policy is self.masters:  # else each step has seen to it
            self.sync()


def shards_weights(world: int, dtype: torch.dtype, *, lora: bool) -> bool:
    """Whether ``pair_models`` has FSDP2 shard the trained weights, for ``world`` processes."""
    return world > 1 or (lora and dtype != torch.float32)


def pair_models(
    model: Model,
    dtype: torch.dtype,
    adapt: Callable[[Model], Adapters] | None = None,
    shard_processes: int = 0,
) -> ModelPair:
    """Split a freshly loaded model into the trained policy and what rollouts read. Collective.

    The process group must be up; ``dtype`` is the compute type. ``adapt`` puts LoRA adapters into the policy's model.
    Each ``shard_processes`` neighbouring processes (of a node, say) share one sharded master, and the groups have equal
    ones; 0 = all processes share one.
    """
    alone = dist.get_world_size() == 1
    if alone and adapt is None:
        return _one_set(model, dtype)
    rollout = cast_parameters(copy.deepcopy(model), dtype).requires_grad_(False)
    adapters = adapt(model) if adapt is not None else None
    if shards_weights(dist.get_world_size(), dtype, lora=adapt is not None):
        policy = _shard(model, dtype, shard_processes)
    else:
        policy = Policy(_as_masters(model, dtype))
    policy.adapters = adapters
    return ModelPair(policy, rollout, policy)


def warm_up(models: ModelPair) -> None:
    """Have NCCL take its memory, which it does at a group's first exchange. Collective."""
    mesh = _mesh_of(models.policy)
    if mesh is None or mesh.device_type != "cuda":
        return
    for group in mesh.get_all_groups():
        dist.all_reduce(torch.zeros(1, device=models.policy.device), group=group)
    models.sync()  # it gathers


def frozen_copy(model: Model, dtype: torch.dtype, shard_processes: int = 0) -> Policy:
    """A copy of a freshly loaded model that is never trained (the reference of a KL term). Collective."""
    frozen = cast_parameters(copy.deepcopy(model), dtype).requires_grad_(False)
    return Policy(frozen) if dist.get_world_size() == 1 else _shard(frozen, dtype, shard_processes)


def cast_parameters(model: M, dtype: torch.dtype) -> M:
    """Change the parameters' type in place; buffers (rotary frequencies) stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def own_state(policy: Policy) -> dict[str, torch.Tensor]:
    """The master weights (and buffers that are saved) under the model's own names, each once; sharded as they are."""
    named: dict[torch.Tensor, str] = {}
    for name, value in policy.model.state_dict(keep_vars=True).items():
        named.setdefault(value, name)
    return {name: value for value, name in named.items()}


def saved_weights(
    model: Model, weights: Mapping[str, torch.Tensor], adapters: Adapters | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole values of a saved model, adapters merged, one after another. Collective if sharded.

    Args:
        weights: as ``own_state`` has them; of a mapping that reads them each is asked for when it is its turn.
    """
    merged = merged_weights(weights, adapters)
    return iterate_named(model, ((name, whole(value)) for name, value in merged))


def full_state(policy: Policy) -> dict[str, torch.Tensor]:
    """Whole master weights on the CPU, adapters merged, under transformers' names; empty but on rank 0. Collective."""
    weights = saved_weights(policy.model, own_state(policy), policy.adapters)
    first = dist.get_rank() == 0
    return {name: value.cpu() for name, value in weights if first}


def cpu_mesh(policy: Policy) -> DeviceMesh | None:
    """A mesh for copies of the sharded weights on the CPU, of the same processes; None where none is sharded.

    Collective.
    """
    mesh = _mesh_of(policy)
    if mesh is None or mesh.device_type == "cpu":
        return mesh
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sharded tensor this process's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cpu_copy(tensor: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """A copy on the CPU; of a sharded tensor of this process's shard, sharded alike over ``mesh``."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    assert mesh is not None, "as `cpu_mesh` gives it"
    local = own_shard(tensor).detach().to("cpu", copy=True)
    return DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def trained_shards(policy: Policy) -> list[torch.Tensor]:
    """Copies on the CPU of what this process has of each trained weight."""
    return [own_shard(weight).detach().to("cpu", copy=True) for weight in _trained(policy)]


@torch.no_grad()
def set_trained_shards(policy: Policy, shards: Sequence[torch.Tensor]) -> None:
    """Set the trained weights to what ``trained_shards`` gave; every process its own."""
    for weight, shard in zip(_trained(policy), shards, strict=True):
        own_shard(weight).copy_(shard)


def _trained(policy: Policy) -> list[torch.Tensor]:
    """By way of the state, which is sharded also where a forward pass has left weights gathered."""
    return [weight for weight in own_state(policy).values() if weight.requires_grad]


def _one_set(model: Model, dtype: torch.dtype) -> ModelPair:
    policy = Policy(model)
    if dtype == torch.float32:
        cast_parameters(model, dtype)
        return ModelPair(policy, model, policy)
    masters = Policy(cast_parameters(copy.deepcopy(model), torch.float32))
    cast_parameters(model, dtype)
    by_weight: dict[torch.Tensor, torch.Tensor] = dict(zip(model.parameters(), masters.model.parameters(), strict=True))
    hand_over_gradients(by_weight)
    unrounded = isinstance(model, Transformer) and model.device.type == "cuda"
    return ModelPair(policy, model, masters, MasterProduct(by_weight) if unrounded else linear)


def _shard(model: Model, dtype: torch.dtype, shard_processes: int) -> Policy:
    """Embedding and head stay gathered from forward to backward, every layer is gathered one ahead of its turn."""
    policy = Policy(model)
    mesh = _mesh(model.device.type, shard_processes)
    # Inputs stay as they are: among them are the rotary tables, which some architectures apply in float32.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # One at a time becomes float32: whole ones of all of them might not fit.
    layers = [fully_shard(_as_masters(layer, dtype), mesh=mesh, mp_policy=precision) for layer in decoder_layers(model)]
    # A frozen model's is never needed again: there is no backward pass that would let it go.
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    fully_shard(_as_masters(policy, dtype), mesh=mesh, mp_policy=precision, reshard_after_forward=frozen)
    # Left alone, FSDP2 gathers a layer when it is called: the GPU has work queued till then, so that the wait is short.
    # Backward already gathers the layer before, in the reverse of the order that forward took.
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    return policy


def _mesh_of(policy: Policy) -> DeviceMesh | None:
    """What the weights are sharded over; None where none is."""
    return next((weight.device_mesh for weight in policy.parameters() if isinstance(weight, DTensor)), None)


def _as_masters(module: M, dtype: torch.dtype) -> M:
    """What is trained in float32, in place, and the rest in the compute type; but for what is sharded already."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return module


def _mesh(device_type: str, shard_processes: int) -> DeviceMesh:
    """All processes in a row, or groups (replicas) by processes in a group (shards).

    The device is said outright: left alone, FSDP2 takes the machine's accelerator also for a model on the CPU.
    """
    world = dist.get_world_size()
    if shard_processes in (0, world):
        return init_device_mesh(device_type, (world,))
    shape = (world // shard_processes, shard_processes)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    parallel.limit_waits(mesh.get_all_groups())
    return mesh
