"""Packed training attention against transformers on each sequence alone, for every family."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.model.rounding import assert_as_exact
from tests.small_models import FAMILIES, VOCABULARY, family_config, random_model
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import NAME, causal_attention
from thinktwice_fast.model.policy import Policy, linear_head

LENGTHS = [5, 23, 1, 40]  # shorter and longer than OLMo-3's window of 8 here


def sequences(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def packed_logits(model: Any, parts: list[torch.Tensor]) -> torch.Tensor:  # [T, V]
    lengths = [len(part) for part in parts]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = causal_attention(lengths, torch.device("cpu"))
    return Policy(model)(torch.cat(parts), positions, attention, torch.arange(sum(lengths)), linear_head)


def logits_one_by_one(model: Any, parts: list[torch.Tensor]) -> torch.Tensor:  # [T, V]
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])


def results(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    """The logits, and every parameter's gradient of a loss on them."""
    targets = torch.arange(len(logits)) * 7 % VOCABULARY
    model.zero_grad()
    cross_entropy(logits, targets).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_equal_each_alone(family: str) -> None:
    parts = sequences()
    ours, theirs = random_model(family, NAME), random_model(family, "sdpa")
    exact = copy.deepcopy(theirs).double()
    assert_as_exact(
        results(ours, packed_logits(ours, parts)),
        results(theirs, logits_one_by_one(theirs, parts)),
        results(exact, logits_one_by_one(exact, parts)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_see_its_neighbours(family: str) -> None:
    model = random_model(family, NAME)
    parts = sequences()
    before = packed_logits(model, parts)
    changed = packed_logits(model, [(parts[0] + 1) % VOCABULARY, parts[1], (parts[2] + 1) % VOCABULARY, parts[3]])
    own = torch.cat([torch.full((length,), number) for number, length in enumerate(LENGTHS)])
    for number in (1, 3):
        assert torch.equal(before[own == number], changed[own == number])
    assert (before[own == 0] - changed[own == 0]).abs().max() > 0.1


def test_the_window_hides_older_keys() -> None:
    """A model of windowed layers alone: what lies further back than they reach together changes nothing."""
    config = family_config("olmo3")
    config.layer_types = ["sliding_attention"] * 3
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    part = sequences([40])[0]
    other = torch.cat([(part[:1] + 1) % VOCABULARY, part[1:]])
    before, after = packed_logits(model, [part]), packed_logits(model, [other])
    reach = 3 * (8 - 1)
    assert torch.equal(before[reach + 1 :], after[reach + 1 :])
    assert not torch.equal(before[reach], after[reach])


def test_extras_of_an_architecture_are_refused_by_name() -> None:
    model = random_model("qwen3", NAME)
    parts = sequences([4])
    attention = causal_attention([4], torch.device("cpu"))
    with pytest.raises(UserError, match=r"Qwen3Attention asks its attention for s_aux, which is not supported"):
        model.base_model(
            input_ids=parts[0][None], position_ids=torch.arange(4)[None], attention=attention, s_aux=torch.zeros(4)
        )


def test_dropout_is_refused_with_its_remedy() -> None:
    config = family_config("llama")
    config.attention_dropout = 0.1
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()
    with pytest.raises(UserError, match=r"set attention_dropout to 0 in its config\.json"):
        packed_logits(model, sequences([4]))
