"""How sequences are dealt out: everything once, within the budget, alike in work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinktwice_fast.config import Config
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.update.batches import Example, pack, pack_shared
from thinktwice_fast.update.microbatches import plan_microbatches, row_budget

CPU = torch.device("cpu")
FLOPS = Flops(token=100, target=30, key={0: 2, 4: 1})
PROMPTS = st.sampled_from([(1,), (2,), (1, 2), (3, 1, 2), tuple(range(9))])  # few, so that some are shared
EXAMPLES = st.lists(st.builds(Example, PROMPTS, st.lists(st.just(0), min_size=1, max_size=9)), max_size=14)


def tokens_of(examples: list[Example], members: list[int], shared: bool) -> int:
    return len((pack_shared if shared else pack)([examples[i] for i in members], CPU).input_ids) if members else 0


@given(EXAMPLES, st.integers(1, 40), st.integers(1, 4), st.booleans())
def test_everything_once_within_the_budget(examples: list[Example], budget: int, processes: int, shared: bool) -> None:
    plan = plan_microbatches(examples, budget, processes, FLOPS, shared_prefix=shared)
    assert len(plan) == processes
    assert len({len(parts) for parts in plan}) == 1 and plan[0], "collectives of the processes must meet"
    members = [index for parts in plan for part in parts for index in part]
    assert sorted(members) == list(range(len(examples)))
    for part in (part for parts in plan for part in parts):
        assert tokens_of(examples, part, shared) <= budget or len(part) == 1


@given(EXAMPLES, st.integers(1, 40))
def test_no_more_micro_batches_with_shared_prompts_than_without(examples: list[Example], budget: int) -> None:
    shared, own = (plan_microbatches(examples, budget, 1, FLOPS, shared_prefix=on)[0] for on in (True, False))
    assert len(shared) <= len(own) + 1  # one is what dealing by work instead of tokens may cost


def test_a_group_is_divided_only_where_it_must_be() -> None:
    """Rows of at most 10 tokens: one group fits as it is, the other needs its prompt twice."""
    small = [Example((1, 2), [0] * 4)] * 2
    large = [Example((3, 4, 5, 6), [0] * 4)] * 3
    examples = [small[0], large[0], small[1], large[1], large[2]]
    plan = plan_microbatches(examples, 10, 1, FLOPS, shared_prefix=True)
    assert sorted(plan[0]) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize(("budget", "parts"), [(4, [[0, 2], [1]]), (3, [[0], [1], [2]]), (100, [[0, 1, 2]])])
def test_by_hand(budget: int, parts: list[list[int]]) -> None:
    examples = [Example((1,), [0] * count) for count in (1, 9, 3)]
    assert sorted(plan_microbatches(examples, budget, 1, FLOPS, shared_prefix=False)[0]) == parts


def test_work_and_not_tokens_is_alike() -> None:
    """One sequence of 64 tokens sees as many keys as sixteen of 16 do; a process takes it alone."""
    examples = [Example((1,), [0] * 64), *(Example((1,), [0] * 16) for _ in range(16))]
    quadratic = Flops(token=0, target=0, key={0: 1})
    plan = plan_microbatches(examples, 1000, 2, quadratic, shared_prefix=False)
    assert sorted(plan) == [[[0]], [list(range(1, 17))]]


@pytest.mark.parametrize(("groups", "processes", "prompts"), [(8, 2, 8), (1, 2, 2), (3, 2, 4), (9, 8, 16), (2, 8, 8)])
def test_groups_are_parted_where_processes_would_wait(groups: int, processes: int, prompts: int) -> None:
    """Eight groups go round in two processes; a single one is halved, and so is one of three, but nothing more."""
    examples = [Example((g, *range(5)), [0] * 21) for g in range(groups) for _ in range(8)]
    plan = plan_microbatches(examples, 10_000, processes, FLOPS, shared_prefix=True)
    work = [tokens_of(examples, part, True) for (part,) in plan]
    assert sum(work) == groups * 8 * 20 + prompts * 6
    assert max(work) <= 1.25 * sum(work) / processes


def test_micro_batches_that_meet_are_alike() -> None:
    """Each waits for the slowest process, so that the large ones go together."""
    examples = [Example((1,), [0] * count) for count in (9, 9, 5, 5)]
    plan = plan_microbatches(examples, 9, 2, FLOPS, shared_prefix=False)
    assert [sorted(len(examples[parts[i][0]].response) for parts in plan) for i in (0, 1)] == [[9, 9], [5, 5]]


@pytest.mark.parametrize(
    ("responses", "stated", "shared", "tokens"),
    [(64, 0, True, 10_240), (1001, 0, True, 10_800), (1001, 0, False, 10_240), (2048, 0, True, 16_384),
     (2048, 77, True, 77)],
)  # fmt: skip
def test_a_row_has_room_for_a_group(responses: int, stated: int, shared: bool, tokens: int) -> None:
    config = Config(samples_per_problem=8)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 1000, responses
    config.update.microbatch_tokens, config.update.shared_prefix = stated, shared
    assert row_budget(config) == tokens
