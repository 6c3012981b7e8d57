"""AdamW and its schedules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from tests.checkpoints import everything, same, save
from tests.small_models import own_model
from tests.update.cases import rollouts
from thinktwice_fast.config import Config, UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.lora import whole
from thinktwice_fast.model.sharding import own_shard, pair_models
from thinktwice_fast.run.checkpoint import load_checkpoint
from thinktwice_fast.update import optimizer as module_under_test
from thinktwice_fast.update.optimizer import build_optimizer, clear_state, few_threads
from thinktwice_fast.update.updater import Updater


def rates(steps: int, total: int = 10, **options: Any) -> list[float]:
    module = torch.nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(module, UpdateOptions(learning_rate=1.0, **options), total)
    found = []
    for _ in range(steps):
        module(torch.ones(2)).sum().backward()
        optimizer.step()
        found.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step()
    return found


def test_warm_up_rises_in_equal_steps_from_above_zero_and_stays() -> None:
    assert rates(8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])
    assert rates(3, warmup_steps=0) == [1.0] * 3


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_reaches_zero_after_the_run_or_the_given_steps(shape: str) -> None:
    for options in ({"total": 10}, {"total": 99, "lr_decay_steps": 10}):
        got = rates(11, warmup_steps=0, lr_schedule=shape, **options)
        assert got[0] == 1.0 and got[5] == pytest.approx(0.5)
        assert 0 < got[9] < 0.15 and got[10] == pytest.approx(0, abs=1e-9)
        assert got == sorted(got, reverse=True)


def test_options_reach_adamw_and_frozen_weights_stay_out() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    options = UpdateOptions(learning_rate=3e-4, adam_betas=(0.8, 0.95), weight_decay=0.01, warmup_steps=0)
    optimizer, _ = build_optimizer(module, options, 10)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 0.01)
    assert [id(parameter) for parameter in group["params"]] == [id(module.weight)]
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("sharded", [False, True])
def test_moments_made_at_once_are_those_of_the_first_step(one_process: None, sharded: bool) -> None:
    """And that step makes none anew."""
    found = []
    for at_once in (False, True):
        torch.manual_seed(0)
        module = torch.nn.Linear(6, 5)
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            module.weight, module.bias = (
                torch.nn.Parameter(distribute_tensor(weight.detach(), mesh)) for weight in module.parameters()
            )
        optimizer, _ = build_optimizer(module, UpdateOptions(learning_rate=1e-2, weight_decay=0.1), 10)
        for begin in range(2):  # also after steps
            clear_state(optimizer, at_once=at_once)
            places = [state[name].data_ptr() for state in moments(optimizer) for name in ("exp_avg", "exp_avg_sq")]
            assert len(places) == (4 if at_once else 0)
            for step in range(2):
                for number, weight in enumerate(module.parameters()):
                    weight.grad = torch.full_like(weight, 0.1 + begin - step + number)
                optimizer.step()
            if at_once:
                assert places == [
                    state[name].data_ptr() for state in moments(optimizer) for name in ("exp_avg", "exp_avg_sq")
                ]
        found.append((moments(optimizer), [whole(weight) for weight in module.parameters()]))
    (late, weights), (early, early_weights) = found
    assert [state.keys() for state in early] == [state.keys() for state in late]
    for states in zip(late, early, strict=True):
        for key in states[0]:
            assert torch.equal(states[0][key], states[1][key]) and states[0][key].dtype == states[1][key].dtype
    assert all(torch.equal(*pair) for pair in zip(weights, early_weights, strict=True))


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """Of each weight; one process has all of a sharded one."""
    return [{key: own_shard(value) for key, value in state.items()} for state in optimizer.state.values()]


EIGHT_BIT = UpdateOptions(optimizer="adamw8bit", warmup_steps=0, learning_rate=1e-2)


def stepped(options: UpdateOptions, steps: int = 3) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A layer of two blocks of 8-bit moments and a bias that has too few elements for them, after some steps."""
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 128)
    optimizer, _ = build_optimizer(module, options, 10)
    for _ in range(steps):
        module(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def test_eight_bit_moments_follow_adamw_at_a_quarter_of_its_memory() -> None:
    pytest.importorskip("bitsandbytes")
    module, optimizer = stepped(EIGHT_BIT)
    exact, _ = stepped(UpdateOptions(warmup_steps=0, learning_rate=1e-2))
    start, _ = stepped(EIGHT_BIT, 0)
    moved = exact.weight - start.weight
    # Each moment is rounded to one of 256 steps of its block's largest.
    assert (module.weight - exact.weight).norm() < 0.05 * moved.norm()
    state = [v for v in optimizer.state[module.weight].values() if isinstance(v, torch.Tensor) and v.dim() == 2]
    assert sum(tensor.nbytes for tensor in state) == 2 * module.weight.numel()


def test_eight_bit_moments_come_back_from_a_checkpoint(one_process: None, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def made(seed: int) -> Updater:
        models = pair_models(own_model("llama", seed=seed), torch.float32)
        return Updater(models, None, *build_optimizer(models.masters, EIGHT_BIT, 10), Config())

    first, second = made(0), made(7)
    first.policy_update([rollouts(8)])
    load_checkpoint(save(tmp_path, 1, first), second)
    assert {value.dtype for value in everything(second).values()} == {torch.uint8, torch.float32}
    assert same(everything(second), everything(first))
    for updater in (first, second):
        updater.policy_update([rollouts(8, 1)])
    assert same(everything(second), everything(first))


def test_eight_bits_need_their_library_and_whole_weights(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 2)
    monkeypatch.setattr(module_under_test, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes: install it"):
        build_optimizer(module, EIGHT_BIT, 10)
    monkeypatch.setattr(module_under_test, "find_spec", lambda name: name)
    module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(UserError, match="can't take sharded weights: start one process"):
        build_optimizer(module, EIGHT_BIT, 10)


@pytest.mark.parametrize(("size", "threads"), [(8, 1), (300, 2)])
def test_small_weights_are_stepped_by_one_thread(size: int, threads: int) -> None:
    optimizer, _ = build_optimizer(torch.nn.Linear(size, size, bias=False), UpdateOptions(), 10)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), few_threads(optimizer):
            assert torch.get_num_threads() == threads
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
