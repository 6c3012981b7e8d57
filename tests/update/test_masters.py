"""One process in bfloat16: one set of weights for rollouts and updates, float32 masters beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from tests.checkpoints import everything, same, save
from tests.small_models import FAMILIES, own_model
from tests.update.cases import adapt, change, config, rollouts, updater, weights
from thinktwice_fast.errors import UserError
from thinktwice_fast.model import sharding
from thinktwice_fast.model.loading import checkpoint_layers
from thinktwice_fast.model.masters import MasterProduct, hand_over_gradients
from thinktwice_fast.model.sharding import ModelPair, _shard, cast_parameters, pair_models
from thinktwice_fast.run.checkpoint import load_checkpoint
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import Updater

pytestmark = pytest.mark.usefixtures("one_process")
BFLOAT16 = torch.bfloat16


def sharded(family: str) -> ModelPair:
    """What several processes have."""
    model = own_model(family)
    rollout = cast_parameters(own_model(family), BFLOAT16)
    policy = _shard(model, BFLOAT16, 0)
    return ModelPair(policy, rollout, policy)


def with_adamw(models: ModelPair, **options: Any) -> Updater:
    made = config(**{"update__learning_rate": 1e-3, "update__warmup_steps": 0} | options)
    optimizer, schedule = build_optimizer(models.masters, made.update, 10)
    return Updater(models, None, optimizer, schedule, made)


def assert_in_step(models: ModelPair) -> None:
    assert models.rollout is models.policy.model
    for master, read in zip(models.masters.model.parameters(), models.rollout.parameters(), strict=True):
        assert master.dtype == torch.float32 and read.dtype == BFLOAT16
        assert torch.equal(read, master.bfloat16())
        assert read.grad is None and master.grad is None


def test_one_set_of_weights_follows_its_masters_in_place() -> None:
    models = pair_models(own_model("qwen3"), BFLOAT16)
    assert torch.equal(weights(models.masters), weights(own_model("qwen3")))
    assert_in_step(models)
    places, before = [parameter.data_ptr() for parameter in models.rollout.parameters()], weights(models.rollout)
    with_adamw(models).policy_update([rollouts(8, seed) for seed in range(2)])
    assert_in_step(models)
    assert [parameter.data_ptr() for parameter in models.rollout.parameters()] == places
    assert not torch.equal(weights(models.rollout), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [16384, 40])
def test_updates_are_those_of_sharded_weights(family: str, budget: int) -> None:
    """Later mini-batches would see it if the weights lagged behind."""
    changes = []
    for models in (pair_models(own_model(family), BFLOAT16), sharded(family)):
        optimizer = torch.optim.SGD(models.masters.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        made = Updater(
            models, None, optimizer, schedule, config(update__microbatch_tokens=budget, update__grad_clip=1.0)
        )
        changes.append(change(made, [rollouts(8, seed) for seed in range(3)])[0])
    assert (changes[0] - changes[1]).norm() < 1e-4 * changes[1].norm()


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    made = updater(config(), dtype=BFLOAT16)
    parameter, master = next(made.models.policy.parameters()), next(made.models.masters.parameters())
    for term in (1.0, 2**-12):
        (parameter * term).sum().backward()
        assert parameter.grad is None
    assert bool((master.grad == 1 + 2**-12).all())


def test_a_products_gradient_reaches_its_master_unrounded() -> None:
    random = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(s, generator=random).to(BFLOAT16).requires_grad_() for s in ((6, 8), (6,)))
    masters = {leaf: leaf.detach().float().requires_grad_() for leaf in (weight, bias)}
    hand_over_gradients(masters)
    product = MasterProduct(masters)
    wanted = torch.zeros(6, 8)
    for rows in (5, 300):
        x, grad = (torch.randn(rows, size, generator=random).to(BFLOAT16) for size in (8, 6))
        product(x.requires_grad_(), weight, bias).backward(grad)
        assert x.grad is not None and torch.equal(x.grad, grad @ weight)
        assert weight.grad is None and bias.grad is None
        wanted += grad.float().T @ x.float()
    of_weight, of_bias = (master.grad for master in masters.values())
    assert of_weight is not None and of_bias is not None
    assert not torch.equal(of_weight, of_weight.to(BFLOAT16).float())
    torch.testing.assert_close(of_weight, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prepare", [lambda model: None, checkpoint_layers])
def test_gradients_that_are_not_rounded_are_near_those_that_are(prepare: Callable[[Any], None]) -> None:
    found = []
    for rounded in (False, True):
        made = updater(config(update__microbatch_tokens=40), dtype=BFLOAT16, prepare=prepare)
        weights_of = [half.parameters() for half in (made.models.policy, made.models.masters)]
        if not rounded:  # as on a GPU
            made.models.product = MasterProduct(dict(zip(*weights_of, strict=True)))
        found.append(change(made, [rollouts(8)])[0])
    assert 0 < (found[0] - found[1]).norm() < 3e-3 * found[1].norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_products_of_several_micro_batches_add_up_on_a_gpu() -> None:
    found = []
    for product in (None, linear):
        made = updater(config(update__microbatch_tokens=40), dtype=BFLOAT16, model=own_model("qwen3").cuda())
        assert isinstance(made.models.product, MasterProduct)
        made.models.product = product or made.models.product
        found.append(change(made, [rollouts(8)])[0])
    assert 0 < (found[0] - found[1]).norm() < 3e-3 * found[1].norm()


def test_checkpoints_go_from_one_kind_of_masters_to_the_other(tmp_path: Path) -> None:
    alone, several = with_adamw(pair_models(own_model("llama"), BFLOAT16)), with_adamw(sharded("llama"))
    for number, (first, second) in enumerate([(alone, several), (several, alone)]):
        first.policy_update([rollouts(8, number)])
        folder = save(tmp_path, number, first)
        load_checkpoint(folder, second)
        assert same(everything(second), everything(first))
        assert torch.equal(weights(second.models.rollout), weights(first.models.rollout))


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    made = with_adamw(pair_models(own_model("llama"), torch.float32))
    folder = save(tmp_path, 1, made)
    state = json.loads((folder / "state.json").read_text())
    state["layout"] = 2
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"a checkpoint of an earlier version.*weights with --model\.path"):
        load_checkpoint(folder, made)


def test_log_probabilities_leave_nothing_gathered() -> None:
    """No backward pass follows that would let embedding and head go, and rollouts do."""
    made = updater(config(), adapt=adapt, dtype=BFLOAT16)
    made.policy_update([rollouts(8)])
    made.logps(rollouts(4))
    assert all(isinstance(parameter, DTensor) for parameter in made.models.policy.parameters())


def test_layers_become_float32_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only fits sharded need not fit whole in float32 at the start."""
    whole: list[int] = []  # float32 elements that are not sharded yet, as each part is about to be

    def spy(module: torch.nn.Module, **options: Any) -> Any:
        there = [weight for weight in model.parameters() if not isinstance(weight, DTensor)]
        whole.append(sum(weight.numel() for weight in there if weight.dtype == torch.float32))
        return fully_shard(module, **options)

    monkeypatch.setattr(sharding, "fully_shard", spy)
    model = cast_parameters(own_model("qwen3"), BFLOAT16)
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    rest = sum(parameter.numel() for parameter in model.parameters()) - 3 * layer
    policy = _shard(model, BFLOAT16, 0)
    assert whole == [layer, layer, layer, rest]
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
