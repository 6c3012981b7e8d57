"""Caches of ended rollouts, kept so that a later prompt which continues one is not computed from its start."""

from collections.abc import Sequence
from dataclasses import dataclass

from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.records import Rollout


@dataclass
class Counts:
    """What happened to sequences and requests in the cache, since the engine was made."""

    preemptions: int = 0  # times a sequence had to leave a full cache and start over
    # Of the requests that were to extend a rollout's cache:
    extended: int = 0  # only the tokens after that rollout were computed
    prompt_differs: int = 0  # computed anew: the prompt does not continue that rollout token for token
    policy_changed: int = 0  # computed anew: the cache was written by another policy version
    released: int = 0  # computed anew: not kept, taken over by another request, or given up because blocks ran out

    @property
    def prefilled_anew(self) -> int:
        """Requests that were to extend a cache and could not."""
        return self.prompt_differs + self.policy_changed + self.released


class PrefixCache:
    """Sequences of the cache that belong to ended rollouts, oldest first.

    Nothing runs in them: they are given up, oldest first, when blocks run out.
    """

    def __init__(self, cache: PagedKVCache, counts: Counts):
        self._cache = cache
        self._counts = counts
        self._rollouts: dict[int, Rollout] = {}  # by handle, in the order they were kept
        self._blocks: dict[int, int] = {}  # of each, those shared with others included

    def keep(self, handle: int, rollout: Rollout) -> None:
        """Take over the sequence of a rollout that has ended."""
        self._cache.trim([handle])  # a runner may have taken blocks for it ahead
        self._rollouts[handle] = rollout
        self._blocks[handle] = -(-self._cache.length(handle) // self._cache.block_size)
        rollout.cached = handle

    def handle(self, rollout: Rollout | None) -> int | None:
        """The sequence that is kept of a rollout."""
        handle = None if rollout is None else rollout.cached
        return handle if handle is not None and self._rollouts.get(handle) is rollout else None

    def continued_by(self, prompt: Sequence[int], rollout: Rollout) -> bool:
        """Whether a prompt continues the rollout's sequence, token for token and under the same policy version.

        Otherwise the reason is counted and the sequence is given up.
        """
        handle = self.handle(rollout)
        if handle is None:
            self._counts.released += 1
            return False
        length = self._cache.length(handle)  # all but the last token, which was never fed
        if self._cache.version(handle) != self._cache.policy_version:
            self._counts.policy_changed += 1
        elif length >= len(prompt) or [*rollout.prompt, *rollout.response][:length] != list(prompt[:length]):
            self._counts.prompt_differs += 1
        else:
            return True
        self._release(handle)
        return False

    def take(self, rollout: Rollout) -> int | None:
        """Hand over a rollout's sequence to be extended; None, and counted, where it was given up in the meantime."""
        handle = self.handle(rollout)
        if handle is None:
            self._counts.released += 1
            return None
        del self._rollouts[handle], self._blocks[handle]
        self._counts.extended += 1
        return handle

    def copy(self, rollout: Rollout) -> int | None:
        """As ``take``, but what is handed over is a copy: its full blocks are shared, its last one takes a free one."""
        handle = self.handle(rollout)
        if handle is None or not self._cache.free_blocks:
            return self.take(rollout)
        self._counts.extended += 1
        return self._cache.fork(handle, 1)[0]

    def make_room(self, blocks: int, spare: int | None = None) -> bool:
        """Whether ``blocks`` are free, after giving up sequences, oldest first, where that can help.

        Args:
            blocks: wanted.
            spare: a kept sequence that is not given up.
        """
        others = [handle for handle in self._rollouts if handle != spare]
        # At most so many come free: blocks shared with sequences that stay do not.
        if self._cache.free_blocks + sum(self._blocks[handle] for handle in others) < blocks:
            return False
        for handle in others:
            if self._cache.free_blocks >= blocks:
                break
            self._release(handle)
        return self._cache.free_blocks >= blocks

    def release_oldest(self) -> bool:
        """Give up the oldest; False where none is left."""
        if not self._rollouts:
            return False
        self._release(next(iter(self._rollouts)))
        return True

    def release(self, rollout: Rollout) -> None:
        """Give up what is kept of a rollout, if anything is."""
        handle = self.handle(rollout)
        if handle is not None:
            self._release(handle)

    def clear(self) -> None:
        """Give up all."""
        while self.release_oldest():
            pass

    def _release(self, handle: int) -> None:
        del self._rollouts[handle], self._blocks[handle]
        self._cache.release([handle])
