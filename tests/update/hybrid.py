"""What test_hybrid.py runs in one process, two and four: updates, a state's round trip, the layout of the shards."""

import sys
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests import checkpoints
from tests.small_models import own_model
from tests.update.cases import config, rollouts, share, updater, weights
from thinktwice_fast import parallel
from thinktwice_fast.model.sharding import own_shard, pair_models
from thinktwice_fast.run.checkpoint import load_checkpoint
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import Updater


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
    own = own_shard(largest)
    groups = largest.device_mesh.get_all_groups() if isinstance(largest, DTensor) else []
    waits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert waits <= {timedelta(seconds=60)}, "a group of the mesh waits as long as torch likes"
    return after - before, metrics, parallel.gather(own.numel())


def round_trip() -> torch.Tensor:
    """Weights and AdamW's state saved, and loaded into others; gives the weights."""
    made = []
    for seed in (0, 7):
        options = config(update__shard_processes=max(1, parallel.world_size() // 2))
        models = pair_models(own_model("llama", seed=seed), torch.float32, None, options.update.shard_processes)
        made.append(Updater(models, None, *build_optimizer(models.masters, options.update, 10), options))
        made[-1].policy_update(share([rollouts(8, seed)]))
    load_checkpoint(checkpoints.save(checkpoints.one_folder(Path(mkdtemp())), 1, made[0]), made[1])
    assert checkpoints.same(checkpoints.everything(made[1]), checkpoints.everything(made[0]))
    assert torch.equal(weights(made[1].models.policy), weights(made[1].models.rollout))
    return weights(made[1].models.policy)


def everything() -> dict[str, Any]:
    """All results, those of rank 0. Collective."""
    return {"update": update(), "state": round_trip()}


if __name__ == "__main__":
    from tests.update.worlds import save

    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"), 60.0)
    save(everything(), Path(sys.argv[1]))
