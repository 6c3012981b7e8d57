"""Which tokens go into the next forward pass: continuous batching over the paged cache.

A *lane* is a cached sequence with tokens that still have to enter the cache. A prompt is one lane with all
the samples of its request as members; once its last token is in, it forks into one lane per sample.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from thinktwice_fast.errors import UserError
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.rollout.records import Request, Rollout, Sampling


@dataclass(eq=False)
class Lane:
    """A sequence in the cache, or on its way into it."""

    pending: list[int]  # token ids not in the cache yet
    members: list[Rollout]  # samples that continue it; one, but for a prompt that has not forked yet
    sampling: Sampling
    handle: int | None = None  # of the cache; None = not admitted


@dataclass(frozen=True)
class Batch:
    """One forward pass: of each lane the first ``counts`` pending tokens, with their places reserved."""

    lanes: list[Lane]
    counts: list[int]
    plan: Plan


@dataclass
class Scheduler:
    """Decodes first, prefills with what is left of the token budget, preempts the youngest when blocks run out."""

    cache: PagedKVCache
    max_sequences: int
    max_batch_tokens: int
    waiting: deque[Lane] = field(default_factory=deque)
    active: list[Lane] = field(default_factory=list)  # oldest first
    preemptions: int = 0

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; one with more samples than fit at once is queued in parts.

        Raises:
            UserError: the whole cache can't hold one of the sequences.
        """
        for request in requests:
            longest = len(request.prompt) + request.sampling.max_tokens
            if self._blocks(longest) > self.cache.num_blocks:
                raise UserError(
                    f"a sequence of up to {longest} tokens does not fit the KV cache of "
                    f"{self.cache.num_blocks * self.cache.block_size}: raise --rollout.cache_tokens"
                )
            for start in range(0, len(request.sample_ids), self.max_sequences):
                ids = request.sample_ids[start : start + self.max_sequences]
                members = [Rollout(request.group, sample, request.prompt) for sample in ids]
                self.waiting.append(Lane(list(request.prompt), members, request.sampling))

    def next_batch(self) -> Batch | None:
        """Reserve places for the next forward pass; None when nothing is left to do."""
        while self.waiting or self.active:
            lanes, counts = self._select()
            plan = self.cache.extend([_handle(lane) for lane in lanes], counts)
            if plan is not None:
                return Batch(lanes, counts, plan)
            self._preempt(self.active[-1])
        return None

    def advance(self, batch: Batch) -> list[Lane]:
        """The batch's tokens are in the cache: drop them from the lanes, and give those now ready to sample."""
        for lane, count in zip(batch.lanes, batch.counts, strict=True):
            del lane.pending[:count]
        return [lane for lane in batch.lanes if not lane.pending]

    def split(self, lane: Lane) -> list[Lane]:
        """Fork a prompt's lane into one per member, each ready for its first token.

        Members for whose own tail block there is no room now go back to the queue.
        """
        if len(lane.members) == 1:
            return [lane]
        self.active.remove(lane)
        room = min(self.cache.free_blocks + 1, len(lane.members))
        here, later = lane.members[:room], lane.members[room:]
        handles = [_handle(lane), *(self.cache.fork(_handle(lane), len(here) - 1) if len(here) > 1 else [])]
        forked = [Lane([], [member], lane.sampling, handle) for member, handle in zip(here, handles, strict=True)]
        queued = [Lane([], [member], lane.sampling) for member in later]
        self.active.extend(forked)
        self.waiting.extendleft(reversed(queued))
        return forked + queued

    def finish(self, lanes: list[Lane]) -> None:
        """These sequences are complete: free their blocks."""
        if lanes:
            done = set(map(id, lanes))
            self.active = [lane for lane in self.active if id(lane) not in done]
            self.waiting = deque(lane for lane in self.waiting if id(lane) not in done)
            self.cache.release([lane.handle for lane in lanes if lane.handle is not None])

    def requeue_prompt(self, lane: Lane) -> None:
        """Give a queued lane everything it has to bring into the cache again."""
        member = lane.members[0]
        lane.pending = [*member.prompt, *member.response]

    def clear(self) -> None:
        """Drop all work and free its blocks."""
        self.cache.release([_handle(lane) for lane in self.active])
        self.active.clear()
        self.waiting.clear()

    def _select(self) -> tuple[list[Lane], list[int]]:
        budget = self.max_batch_tokens
        chosen: dict[int, tuple[Lane, int]] = {}
        for lane in sorted(self.active, key=lambda lane: len(lane.pending) > 1):
            count = min(len(lane.pending), budget)
            if count:
                chosen[id(lane)] = (lane, count)
                budget -= count
        while budget and self.waiting and self._admissible(self.waiting[0]):
            lane = self.waiting.popleft()
            lane.handle = self.cache.prefill()
            self.active.append(lane)
            count = min(len(lane.pending), budget)
            chosen[id(lane)] = (lane, count)
            budget -= count
        pairs = list(chosen.values())
        return [lane for lane, _ in pairs], [count for _, count in pairs]

    def _admissible(self, lane: Lane) -> bool:
        if not self.active:
            return True
        decoding = sum(len(other.members) for other in self.active)
        # Blocks that prompts already admitted will still take, so that admitting more does not preempt them.
        promised = sum(self._blocks(len(other.pending)) for other in self.active if len(other.pending) > 1)
        needed = self._blocks(len(lane.pending)) + len(lane.members)
        return (
            decoding + len(lane.members) <= self.max_sequences
            and needed + promised + decoding <= self.cache.free_blocks
        )

    def _preempt(self, lane: Lane) -> None:
        assert len(self.active) > 1, "one sequence always fits: add() checked it"
        self.preemptions += 1
        self.cache.release([_handle(lane)])
        self.active.remove(lane)
        lane.handle = None
        self.requeue_prompt(lane)
        self.waiting.appendleft(lane)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)


def _handle(lane: Lane) -> int:
    assert lane.handle is not None
    return lane.handle
