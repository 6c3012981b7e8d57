"""Packing with shared prompts: the same loss and gradients as without, from fewer tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.padded import PaddedAttention
from tests.small_models import FAMILIES, VOCABULARY, own_model
from thinktwice_fast.model.attention import PrefixAttention
from thinktwice_fast.model.policy import Policy
from thinktwice_fast.update.batches import (
    Example,
    PackedRow,
    pack,
    pack_shared,
    sequence_tokens,
)
from thinktwice_kernels import linear_logprobs

CPU = torch.device("cpu")
TOKENS = st.integers(0, VOCABULARY - 1)
PROMPTS = st.sampled_from([(1,), (2,), (1, 2), (3, 1, 2), tuple(range(9))])  # few, so that some are shared
EXAMPLES = st.lists(st.builds(Example, PROMPTS, st.lists(TOKENS, min_size=1, max_size=9)), min_size=1, max_size=10)


def sequences_of(row: PackedRow) -> list[list[tuple[int, int]]]:
    """For each response token, the tokens and positions that predict it, by what the attention says is seen."""
    assert isinstance(row.attention, PrefixAttention)
    lengths, prefix = row.attention.lengths.tolist(), row.attention.prefix.tolist()
    pairs = list(zip(row.input_ids.tolist(), row.position_ids.tolist(), strict=True))
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    found = []
    for place in row.select.tolist():
        segment = max(s for s, start in enumerate(starts) if start <= place)
        seen = pairs[starts[segment] : place + 1]
        if prefix[segment] >= 0:
            first = starts[prefix[segment]]
            seen = pairs[first : first + lengths[prefix[segment]]] + seen
        found.append(seen)
    return found


def test_by_hand() -> None:
    row = pack_shared(
        [Example((1, 2), [3, 4, 5]), Example((6,), [7, 8]), Example((1, 2), [9]), Example((1, 2), [3, 6])], CPU
    )
    assert row.input_ids.tolist() == [1, 2, 3, 4, 3, 6, 7]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert isinstance(row.attention, PrefixAttention)
    assert row.attention.lengths.tolist() == [2, 2, 1, 2]
    assert row.attention.prefix.tolist() == [-1, 0, 0, -1]
    assert row.select.tolist() == [1, 2, 3, 5, 6, 1, 1, 4]
    assert row.targets.tolist() == [3, 4, 5, 7, 8, 9, 3, 6]
    assert row.cu_seqlens.tolist() == [0, 3, 5, 6, 8]
    assert row.cu_seqlens.dtype == torch.int32


@given(EXAMPLES)
def test_every_response_token_is_predicted_from_all_that_precedes_it(examples: list[Example]) -> None:
    row, ordinary = pack_shared(examples, CPU), pack(examples, CPU)
    assert torch.equal(row.targets, ordinary.targets)
    assert torch.equal(row.cu_seqlens, ordinary.cu_seqlens)
    whole = [[*e.prompt, *e.response[:i]] for e in examples for i in range(len(e.response))]
    expected = [list(zip(tokens, range(len(tokens)), strict=True)) for tokens in whole]
    assert sequences_of(row) == sequences_of(ordinary) == expected
    prompts = {e.prompt for e in examples}
    assert len(row.input_ids) == sum(map(len, prompts)) + sum(len(e.response) - 1 for e in examples)
    assert len(ordinary.input_ids) == sum(map(sequence_tokens, examples))


def results(model: Any, row: PackedRow) -> list[Tensor]:
    """The loss, and every parameter's gradient of it."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logps = linear_logprobs(hidden, weight, row.targets, bias=bias)
        assert isinstance(logps, Tensor)
        return (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum()

    model.zero_grad()
    loss = Policy(model)(row.input_ids, row.position_ids, row.attention, row.select, head)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def groups(sizes: Sequence[tuple[int, Sequence[int]]]) -> list[Example]:
    """Of (prompt tokens, response tokens of each member), shuffled."""
    random = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=random).tolist()

    made = []
    for prompt_tokens, responses in sizes:
        prompt = tuple(ids(prompt_tokens))
        made += [Example(prompt, ids(count)) for count in responses]
    return [made[i] for i in torch.randperm(len(made), generator=random).tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_ordinary_packing(family: str) -> None:
    """In float64; prompts and responses are longer and shorter than OLMo-3's window of 8 here."""
    examples = groups([(25, [1, 3, 30, 12]), (3, [7, 7]), (1, [20, 2, 9]), (10, [11])])
    model = own_model(family).double()
    ordinary = pack(examples, CPU)
    padded = PaddedAttention.from_lengths([sequence_tokens(e) for e in examples], CPU)
    exact = results(model, replace(ordinary, attention=padded))
    for row in (ordinary, pack_shared(examples, CPU)):
        for mine, truth in zip(results(model, row), exact, strict=True):
            assert (mine - truth).norm() <= 1e-7 * truth.norm()


@settings(max_examples=10)
@given(EXAMPLES)
def test_the_kernel_gives_the_same_for_any_groups(examples: list[Example]) -> None:
    """In float32, relative to all gradients together; a token seen too much or too little would change 1e-2 of it."""
    model = own_model("qwen3")
    ordinary, shared = results(model, pack(examples, CPU)), results(model, pack_shared(examples, CPU))
    assert torch.allclose(ordinary[0], shared[0], rtol=1e-5, atol=1e-4)
    norm = torch.stack([x.norm() for x in ordinary[1:]]).norm()
    assert torch.stack([(x - y).norm() for x, y in zip(ordinary[1:], shared[1:], strict=True)]).norm() <= 1e-5 * norm
