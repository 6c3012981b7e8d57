"""What test_hybrid.py runs in one process, two and four: updates, a state's round trip, the layout of the shards."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.small_models import own_model
from tests.update.cases import config, rollouts, share, updater, weights
from thinktwice_fast import parallel
from thinktwice_fast.config import UpdateOptions
from thinktwice_fast.model.sharding import full_state, load_full_state, pair_models
from thinktwice_fast.update.optimizer import build_optimizer


def update() -> tuple[torch.Tensor, dict[str, float], list[int]]:
    """The change of the weights, the metrics, and the elements of the largest parameter that each process has."""
    world = parallel.world_size()
    options = {"update__grad_clip": 0.3, "update__microbatch_tokens": 45, "loss__beta": 0.2}
    made = updater(config(update__shard_processes=max(1, world // 2), **options))
    before = weights(made.models.policy)
    metrics = made.policy_update(share([rollouts(8), rollouts(8, 1)]))
    after = weights(made.models.policy)
    assert torch.equal(after, weights(made.models.rollout)), "rollouts read other weights than the trained ones"
    largest = max(made.models.policy.parameters(), key=lambda parameter: parameter.numel())
    own = largest.to_local() if hasattr(largest, "to_local") else largest
    return after - before, metrics, parallel.gather(own.numel())


def state_round_trip() -> torch.Tensor:
    """Weights saved whole, and loaded into a model that started from others."""
    shards = max(1, parallel.world_size() // 2)
    first = pair_models(own_model("llama"), torch.float32, shard_processes=shards)
    state = {name: value.clone() for name, value in full_state(first.policy).items()}
    other = pair_models(own_model("llama", seed=7), torch.float32, shard_processes=shards)
    load_full_state(other.policy, state)
    other.sync()
    assert torch.equal(weights(other.policy), weights(other.rollout))
    return weights(other.policy)


def optimizer_round_trip() -> None:
    """AdamW's state as a checkpoint has it, whole, set in a fresh optimizer of other weights."""
    shards = max(1, parallel.world_size() // 2)
    optimizers, policies = [], []
    for seed in (0, 7):
        policy = pair_models(own_model("llama", seed=seed), torch.float32, shard_processes=shards).policy
        optimizer, _ = build_optimizer(policy, UpdateOptions(), 10)
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, 0.5 + seed)
        optimizer.step()
        optimizers.append(optimizer)
        policies.append(policy)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(policies[0], optimizers[0], options=whole)
    assert bool(saved) == (parallel.rank() == 0)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(policies[1], optimizers[1], saved, options=from_rank_0)
    for first, second in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            kept, loaded = optimizers[0].state[first][name], optimizers[1].state[second][name]
            assert torch.equal(kept.full_tensor(), loaded.full_tensor())


def everything() -> dict[str, Any]:
    """All results, those of rank 0. Collective."""
    optimizer_round_trip()
    return {"update": update(), "state": state_round_trip()}


if __name__ == "__main__":
    from tests.update.worlds import save

    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"), 60.0)
    save(everything(), Path(sys.argv[1]))
