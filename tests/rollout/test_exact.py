"""`rollout.exact`: the log-probabilities of rollouts are those of training, bit for bit."""

from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import LlamaConfig

from tests.rollout.drawing import LONGEST, draw, make, requests, tokens
from tests.small_models import FAMILIES, VOCABULARY, own_model
from thinktwice_fast.config import RolloutOptions, UpdateOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.policy import Policy
from thinktwice_fast.model.products import PackedProducts, exact_logprobs, exact_product
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.records import Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.update.batches import pack, pack_shared
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_kernels import linear_logprobs

LAYOUTS: list[Any] = [pack, pack_shared]


def trained(model: Any, rollouts: list[Rollout], layout: Any, temperature: float) -> list[float]:
    """What the update makes of the rollouts' tokens, one after another."""
    row = layout(rollouts, torch.device("cpu"))

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return exact_logprobs(hidden, weight, bias, row.targets, temperature)

    arguments = (row.input_ids, row.position_ids, row.attention, row.select)
    found: torch.Tensor = Policy(model)(*arguments, head, exact_product)
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
    """Torch's own SiLU, for one, rounds the last elements of each thread's share in another way."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=40, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
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


def test_it_leaves_nothing_in_the_model() -> None:
    model = own_model("qwen3")
    Engine(model, frozenset(), RolloutOptions(exact=True), LONGEST)
    later = Engine(model, frozenset(), RolloutOptions(), LONGEST)
    assert tokens(draw(later, requests(2))) == tokens(draw(make(), requests(2)))


def test_without_it_they_do_not() -> None:
    engine = make()
    rollouts = list(draw(engine, requests(4)).values())
    noted = [logp for rollout in rollouts for logp in rollout.logps]
    found = trained(engine.model, rollouts, pack, 1.0)
    assert found != noted and found == pytest.approx(noted, abs=1e-4)


def test_it_draws_what_is_drawn_without_it() -> None:
    assert tokens(draw(make(exact=True), requests(3))) == tokens(draw(make(), requests(3)))


def test_changed_weights_are_packed_anew() -> None:
    """Also where nothing marks them as changed: a fused optimizer leaves their version as it was."""

    def step(model: torch.nn.Module) -> None:
        optimizer, _ = build_optimizer(model, UpdateOptions(learning_rate=1e-2), 1)
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    engine = make(exact=True)
    before = tokens(draw(engine, requests(2)))
    step(engine.model)
    rollouts = list(draw(engine, requests(2)).values())
    noted = [logp for rollout in rollouts for logp in rollout.logps]
    assert trained(engine.model, rollouts, pack, 1.0) == noted
    fresh = own_model("qwen3")
    step(fresh)
    other = Engine(fresh, frozenset(), RolloutOptions(exact=True), LONGEST)
    assert before != {r.sample_id: r.response for r in rollouts}
    assert tokens(draw(other, requests(2))) == {r.sample_id: r.response for r in rollouts}


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_plain_product(bias: bool) -> None:
    found = []
    for product in (linear, exact_product, PackedProducts()):
        generator = torch.Generator().manual_seed(0)
        shapes = [(10, 37), (21, 37), (21,)][: 3 if bias else 2]
        x, weight, *rest = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
        out = product(x, weight, rest[0] if rest else None)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in (x, weight, *rest))])
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_those_of_the_op() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 48, generator=generator) for n in (1500, 333))
    targets = torch.randint(333, (1500,), generator=generator)
    found = exact_logprobs(hidden, weight, None, targets, 0.7)
    torch.testing.assert_close(found, linear_logprobs(hidden, weight, targets, temperature=0.7), rtol=1e-5, atol=1e-4)


def test_other_types_are_refused() -> None:
    model = own_model("qwen3").to(torch.bfloat16)
    with pytest.raises(
        UserError, match=r"--rollout\.exact needs float32 on the CPU, and this is torch\.bfloat16 on cpu"
    ):
        Engine(model, frozenset(), RolloutOptions(exact=True), LONGEST)
