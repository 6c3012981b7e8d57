"""Which tokens go into the next step: continuous batching over the paged cache."""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.records import Request, Rollout
from thinktwice_fast.rollout.batch import Batch, NewTokens, Sequence
from thinktwice_fast.rollout.prefix_cache import Counts, PrefixCache
from thinktwice_fast.rollout.stops import Stops


@dataclass
class Scheduler:
    """Decodes first, prefills with what is left of the token budget.

    When blocks run out it gives up what the prefix cache keeps, oldest first, then preempts the youngest sequence.
    What was in the cache before comes back before new prompts come in.
    """

    cache: PagedKVCache
    prefixes: PrefixCache
    counts: Counts
    stops: Stops
    max_sequences: int
    max_batch_tokens: int
    max_tokens: int  # of one sequence
    seed: int  # of the random numbers
    waiting: deque[Sequence] = field(default_factory=deque)  # prompts, in the order they were added
    returning: deque[Sequence] = field(default_factory=deque)  # preempted, or to begin with a kept cache
    active: list[Sequence] = field(default_factory=list)  # oldest first

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; one with more samples than fit at once is queued in parts.

        One that extends a kept cache comes before prompts that wait.

        Raises:
            UserError: the whole cache can't hold one of the sequences, or one could get longer than the engine was
                made for.
            ValueError: stop strings, and the engine has no ``decode``.
        """
        requests = list(requests)
        self.stops.check(requests)
        for request in requests:
            longest = len(request.prompt) + request.sampling.max_tokens
            if self._blocks(longest) > self.cache.num_blocks:
                raise UserError(
                    f"a sequence of up to {longest} tokens does not fit the KV cache of "
                    f"{self.cache.num_blocks * self.cache.block_size}",
                    ("raise ", Option("rollout.cache_tokens")),
                )
            if longest > self.max_tokens:
                raise UserError(
                    f"a sequence of up to {longest} tokens is longer than the {self.max_tokens} that the engine was "
                    "made for",
                    ("raise ", Option("rollout.max_prompt_tokens")),
                    ("raise ", Option("rollout.max_response_tokens")),
                )
        for request in requests:
            self._queue(request)

    def next_batch(self) -> Batch | None:
        """Reserve places for the next step; None when nothing is left to do."""
        while self.waiting or self.returning or self.active:
            sequences, counts = self._select()
            plan = self.cache.extend([sequence.cached for sequence in sequences], counts)
            if plan is not None:
                others_wait = bool(self.returning or self.waiting)
                return Batch(sequences, counts, plan, self.seed, self.stops.ids, others_wait)
            if not self.prefixes.release_oldest():
                self._preempt(self.active[-1])
        return None

    def record(self, batch: Batch, new: NewTokens) -> list[Rollout]:
        """The batch's tokens are in the cache, and these follow them.

        Prompts fork into their samples, responses grow, and sequences that have ended leave the cache.

        Returns:
            The rollouts that grew.
        """
        ready = batch.ready
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            del sequence.pending[:count]
        sequences = [part for sequence in ready for part in self._split(sequence)]
        ended = []
        columns = (new.tokens, new.logps, new.entropies)
        for sequence, tokens, logps, entropies in zip(sequences, *columns, strict=True):
            rollout = sequence.samples[0]
            rollout.response += tokens
            rollout.logps += logps
            rollout.entropies += entropies
            self.stops.mark(rollout, sequence.sampling)
            if rollout.ended:
                ended.append(sequence)
            elif sequence.handle is None:
                _return_whole(sequence)
            else:
                sequence.pending = tokens[-1:]
        self._finish(ended)
        return [sequence.samples[0] for sequence in sequences]

    def clear(self) -> None:
        """Drop all work and free its blocks."""
        self._release(self.active)
        self.active.clear()
        self.returning.clear()
        self.waiting.clear()

    def _queue(self, request: Request) -> None:
        extends = request.extends
        if extends is not None and not self.prefixes.continued_by(request.prompt, extends):
            extends = None
        for start in range(0, len(request.sample_ids), self.max_sequences):
            ids = request.sample_ids[start : start + self.max_sequences]
            samples = [Rollout(request.group, sample, request.prompt) for sample in ids]
            sequence = Sequence(
                list(request.prompt), samples, request.sampling, request.keep, None, extends, request.shares
            )
            (self.waiting if extends is None else self.returning).append(sequence)
            extends = extends if request.shares else None  # taken over, it is extended once

    def _select(self) -> tuple[list[Sequence], list[int]]:
        budget = self.max_batch_tokens
        chosen: dict[int, tuple[Sequence, int]] = {}
        for sequence in sorted(self.active, key=lambda sequence: len(sequence.pending) > 1):
            count = min(len(sequence.pending), budget)
            if count:
                chosen[id(sequence)] = (sequence, count)
                budget -= count
        while budget and (queue := self.returning or self.waiting) and self._admissible(queue[0]):
            sequence = queue.popleft()
            self._admit(sequence)
            count = min(len(sequence.pending), budget)
            chosen[id(sequence)] = (sequence, count)
            budget -= count
        pairs = list(chosen.values())
        return [sequence for sequence, _ in pairs], [count for _, count in pairs]

    def _admissible(self, sequence: Sequence) -> bool:
        if not self.active:
            return True
        decoding = sum(len(other.samples) for other in self.active)
        if decoding + len(sequence.samples) > self.max_sequences:
            return False
        # Blocks that prompts already admitted will still take, so that admitting more does not preempt them.
        promised = sum(self._blocks(len(other.pending)) for other in self.active if len(other.pending) > 1)
        base = self.prefixes.handle(sequence.extends)
        held = 0 if base is None else self.cache.length(base)
        needed = self._blocks(len(sequence.pending) - held) + len(sequence.samples)
        return self.prefixes.make_room(needed + promised + decoding, spare=base)

    def _admit(self, sequence: Sequence) -> None:
        if sequence.extends is not None:
            take = self.prefixes.copy if sequence.shares else self.prefixes.take
            sequence.handle = take(sequence.extends)
            sequence.extends = None
        if sequence.handle is None:
            sequence.handle = self.cache.prefill()
        del sequence.pending[: self.cache.length(sequence.handle)]
        self.active.append(sequence)

    def _split(self, sequence: Sequence) -> list[Sequence]:
        """Fork a prompt into one sequence per sample, each ready for its first token.

        Samples for whose own tail block there is no room now go back to the queue.
        """
        if len(sequence.samples) == 1:
            return [sequence]
        self.active.remove(sequence)
        self.prefixes.make_room(len(sequence.samples) - 1)
        room = min(self.cache.free_blocks + 1, len(sequence.samples))
        here, later = sequence.samples[:room], sequence.samples[room:]
        copies = self.cache.fork(sequence.cached, len(here) - 1) if len(here) > 1 else []
        forked = [
            Sequence([], [sample], sequence.sampling, sequence.keep, handle)
            for sample, handle in zip(here, [sequence.cached, *copies], strict=True)
        ]
        queued = [Sequence([], [sample], sequence.sampling, sequence.keep) for sample in later]
        self.active.extend(forked)
        self.returning.extendleft(reversed(queued))
        return forked + queued

    def _finish(self, sequences: Collection[Sequence]) -> None:
        """These are complete: free their blocks, or keep them where that was asked for."""
        if not sequences:
            return
        done = set(map(id, sequences))
        self.active = [sequence for sequence in self.active if id(sequence) not in done]
        # A sample that found no room beside its siblings may have ended with its first token.
        self.returning = deque(sequence for sequence in self.returning if id(sequence) not in done)
        for sequence in sequences:
            if sequence.keep and sequence.handle is not None:
                self.prefixes.keep(sequence.handle, sequence.samples[0])
                sequence.handle = None
        self._release(sequences)

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self.active) > 1, "one sequence always fits: add() checked it"
        self.counts.preemptions += 1
        self.cache.release([sequence.cached])
        self.active.remove(sequence)
        sequence.handle = None
        _return_whole(sequence)
        self.returning.appendleft(sequence)

    def _release(self, sequences: Iterable[Sequence]) -> None:
        self.cache.release([sequence.handle for sequence in sequences if sequence.handle is not None])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)


def _return_whole(sequence: Sequence) -> None:
    """All its tokens have to come into the cache again."""
    first = sequence.samples[0]
    sequence.pending = [*first.prompt, *first.response]
