"""What stands between two steps of decoding, held against the rule row by row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.csrc.advancing import BLOCK_SIZE, SPARE_SLOT, STEPS, decoding_rows, drawings
from thinktwice_fast.model import csrc, reference


@pytest.mark.parametrize("advance", [csrc.advance, reference.advance], ids=["C++", "torch"])
def test_rows_advance_by_the_rule(advance: Callable[..., None]) -> None:
    n = 200
    rows = decoding_rows(n)
    state = csrc.State(*rows.state)
    for drawn in (None, *drawings(n, STEPS + 1)):
        before = [column.tolist() for column in state]
        advance(drawn, *rows)
        for row in range(n):
            token, position, draws, left, _, count = (column[row] for column in before)
            if drawn is not None and left and count < STEPS:
                new = int(drawn.tokens[row])
                numbers = (int(rows.new_tokens[count, row]), rows.new_logps[count, row], rows.new_entropies[count, row])
                assert numbers == (new, drawn.raw_logps[row], drawn.entropies[row])
                left = 0 if new in (-1, 7, 11) else left - 1
                draws, count = draws + 1, count + 1
                token, position = (new, position + 1) if left else (token, position)
            block = position // BLOCK_SIZE
            table = rows.block_tables[row].tolist()
            slot = table[block] * BLOCK_SIZE + position % BLOCK_SIZE if left and block < len(table) else SPARE_SLOT
            assert [int(column[row]) for column in state] == [token, position, draws, left, slot, count]
            assert int(rows.context_lens[row]) == position + 1


def test_wrong_arguments() -> None:
    rows = decoding_rows(4)
    (drawn,) = drawings(4, 1)
    changes: tuple[dict[str, Any], ...] = (
        {"block_tables": rows.block_tables.long()},
        {"context_lens": rows.context_lens[:3]},
        {"new_logps": rows.new_logps[:2]},
        {"new_tokens": rows.new_tokens.T},
    )
    for change in changes:
        with pytest.raises(RuntimeError, match=f"advance: {next(iter(change))} does not fit the 4 rows of the state"):
            csrc.advance(drawn, *rows._replace(**change))
    with pytest.raises(RuntimeError, match=r"state must be int64 \[6, rows\]"):
        csrc.advance(drawn, *rows._replace(state=rows.state[:5]))
    with pytest.raises(RuntimeError, match="drawn does not fit the 4 rows"):
        csrc.advance(drawn._replace(tokens=drawn.tokens[:3]), *rows)
    assert torch.equal(rows.state, decoding_rows(4).state)
