"""LoRA: what is trained, what rollouts read, and the gradient, against the formula W + s B A written out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.small_models import FAMILIES, family_config, foreign_model, own, own_model, random_model, write_model
from tests.update.cases import adapt, assert_same_step, config, formula, padded_logps, rollouts, updater
from thinktwice_fast.config import ModelOptions, UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import NAME, causal_attention
from thinktwice_fast.model.loading import load_model, save_model
from thinktwice_fast.model.lora import add_adapters, is_adapter
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.sharding import full_state, own_state, pair_models
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.update.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("one_process")
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def with_biases() -> Any:
    options = family_config("llama").to_dict() | {"attention_bias": True, "mlp_bias": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return own(model)


def adapters_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in own_state(policy).items() if is_adapter(name)}


def logits(policy: Policy) -> torch.Tensor:  # [T, V]
    ids, positions = torch.arange(12) * 37 % 512, torch.arange(12)
    with torch.no_grad():
        return policy(ids, positions, causal_attention([12], ids.device), positions, linear_head)


@pytest.mark.parametrize(
    "make", [*(partial(own_model, family) for family in FAMILIES), with_biases, partial(foreign_model, NAME)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_rollouts_read_what_the_policy_computes(make: Callable[[], Any], dtype: torch.dtype, tolerance: float) -> None:
    models = pair_models(make(), dtype, adapt)
    places = [parameter.data_ptr() for parameter in models.rollout.parameters()]
    before = logits(Policy(models.rollout))
    models.sync()
    assert [parameter.data_ptr() for parameter in models.rollout.parameters()] == places
    assert {parameter.dtype for parameter in models.rollout.parameters()} == {dtype}
    trained, read = logits(models.policy), logits(Policy(models.rollout))
    assert (trained - read).abs().max() < tolerance * trained.abs().max()
    assert (trained - before).abs().max() > 0.1 * trained.abs().max(), "the adapters have to count"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_the_adapters_is_that_of_the_formula_in_float64(family: str) -> None:
    batch = rollouts(11)
    made = updater(config(), family, adapt=adapt)
    before = adapters_of(made.models.policy)
    made.policy_update([batch])
    after = adapters_of(made.models.policy)

    model = random_model(family).double()
    leaves = {name: value.double().requires_grad_() for name, value in before.items()}
    merged = dict(model.named_parameters())
    for adapter in made.models.policy.adapters.all:
        product = leaves[adapter.b] @ leaves[adapter.a]
        merged[f"{adapter.saved}.weight"] = merged[f"{adapter.saved}.weight"].detach() + 6.0 / 4 * product
    logps = padded_logps(lambda **inputs: functional_call(model, merged, kwargs=inputs), batch)
    formula(logps, logps.detach(), batch).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert_same_step(after[name] - before[name], -leaf.grad.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_are_trained(dtype: torch.dtype) -> None:
    made = updater(config(), dtype=dtype, adapt=adapt)
    before = {name: parameter.detach().clone() for name, parameter in made.models.policy.named_parameters()}
    optimizer, _ = build_optimizer(made.models.policy, UpdateOptions(), 10)
    made.policy_update([rollouts(8)])
    for name, parameter in made.models.policy.named_parameters():
        same = (parameter == before[name]).all()
        assert bool(same) != is_adapter(name), name
        assert parameter.dtype == (torch.float32 if is_adapter(name) else dtype)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == sum(map(is_adapter, before)) == 2 * 7 * 3


def test_training_starts_from_the_model_itself_and_from_the_seed() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        options = ModelOptions(lora_rank=2)
        models = pair_models(own_model("qwen3"), torch.float32, lambda m: add_adapters(m, options, seed))
        assert torch.equal(logits(models.policy), logits(Policy(own_model("qwen3"))))
        return adapters_of(models.policy)

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) != (".lora_A." in name) for name in one)


@pytest.mark.parametrize(
    ("asked", "found"),
    [((), LAYERS), (("q_proj", "v_proj"), ["q_proj", "v_proj"]), (("self_attn.o_proj",), ["o_proj"])],
)
def test_targets(asked: tuple[str, ...], found: list[str]) -> None:
    for model in (own_model("llama"), foreign_model(NAME)):
        adapters = adapt(model, targets=asked)
        assert sorted({adapter.saved.rpartition(".")[2] for adapter in adapters.all}) == found
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for adapter in adapters.all for name in (adapter.a, adapter.b)}


@pytest.mark.parametrize("unknown", ["qproj", "proj", "lm_head", "embed_tokens", ""])
def test_targets_that_the_model_does_not_have(unknown: str) -> None:
    with pytest.raises(UserError, match=r"has no linear layer .* below its head: take some of down_proj, gate_proj"):
        adapt(own_model("llama"), targets=("q_proj", unknown))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"--model.lora_rank 4 needs peft, .*: pip install"):
        adapt(own_model("llama"))


@pytest.mark.parametrize(
    ("family", "targets"), [("qwen3", ()), ("olmo3", ("q_proj",)), ("llama", ("v_proj", "mlp.up_proj"))]
)
def test_saved_adapters_load_in_peft(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    device = torch.device("cpu")
    loaded = load_model(ModelOptions(path=str(write_model(tmp_path / "in", family))), 0, device)
    assert isinstance(loaded.model, Transformer)
    models = pair_models(loaded.model, torch.float32, partial(adapt, targets=targets))
    models.sync()
    save_model(models.rollout, full_state(models.policy), loaded.tokenizer, tmp_path / "model", torch.float32)
    assert models.policy.adapters is not None
    models.policy.adapters.save(adapters_of(models.policy), tmp_path / "adapter")
    ids = torch.arange(12)[None] * 37 % 512
    read = logits(Policy(models.rollout))
    for back in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert (back.eval()(input_ids=ids).logits[0] - read).abs().max() < 1e-4 * read.abs().max()
    config_file, weight_file = sorted((tmp_path / "adapter").iterdir())
    assert weight_file.stat().st_mode == config_file.stat().st_mode
