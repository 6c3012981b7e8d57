"""How a step's problems are dealt out to processes and mini-batches."""

from hypothesis import given
from hypothesis import strategies as st

from thinktwice_fast.algorithms.policy_step import minibatch_slots


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_mini_batches_hold_the_same_problems_whatever_the_number_of_processes(
    world: int, share: int, minibatches: int
) -> None:
    size = world * share
    dealt = [minibatch_slots(size * minibatches, size, rank, world) for rank in range(world)]
    for number in range(minibatches):
        parts = [slots[number] for slots in dealt]
        assert all(len(part) == share for part in parts)
        together = [slot for part in parts for slot in part]
        assert together == minibatch_slots(size * minibatches, size, 0, 1)[number]
    alone = minibatch_slots(size * minibatches, size, 0, 1)
    assert [slot for part in alone for slot in part] == list(range(size * minibatches))
