"""Which tokens go into the next forward pass: continuous batching over the paged cache.

A *lane* is a cached sequence with tokens that still have to enter the cache. A prompt is one lane with all
the samples of its request as members; once its last token is in, it forks into one lane per sample.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from thinktwice_fast.errors import UserError
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.rollout.kept import Counts, KeptCaches
from thinktwice_fast.rollout.records import Request, Rollout, Sampling


@dataclass(eq=False)
class Lane:
    """A sequence in the cache, or on its way into it."""

    pending: list[int]  # token ids not in the cache yet
    members: list[Rollout]  # samples that continue it; one, but for a prompt that has not forked yet
    sampling: Sampling
    keep: bool = False  # keep the cache when the sample ends
    handle: int | None = None  # of the cache; None = not admitted
    extends: Rollout | None = None  # whose kept cache it will begin with, once admitted


@dataclass(frozen=True)
class Batch:
    """One forward pass: of each lane the first ``counts`` pending tokens, with their places reserved."""

    lanes: list[Lane]
    counts: list[int]
    plan: Plan


@dataclass
class Scheduler:
    """Decodes first, prefills with what is left of the token budget.

    When blocks run out it gives up kept caches, oldest first, then preempts the youngest sequence. What was in the
    cache before comes back before new prompts come in.
    """

    cache: PagedKVCache
    kept: KeptCaches
    counts: Counts
    max_sequences: int
    max_batch_tokens: int
    max_tokens: int  # of one sequence
    waiting: deque[Lane] = field(default_factory=deque)  # prompts, in the order they were added
    returning: deque[Lane] = field(default_factory=deque)  # preempted, or to begin with a kept cache
    active: list[Lane] = field(default_factory=list)  # oldest first

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; one with more samples than fit at once is queued in parts.

        Raises:
            UserError: the whole cache can't hold one of the sequences, or one could get longer than the engine was
                made for.
        """
        requests = list(requests)
        for request in requests:
            longest = len(request.prompt) + request.sampling.max_tokens
            if self._blocks(longest) > self.cache.num_blocks:
                raise UserError(
                    f"a sequence of up to {longest} tokens does not fit the KV cache of "
                    f"{self.cache.num_blocks * self.cache.block_size}: raise --rollout.cache_tokens"
                )
            if longest > self.max_tokens:
                raise UserError(
                    f"a sequence of up to {longest} tokens is longer than the {self.max_tokens} that the engine was "
                    "made for: raise --rollout.max_prompt_tokens or --rollout.max_response_tokens"
                )
        for request in requests:
            self._queue(request)

    def next_batch(self) -> Batch | None:
        """Reserve places for the next forward pass; None when nothing is left to do."""
        while self.waiting or self.returning or self.active:
            lanes, counts = self._select()
            plan = self.cache.extend([_handle(lane) for lane in lanes], counts)
            if plan is not None:
                return Batch(lanes, counts, plan)
            if not self.kept.release_oldest():
                self._preempt(self.active[-1])
        return None

    def decoding(self) -> list[Lane]:
        """The active lanes, where each has one token pending and nothing that waits can join them; none otherwise."""
        lanes = self.active
        if len(lanes) > self.max_batch_tokens or any(len(lane.pending) > 1 or len(lane.members) > 1 for lane in lanes):
            return []
        queue = self.returning or self.waiting
        return [] if queue and self._admissible(queue[0]) else lanes

    @property
    def queued(self) -> bool:
        """Whether anything waits for a place."""
        return bool(self.returning or self.waiting)

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
        self.kept.make_room(len(lane.members) - 1)
        room = min(self.cache.free_blocks + 1, len(lane.members))
        here, later = lane.members[:room], lane.members[room:]
        handles = [_handle(lane), *(self.cache.fork(_handle(lane), len(here) - 1) if len(here) > 1 else [])]
        forked = [
            Lane([], [member], lane.sampling, lane.keep, handle) for member, handle in zip(here, handles, strict=True)
        ]
        queued = [Lane([], [member], lane.sampling, lane.keep) for member in later]
        self.active.extend(forked)
        self.returning.extendleft(reversed(queued))
        return forked + queued

    def finish(self, lanes: Collection[Lane]) -> None:
        """These sequences are complete: free their blocks, or keep them where that was asked for."""
        if not lanes:
            return
        self._forget(lanes)
        for lane in lanes:
            if lane.keep and lane.handle is not None:
                self.kept.keep(lane.handle, lane.members[0])
                lane.handle = None
        self._release(lanes)

    def requeue_prompt(self, lane: Lane) -> None:
        """Give a queued lane everything it has to bring into the cache again."""
        member = lane.members[0]
        lane.pending = [*member.prompt, *member.response]

    def clear(self) -> None:
        """Drop all work and free its blocks."""
        self._release(self.active)
        self.active.clear()
        self.returning.clear()
        self.waiting.clear()

    def _queue(self, request: Request) -> None:
        extends = request.extends
        if extends is not None and not self.kept.continued_by(request.prompt, extends):
            extends = None
        for start in range(0, len(request.sample_ids), self.max_sequences):
            ids = request.sample_ids[start : start + self.max_sequences]
            members = [Rollout(request.group, sample, request.prompt) for sample in ids]
            lane = Lane([], members, request.sampling, request.keep, extends=extends)
            self.requeue_prompt(lane)
            (self.waiting if extends is None else self.returning).append(lane)
            extends = None  # a kept cache is extended once

    def _select(self) -> tuple[list[Lane], list[int]]:
        budget = self.max_batch_tokens
        chosen: dict[int, tuple[Lane, int]] = {}
        for lane in sorted(self.active, key=lambda lane: len(lane.pending) > 1):
            count = min(len(lane.pending), budget)
            if count:
                chosen[id(lane)] = (lane, count)
                budget -= count
        while budget and (queue := self.returning or self.waiting) and self._admissible(queue[0]):
            lane = queue.popleft()
            self._admit(lane)
            count = min(len(lane.pending), budget)
            chosen[id(lane)] = (lane, count)
            budget -= count
        pairs = list(chosen.values())
        return [lane for lane, _ in pairs], [count for _, count in pairs]

    def _admissible(self, lane: Lane) -> bool:
        if not self.active:
            return True
        decoding = sum(len(other.members) for other in self.active)
        if decoding + len(lane.members) > self.max_sequences:
            return False
        # Blocks that prompts already admitted will still take, so that admitting more does not preempt them.
        promised = sum(self._blocks(len(other.pending)) for other in self.active if len(other.pending) > 1)
        base = self.kept.handle(lane.extends)
        held = 0 if base is None else self.cache.length(base)
        needed = self._blocks(len(lane.pending) - held) + len(lane.members)
        return self.kept.make_room(needed + promised + decoding, spare=base)

    def _admit(self, lane: Lane) -> None:
        if lane.extends is not None:
            lane.handle = self.kept.take(lane.extends)
            lane.extends = None
        if lane.handle is None:
            lane.handle = self.cache.prefill()
        del lane.pending[: self.cache.length(lane.handle)]
        self.active.append(lane)

    def _preempt(self, lane: Lane) -> None:
        assert len(self.active) > 1, "one sequence always fits: add() checked it"
        self.counts.preemptions += 1
        self.cache.release([_handle(lane)])
        self.active.remove(lane)
        lane.handle = None
        self.requeue_prompt(lane)
        self.returning.appendleft(lane)

    def _forget(self, lanes: Collection[Lane]) -> None:
        done = set(map(id, lanes))
        self.active = [lane for lane in self.active if id(lane) not in done]
        self.returning = deque(lane for lane in self.returning if id(lane) not in done)
        self.waiting = deque(lane for lane in self.waiting if id(lane) not in done)

    def _release(self, lanes: Iterable[Lane]) -> None:
        self.cache.release([lane.handle for lane in lanes if lane.handle is not None])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)


def _handle(lane: Lane) -> int:
    assert lane.handle is not None
    return lane.handle
