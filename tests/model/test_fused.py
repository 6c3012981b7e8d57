"""Fused attention modules: the numbers of transformers' own, and nothing else of the model changed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

from tests.model.padded import PaddedAttention
from tests.model.rounding import assert_as_exact
from tests.small_models import FAMILIES, VOCABULARY, family_config, random_model
from thinktwice_fast.model import fused
from thinktwice_fast.model.attention import NAME, PagedAttention
from thinktwice_fast.model.fused import fuse_attention
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import Policy, linear_head

LENGTHS = [5, 40, 17]  # shorter and longer than OLMo-3's window of 8 here


def small_model(family: str, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """With norms and biases that are not ones and zeros."""
    config: Any = family_config(family)
    config.attention_bias = bias
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def paged_logits(model: Any) -> Tensor:  # [T, V] of the sequences' last tokens, in two passes over the cache
    attention = model.model.layers[0].self_attn
    cache = PagedKVCache(3, 20, model.config.num_key_value_heads, attention.head_dim, dtype=model.dtype)
    handles = [cache.prefill() for _ in LENGTHS]
    random = torch.Generator().manual_seed(1)
    found = []
    for counts in ([length - 1 for length in LENGTHS], [1] * len(LENGTHS)):
        plan = cache.extend(handles, counts)
        assert plan is not None
        ids = torch.randint(VOCABULARY, (sum(counts),), generator=random)
        with torch.inference_mode():
            logits = Policy(model)(
                ids, plan.positions, PagedAttention(cache, plan), torch.arange(len(ids)), linear_head
            )
        found.append(logits)
    return torch.cat(found)


@pytest.mark.parametrize("frozen", [False, True], ids=["three products", "one product"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_the_modules(
    monkeypatch: pytest.MonkeyPatch, family: str, bias: bool, frozen: bool
) -> None:
    model = small_model(family, bias=bias)
    expected = paged_logits(model)
    model.requires_grad_(not frozen)
    assert fuse_attention(model, 64)
    monkeypatch.setattr(PagedKVCache, "attend", None)  # what the modules' own forward would call
    got = paged_logits(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_from_the_truth(family: str, frozen: bool) -> None:
    """Trained weights of this type have their masters elsewhere, and are put side by side as well."""
    model = small_model(family, dtype=torch.bfloat16).requires_grad_(not frozen)
    exact, theirs = paged_logits(copy.deepcopy(model).float()), paged_logits(model)
    assert fuse_attention(model, 64)
    attention = model.base_model.layers[0].self_attn
    assert attention.k_proj.weight.data_ptr() == attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
    ours = paged_logits(model)
    assert (ours - exact).square().mean() <= 1.2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_runs_as_before(family: str) -> None:
    """Bit for bit, with gradients and the same weights under the same names."""
    model, untouched = small_model(family), small_model(family)
    assert fuse_attention(model, 64)
    results = []
    for each in (untouched, model):
        ids = torch.arange(sum(LENGTHS)) % VOCABULARY
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        attention = PaddedAttention.from_lengths(LENGTHS, torch.device("cpu"))
        logits = Policy(each)(ids, positions, attention, torch.arange(len(ids)), linear_head)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in each.parameters())])
        assert list(each.state_dict()) == list(untouched.state_dict())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_weights_that_are_read_only_are_put_side_by_side_and_may_change() -> None:
    model = small_model("qwen3", bias=True).requires_grad_(False)
    assert fuse_attention(model, 64)
    attention = model.model.layers[1].self_attn
    for part in ("weight", "bias"):
        q, k, v = (getattr(getattr(attention, name), part) for name in ("q_proj", "k_proj", "v_proj"))
        assert k.data_ptr() == q.data_ptr() + q.nbytes and v.data_ptr() == k.data_ptr() + k.nbytes
    other = small_model("qwen3", bias=True)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name))
        for read, trained in zip(model.parameters(), other.parameters(), strict=True):
            read.copy_(trained)
    assert_as_exact([paged_logits(model)], [paged_logits(other)], [paged_logits(other).double()])


def test_an_architecture_that_is_not_known_keeps_its_modules() -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    assert not fuse_attention(model, 64)
    dynamic = family_config("llama")
    dynamic.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(dynamic, attn_implementation=NAME)
    assert not fuse_attention(model, 64)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_module_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen3", NAME)
    own = type(model.model.layers[0].self_attn).forward

    def doubled(self: Any, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        out, weights = own(self, *arguments, **options)
        return 2 * out, weights

    monkeypatch.setattr(fused.Qwen3Attention, "forward", doubled)
    assert not fuse_attention(model, 64)
    assert not any("forward" in vars(module) for module in model.modules())
