"""What test_two_processes.py runs in one process and in two, to compare."""

import sys
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests import checkpoints
from tests.small_models import own_model
from tests.update.cases import adapt, config, rollouts, share, updater, weights
from thinktwice_fast import parallel
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.model.loading import checkpoint_layers
from thinktwice_fast.model.lora import add_adapters, is_adapter
from thinktwice_fast.model.sharding import full_state, pair_models
from thinktwice_fast.records import Rollout
from thinktwice_fast.run.checkpoint import load_checkpoint
from thinktwice_fast.update.batches import Example
from thinktwice_fast.update.updater import NonFiniteLoss


def uneven() -> list[Rollout]:
    """Long sequences first: the first process has many micro-batches, the second few."""
    return sorted(rollouts(8), key=lambda rollout: -len(rollout.response))


def half_without_signal() -> list[Rollout]:
    """The second half has no advantage, so the second process has nothing to compute."""
    batch = rollouts(8, 3)
    for rollout in batch[4:]:
        rollout.advantage = 0.0
    return batch


def half_ungraded() -> list[list[Rollout]]:
    """Mini-batches of which a process has nothing at all, as where its rewards are missing."""
    first, second = rollouts(8, 4), rollouts(8, 5)
    if parallel.world_size() == 1:
        return [first[:4], second[4:]]
    return [first[:4], []] if parallel.rank() == 0 else [[], second[4:]]


def guided() -> list[list[Rollout]]:
    """A teacher wrote into one response, of the first process."""
    batch = rollouts(8)
    batch[0].guide = [place % 2 == 1 for place in range(len(batch[0].response))]
    return share([batch, rollouts(8, 1)])


RANK_4 = ModelOptions(lora_rank=4, lora_alpha=6.0)
SMALL = {"update__microbatch_tokens": 45}
KEPT = {"loss__rollout_is_denominator": "kept", "loss__rollout_is_cap": 1.5, "loss__rollout_is_floor": 0.5}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, lambda: share([rollouts(8)])),
    "uneven micro-batches": (SMALL, lambda: share([uneven()])),
    "half without signal": (SMALL, lambda: share([half_without_signal()])),
    "half ungraded": (SMALL, half_ungraded),
    "several mini-batches": (SMALL, lambda: share([rollouts(8, seed) for seed in range(3)])),
    "reference": (SMALL | {"loss__beta": 0.2}, lambda: share([uneven(), rollouts(6, 9)])),
    "sequence means": ({"loss__loss_agg_mode": "seq-mean-token-mean"}, lambda: share([uneven()])),
    "guided": (SMALL | {"thinktuning__guide_fallback": "clip", "update__old_logps": "rollout"}, guided),
    "kept tokens": (
        SMALL | KEPT | {"loss__rollout_is": "token-mask"},
        lambda: share([uneven(), half_without_signal()]),
    ),
    "kept sequences": (
        KEPT | {"loss__rollout_is": "sequence-mask", "loss__loss_agg_mode": "seq-mean-token-mean"},
        lambda: share([rollouts(8, 1), rollouts(8, 2)]),
    ),
    "entropy and clipped norm": ({"loss__entropy_coef": 0.1, "update__grad_clip": 0.3}, lambda: share([rollouts(8)])),
}


def update(name: str, family: str = "qwen3") -> tuple[torch.Tensor, dict[str, float]]:
    """The change of the weights, and the metrics, of one phase's update. Collective."""
    options, minibatches = CASES[name]
    made = updater(config(**options), family)
    before = weights(made.models.policy)
    metrics = made.policy_update(minibatches())
    after = weights(made.models.policy)
    assert torch.equal(after, weights(made.models.rollout)), "rollouts read other weights than the trained ones"
    return after - before, metrics


def supervised() -> tuple[torch.Tensor, dict[str, float]]:
    made = updater(config(**SMALL))
    before = weights(made.models.policy)
    (part,) = share([uneven()])
    metrics = made.supervised_update([Example(rollout.prompt, rollout.response) for rollout in part])
    return weights(made.models.policy) - before, metrics


def checkpointed() -> tuple[torch.Tensor, dict[str, float]]:
    """As "plain", with each layer's activations recomputed."""
    made = updater(config(), prepare=checkpoint_layers)
    before = weights(made.models.policy)
    metrics = made.policy_update(share([rollouts(8)]))
    return weights(made.models.policy) - before, metrics


def adapted(options: dict[str, Any], prepare: Any = lambda model: None) -> dict[str, torch.Tensor]:
    """The change of the weights that an update of adapters makes, and that of what rollouts read."""
    made = updater(config(**options), prepare=prepare, adapt=adapt)
    before, read = weights(made.models.policy), weights(made.models.rollout)
    made.policy_update(share([uneven(), rollouts(8, 2)]))
    return {"trained": weights(made.models.policy) - before, "read": weights(made.models.rollout) - read}


def adapter_round_trip() -> dict[str, Any]:
    """Adapters in bfloat16 saved and loaded into other ones; gives what rollouts read before and after."""
    made, other = (
        updater(config(), dtype=torch.bfloat16, adapt=own, model=own_model("llama"))
        for own in (adapt, partial(add_adapters, options=RANK_4, seed=7))
    )
    load_checkpoint(checkpoints.save(checkpoints.one_folder(Path(mkdtemp())), 1, made), other)
    return {
        "saved": {name: value for name, value in checkpoints.everything(made).items() if is_adapter(name)},
        "merged": full_state(made.models.policy),
        "read": weights(made.models.rollout),
        "loaded": weights(other.models.rollout),
    }


def state_round_trip() -> dict[str, Any]:
    """Saved, and loaded into other weights; gives what was saved and what rollouts then read."""
    made, other = (updater(config(), model=own_model("llama", seed=seed)) for seed in (0, 7))
    state = {name: value.clone() for name, value in full_state(made.models.policy).items()}
    assert bool(state) == (parallel.rank() == 0)
    load_checkpoint(checkpoints.save(checkpoints.one_folder(Path(mkdtemp())), 1, made), other)
    return {"state": state, "read": weights(other.models.rollout), "trained": weights(other.models.policy)}


def bfloat16_pair() -> dict[str, torch.Tensor]:
    models = pair_models(own_model("olmo3"), torch.bfloat16)
    trained = weights(models.masters)
    with torch.no_grad():
        for parameter in models.masters.parameters():
            parameter.mul_(1.5)
    stale = weights(models.rollout)
    models.sync()
    return {"trained": trained, "stale": stale, "read": weights(models.rollout)}


def bad_loss_on_one() -> str:
    """The error that this process gets where only the last one has a bad sample."""
    made = updater(config())
    (part,) = share([rollouts(8)])
    if parallel.rank() == parallel.world_size() - 1:
        part[0].advantage = float("inf")
    before = weights(made.models.policy)
    try:
        made.policy_update([part])
    except NonFiniteLoss as error:
        assert torch.equal(weights(made.models.policy), before)
        return str(error)
    return "no error"


def everything() -> dict[str, Any]:
    """All results, those of rank 0. Collective."""
    return {
        "updates": {name: update(name) for name in CASES},
        "windowed": update("several mini-batches", "olmo3"),
        "supervised": supervised(),
        "checkpointed": checkpointed(),
        "adapted": {name: adapted(options) for name, options in (("whole", {}), ("micro-batches", SMALL))},
        "adapted and checkpointed": adapted({}, checkpoint_layers),
        "adapters": adapter_round_trip(),
        "state": state_round_trip(),
        "bfloat16": bfloat16_pair(),
        "errors": parallel.gather(bad_loss_on_one()),
    }


if __name__ == "__main__":
    from tests.update.worlds import save

    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"), 60.0)
    save(everything(), Path(sys.argv[1]))
