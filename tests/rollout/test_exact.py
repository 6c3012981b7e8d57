"""`rollout.exact`: the log-probabilities of rollouts are those of training, bit for bit."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.rollout.drawing import LONGEST, draw, make, requests, tokens
from tests.small_models import FAMILIES, VOCABULARY, random_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import NAME
from thinktwice_fast.model.exact import ExactLinear, ExactSiLU, exact_logprobs
from thinktwice_fast.model.policy import Policy
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.rollout.records import Rollout, Sampling
from thinktwice_fast.update.batches import pack, pack_shared
from thinktwice_kernels import linear_logprobs

LAYOUTS: list[Any] = [pack, pack_shared]


def trained(model: Any, rollouts: list[Rollout], layout: Any, temperature: float) -> list[float]:
    """What the update makes of the rollouts' tokens, one after another."""
    row = layout(rollouts, torch.device("cpu"))

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return exact_logprobs(hidden, weight, bias, row.targets, temperature)

    found: torch.Tensor = Policy(model)(row.input_ids, row.position_ids, row.attention, row.select, head)
    return found.tolist()


@pytest.mark.parametrize(("family", "threads"), [*((family, 1) for family in FAMILIES), ("qwen3", 2)])
def test_rollouts_and_training_agree_bit_for_bit(family: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        # Small batches and caches: prompts are cut, sequences start over, and the batch is another at every step.
        engine = make(family, exact=True, max_batch_tokens=23, max_sequences=7)
        rollouts = list(draw(engine, requests(3, Sampling(temperature=0.8, max_tokens=20))).values())
        noted = [logp for rollout in rollouts for logp in rollout.logps]
        for layout in LAYOUTS:
            assert trained(engine.model, rollouts, layout, 0.8) == noted
        one_by_one = [trained(engine.model, [rollout], pack, 0.8) for rollout in rollouts[:3]]
        assert [logp for logps in one_by_one for logp in logps] == noted[:60]
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_they_agree_where_vectors_do_not_divide_the_sizes(threads: int) -> None:
    """Torch's own SiLU rounds the last elements of each thread's share in another way."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=40, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = Engine(model, frozenset(), RolloutOptions(exact=True), LONGEST)
        asked = requests(9, Sampling(max_tokens=23))
        rollouts = list(draw(engine, asked).values())
        noted = [logp for rollout in rollouts for logp in rollout.logps]
        assert trained(model, rollouts, pack, 1.0) == noted
    finally:
        torch.set_num_threads(threads_before)


def test_a_later_engine_takes_it_back() -> None:
    model = random_model("qwen3", NAME)
    Engine(model, frozenset(), RolloutOptions(exact=True), LONGEST)
    assert any(isinstance(module, ExactLinear) for module in model.modules())
    later = Engine(model, frozenset(), RolloutOptions(), LONGEST)
    assert not any(isinstance(module, ExactLinear | ExactSiLU) for module in model.modules())
    assert tokens(draw(later, requests(2))) == tokens(draw(make(), requests(2)))


@pytest.mark.parametrize("shape", [(3, 50), (1, 7), (100, 333)])
def test_silu_is_silu(shape: tuple[int, int]) -> None:
    x = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, found = torch.nn.functional.silu(x), ExactSiLU()(y)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6)


def test_without_it_they_do_not() -> None:
    engine = make()
    rollouts = list(draw(engine, requests(4)).values())
    noted = [logp for rollout in rollouts for logp in rollout.logps]
    found = trained(engine.model, rollouts, pack, 1.0)
    assert found != noted and found == pytest.approx(noted, abs=1e-4)


def test_it_draws_what_is_drawn_without_it() -> None:
    assert tokens(draw(make(exact=True), requests(3))) == tokens(draw(make(), requests(3)))


def test_changed_weights_are_packed_anew() -> None:
    engine = make(exact=True)
    draw(engine, requests(1))
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.mul_(1.1)
    rollouts = list(draw(engine, requests(2)).values())
    noted = [logp for rollout in rollouts for logp in rollout.logps]
    assert trained(engine.model, rollouts, pack, 1.0) == noted
    fresh = random_model("qwen3", NAME)
    with torch.no_grad():
        for weight in fresh.parameters():
            weight.mul_(1.1)
    other = Engine(fresh, frozenset(), RolloutOptions(exact=True), LONGEST)
    assert tokens(draw(other, requests(2))) == {r.sample_id: r.response for r in rollouts}


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_plain_layer(bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(37, 21, bias=bias)
    exact = torch.nn.Linear(37, 21, bias=bias)
    exact.load_state_dict(plain.state_dict())
    exact.__class__ = ExactLinear
    x, y = (torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 5, 21)
    (plain(x) * weights).sum().backward()
    (exact(y) * weights).sum().backward()
    for expected, found in [
        (x.grad, y.grad),
        *((p.grad, q.grad) for p, q in zip(plain.parameters(), exact.parameters(), strict=True)),
    ]:
        assert expected is not None and found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_log_probabilities_are_those_of_the_op() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 48, generator=generator) for n in (1500, 333))
    targets = torch.randint(333, (1500,), generator=generator)
    found = exact_logprobs(hidden, weight, None, targets, 0.7)
    torch.testing.assert_close(found, linear_logprobs(hidden, weight, targets, temperature=0.7), rtol=1e-5, atol=1e-4)


def test_other_types_are_refused() -> None:
    model = random_model("qwen3", NAME).to(torch.bfloat16)
    with pytest.raises(
        UserError, match=r"--rollout\.exact needs float32 on the CPU, and this is torch\.bfloat16 on cpu"
    ):
        Engine(model, frozenset(), RolloutOptions(exact=True), LONGEST)
