"""Shared-prefix attention under whole models, against transformers on each sequence alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.model.padded import PaddedAttention
from tests.model.rounding import assert_as_exact
from tests.small_models import FAMILIES, VOCABULARY, family_config, random_model
from thinktwice_fast.model.attention import NAME, PrefixAttention, causal_attention
from thinktwice_fast.model.loading import checkpoint_layers
from thinktwice_fast.model.policy import Policy, linear_head

CPU = torch.device("cpu")
# A prompt longer than OLMo-3's window of 8 with three responses, one of them shorter than the window; a sequence that
# shares nothing; a short prompt with two responses.
LENGTHS, PREFIX = [21, 13, 5, 40, 9, 3, 30, 2], [-1, 0, 0, 0, -1, -1, 5, 5]


def shared_row() -> tuple[Tensor, Tensor]:
    """Tokens and positions."""
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    starts = [LENGTHS[before] if before >= 0 else 0 for before in PREFIX]
    spans = [torch.arange(start, start + n) for start, n in zip(starts, LENGTHS, strict=True)]
    return tokens, torch.cat(spans)


def results(model: Any, logits: Tensor) -> list[Tensor]:
    """The logits, and every parameter's gradient of a loss on them."""
    targets = torch.arange(len(logits)) * 7 % VOCABULARY
    model.zero_grad()
    cross_entropy(logits, targets).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def in_one_row(model: Any) -> list[Tensor]:
    tokens, positions = shared_row()
    attention = PrefixAttention.from_segments(LENGTHS, PREFIX, CPU)
    return results(model, Policy(model)(tokens, positions, attention, torch.arange(len(tokens)), linear_head))


def one_by_one(model: Any) -> list[Tensor]:
    """Each segment behind its own copy of its prefix, by transformers' own attention."""
    parts = shared_row()[0].split(LENGTHS)
    logits = []
    for part, before in zip(parts, PREFIX, strict=True):
        whole = torch.cat([parts[before], part]) if before >= 0 else part
        logits.append(model(input_ids=whole[None], use_cache=False).logits[0, len(whole) - len(part) :])
    return results(model, torch.cat(logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_each_sequence_alone(family: str) -> None:
    ours, theirs = random_model(family, NAME), random_model(family, "sdpa")
    exact = one_by_one(copy.deepcopy(theirs).double())
    assert_as_exact(in_one_row(ours), one_by_one(theirs), exact)
    for mine, truth in zip(in_one_row(ours.double()), exact, strict=True):
        assert mine.dtype == torch.float64
        assert (mine - truth).norm() <= 1e-7 * truth.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_gradients(family: str) -> None:
    model = random_model(family, NAME)
    expected = in_one_row(model)
    checkpoint_layers(model)
    assert all(torch.equal(x, y) for x, y in zip(in_one_row(model), expected, strict=True))


def test_a_response_beyond_the_window_does_not_see_the_prompt() -> None:
    config = family_config("olmo3")
    config.layer_types = ["sliding_attention"]
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    tokens, positions = shared_row()
    attention = PrefixAttention.from_segments(LENGTHS, PREFIX, CPU)
    select = torch.arange(len(tokens))

    def logits_of(row: Tensor) -> tuple[Tensor, ...]:
        return Policy(model)(row, positions, attention, select, linear_head).split(LENGTHS)

    before = logits_of(tokens)
    after = logits_of(torch.cat([(tokens[:21] + 1) % VOCABULARY, tokens[21:]]))
    for segment in (1, 3):
        assert torch.equal(before[segment][7:], after[segment][7:])
        assert not torch.equal(before[segment][6], after[segment][6])
    assert all(torch.equal(before[segment], after[segment]) for segment in range(4, 8))


def test_sequences_that_share_nothing() -> None:
    ours = causal_attention([3, 40], CPU)
    assert isinstance(ours, PrefixAttention) and ours.prefix.tolist() == [-1, -1]
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(43, heads, 16, generator=random) for heads in (4, 2, 2))
    theirs = PaddedAttention.from_lengths([3, 40], CPU)
    for window in (0, 8):
        torch.testing.assert_close(ours.attend(0, q, k, v, 0.3, window), theirs.attend(0, q, k, v, 0.3, window))
