"""Packing: which tokens are computed, and which are predicted."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from thinktwice_fast.update.batches import Example, pack, sequence_tokens

CPU = torch.device("cpu")
TOKENS = st.integers(0, 99)
EXAMPLES = st.builds(
    Example, st.lists(TOKENS, min_size=1, max_size=9).map(tuple), st.lists(TOKENS, min_size=1, max_size=9)
)


def test_pack_by_hand() -> None:
    row = pack([Example((1, 2), [3, 4, 5]), Example((6,), [7]), Example((8, 9), [10])], CPU)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 6, 8, 9]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert row.select.tolist() == [1, 2, 3, 4, 6]
    assert row.targets.tolist() == [3, 4, 5, 7, 10]
    assert row.cu_seqlens.tolist() == [0, 3, 4, 5]
    assert row.cu_seqlens.dtype == torch.int32


@given(st.lists(EXAMPLES, min_size=1, max_size=8))
def test_exactly_the_response_tokens_are_predicted_each_from_the_token_before_it(examples: list[Example]) -> None:
    row = pack(examples, CPU)
    assert row.targets.tolist() == [token for example in examples for token in example.response]
    before = [token for e in examples for token in [e.prompt[-1], *e.response[:-1]]]
    assert row.input_ids[row.select].tolist() == before
    assert row.position_ids[row.select].tolist() == [
        len(e.prompt) - 1 + place for e in examples for place in range(len(e.response))
    ]
    assert row.cu_seqlens.diff().tolist() == [len(e.response) for e in examples]
    assert len(row.input_ids) == sum(sequence_tokens(e) for e in examples)
