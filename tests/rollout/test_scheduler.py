"""The scheduler over the real cache bookkeeping: every sequence enters whole and in order, and nothing leaks."""

from collections.abc import Sequence

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from thinktwice_fast.errors import UserError
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.batch import Batch, NewTokens
from thinktwice_fast.rollout.prefix_cache import Counts, PrefixCache
from thinktwice_fast.rollout.scheduler import Scheduler
from thinktwice_fast.rollout.stops import Stops

BLOCK = 4


class Lengths(Stops):
    """Sample number n ends after ``lengths[n]`` tokens."""

    def __init__(self, lengths: dict[int, int]):
        super().__init__(())
        self.lengths = lengths

    def mark(self, rollout: Rollout, sampling: Sampling) -> None:
        rollout.ended = len(rollout.response) == self.lengths[rollout.sample_id]


def make(blocks: int, sequences: int, tokens: int) -> Scheduler:
    cache, counts = PagedKVCache(1, blocks, 1, 1, block_size=BLOCK), Counts()
    return Scheduler(cache, PrefixCache(cache, counts), counts, Lengths({}), sequences, tokens, 10_000, seed=0)


def request(group: int, prompt: int, samples: int, longest: int) -> Request:
    ids = tuple(100 * group + sample for sample in range(samples))
    return Request(group, tuple(range(1000 * group, 1000 * group + prompt)), ids, Sampling(max_tokens=longest))


class Engine:
    """Drives a scheduler as the rollout engine does, and keeps what each cached sequence was fed.

    Sample number n ends after ``lengths(n)`` tokens; its tokens are -1, -2, ...
    """

    def __init__(self, scheduler: Scheduler, lengths: dict[int, int]):
        self.scheduler = scheduler
        scheduler.stops = Lengths(lengths)
        self.fed: dict[int, list[int]] = {}
        self.batches = 0

    def run(self, at_most: int = 1000) -> list[Rollout]:
        done: list[Rollout] = []
        while (batch := self.scheduler.next_batch()) is not None:
            self.batches += 1
            assert self.batches <= at_most, "it hangs"
            done += [rollout for rollout in self.step(batch) if rollout.ended]
        return done

    def step(self, batch: Batch) -> list[Rollout]:
        self.feed(batch)
        drawn = [[-1 - len(sample.response)] for sample in batch.samples]
        numbers = [[0.0] for _ in drawn]
        grown = self.scheduler.record(batch, NewTokens(drawn, numbers, numbers))
        for sequence in self.scheduler.active:
            sample = sequence.samples[0]
            if sequence.handle is not None and sequence.pending == sample.response[-1:]:
                self.fed[sequence.handle] = [*sample.prompt, *sample.response[:-1]]  # a fork starts with its prompt
        return grown

    def feed(self, batch: Batch) -> None:
        scheduler = self.scheduler
        assert 0 < sum(batch.counts) <= scheduler.max_batch_tokens and all(count > 0 for count in batch.counts)
        assert sum(len(sequence.samples) for sequence in scheduler.active) <= scheduler.max_sequences
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            known = scheduler.cache.length(sequence.cached) - count
            self.fed[sequence.cached] = self.fed.get(sequence.cached, [])[:known] + sequence.pending[:count]
            assert len(self.fed[sequence.cached]) == known + count
        for sequence in batch.ready:
            sample = sequence.samples[0]
            assert self.fed[sequence.cached] == [*sample.prompt, *sample.response]


def check_complete(requests: Sequence[Request], lengths: dict[int, int], done: list[Rollout]) -> None:
    assert sorted(rollout.sample_id for rollout in done) == sorted(i for r in requests for i in r.sample_ids)
    prompts = {i: (r.group, r.prompt) for r in requests for i in r.sample_ids}
    for rollout in done:
        assert (rollout.group, rollout.prompt) == prompts[rollout.sample_id]
        assert rollout.response == [-1 - n for n in range(lengths[rollout.sample_id])]


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Request], dict[int, int], tuple[int, int, int]]:
    blocks = draw(st.integers(2, 14))
    requests = []
    for group in range(draw(st.integers(1, 6))):
        longest = draw(st.integers(1, 2 * BLOCK + 3))
        room = blocks * BLOCK - longest
        if room > 0:
            requests.append(request(group, draw(st.integers(1, min(room, 20))), draw(st.integers(1, 9)), longest))
    lengths = {i: draw(st.integers(1, r.sampling.max_tokens)) for r in requests for i in r.sample_ids}
    return requests, lengths, (blocks, draw(st.integers(1, 12)), draw(st.integers(1, 40)))


@settings(max_examples=300)
@given(workloads())
def test_every_request_completes_in_any_pool(
    workload: tuple[list[Request], dict[int, int], tuple[int, int, int]],
) -> None:
    requests, lengths, limits = workload
    scheduler = make(*limits)
    scheduler.add(requests)
    engine = Engine(scheduler, lengths)
    work = sum(len(r.prompt) + lengths[i] for r in requests for i in r.sample_ids)
    longest = max((len(r.prompt) + lengths[i] for r in requests for i in r.sample_ids), default=0)
    done = engine.run(at_most=20 * work)
    # One token a batch at worst, and what preempted sequences bring in again.
    assert engine.batches <= work + longest * scheduler.counts.preemptions
    event(f"preempted: {scheduler.counts.preemptions > 0}")
    check_complete(requests, lengths, done)
    assert scheduler.cache.free_blocks == scheduler.cache.num_blocks
    assert not any(scheduler.cache.ref_counts())


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    scheduler = make(64, 8, 64)
    scheduler.add([request(0, 10, 5, 3)])
    first = scheduler.next_batch()
    assert first is not None and first.counts == [10]
    engine = Engine(scheduler, dict.fromkeys(range(5), 3))
    engine.step(first)
    second = scheduler.next_batch()
    assert second is not None and second.counts == [1] * 5
    # Two full blocks shared, and each sample's own tail.
    assert sorted(count for count in scheduler.cache.ref_counts() if count) == [1] * 5 + [5] * 2


def test_long_prompts_enter_in_pieces_beside_decoding() -> None:
    scheduler = make(64, 8, 6)
    scheduler.add([request(0, 3, 2, 9), request(1, 20, 1, 2)])
    engine = Engine(scheduler, {0: 9, 1: 9, 100: 2})
    sizes = []
    while (batch := scheduler.next_batch()) is not None:
        pairs = zip(batch.sequences, batch.counts, strict=True)
        sizes.append({sequence.samples[0].group: count for sequence, count in pairs})
        engine.step(batch)
    assert sizes[0] == {0: 3, 1: 3}
    # Both samples of group 0 decode in each batch, and the other prompt gets what they leave of the 6 tokens.
    assert sizes[1:5] == [{0: 1, 1: 4}] * 4
    assert sizes[5] == {0: 1, 1: 1}


def test_the_youngest_gives_way_and_nothing_is_lost() -> None:
    scheduler = make(5, 8, 64)
    requests = [request(group, 2, 1, 12) for group in range(4)]
    scheduler.add(requests)
    lengths = {i: 12 for r in requests for i in r.sample_ids}
    done = Engine(scheduler, lengths).run()
    check_complete(requests, lengths, done)
    assert scheduler.counts.preemptions > 0
    assert done[0].group == 0


def test_more_samples_than_sequences_go_in_parts() -> None:
    scheduler = make(64, 3, 64)
    asked = request(0, 5, 8, 2)
    scheduler.add([asked])
    assert [len(sequence.samples) for sequence in scheduler.waiting] == [3, 3, 2]
    lengths = dict.fromkeys(asked.sample_ids, 2)
    check_complete([asked], lengths, Engine(scheduler, lengths).run())


def test_a_sequence_that_never_fits_is_refused_at_once() -> None:
    scheduler = make(4, 8, 64)
    scheduler.add([request(0, 10, 1, 6)])
    with pytest.raises(UserError, match=r"a sequence of up to 17 tokens does not fit the KV cache of 16: raise --roll"):
        scheduler.add([request(1, 10, 1, 7)])


def test_clear_frees_everything() -> None:
    scheduler = make(16, 8, 64)
    scheduler.add([request(0, 10, 3, 6), request(1, 9, 1, 6)])
    batch = scheduler.next_batch()
    assert batch is not None
    Engine(scheduler, dict.fromkeys((0, 1, 2, 100), 6)).step(batch)
    assert scheduler.cache.free_blocks < 16
    scheduler.clear()
    assert scheduler.cache.free_blocks == 16
    assert scheduler.next_batch() is None
