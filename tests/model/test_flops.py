"""Counted operations are those that torch sees."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.small_models import FAMILIES, VOCABULARY, random_model
from thinktwice_fast.model.flops import Flops


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_that_torch_counts(family: str) -> None:
    model = random_model(family, "eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 6, dtype=torch.int64), use_cache=False)
    products = sum(
        counter.get_flop_counts()["Global"][op]
        for op in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if op in counter.get_flop_counts()["Global"]
    )
    flops = Flops.of(model)
    assert 6 * flops.token + 6 * flops.target == products


@pytest.mark.parametrize(("before", "tokens"), [(0, 20), (5, 20), (30, 20), (7, 1)])
def test_keys_seen(before: int, tokens: int) -> None:
    """Counted one query after another, at windows 8 and none."""
    flops = Flops(token=0, target=0, key={8: 10, 0: 1})
    seen = [position + 1 for position in range(before, before + tokens)]
    assert flops.segment(tokens, before, 0) == sum(10 * min(count, 8) + count for count in seen)


def test_layers_by_window() -> None:
    model: Any = random_model("olmo3")
    assert Flops.of(model).key == {8: 2 * 4 * 64, 0: 4 * 64}
    assert Flops.of(random_model("qwen3")).key == {0: 3 * 4 * 128}
    assert Flops.of(model).target == 2 * 64 * VOCABULARY
