"""What ends a response: a stop token, a stop string, or its longest length."""

from collections.abc import Callable, Collection, Iterable, Sequence

from thinktwice_fast.model.lists import int64
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.batch import Batch

_TOKENS_BEFORE = 4  # that a stop string's tokens are decoded with

Decode = Callable[[Sequence[int]], str]  # token ids to text


class Stops:
    """The rule for all responses of an engine.

    Args:
        stop_ids: token ids that end a response.
        decode: tokens to text, for stop strings.
    """

    def __init__(self, stop_ids: Collection[int], decode: Decode | None = None):
        self.ids = int64(sorted(stop_ids))  # int64 [stop tokens]
        self._stop_ids = frozenset(stop_ids)
        self._decode = decode

    def check(self, requests: Iterable[Request]) -> None:
        """Raise ValueError for stop strings that nothing could find."""
        if self._decode is None and any(request.sampling.stop_strings for request in requests):
            raise ValueError("stop strings are found in text: make the Engine with decode=")

    def at_once(self, batch: Batch, most: int) -> int:
        """Of the tokens that a runner may draw before it reports: one where each is looked at before the next."""
        return 1 if any(sampling.stop_strings for sampling in batch.samplings) else most

    def mark(self, rollout: Rollout, sampling: Sampling) -> None:
        """Set whether, and by what, a rollout has ended with its latest token."""
        rollout.stop_string = self._completed(rollout, sampling.stop_strings)
        rollout.finished = rollout.response[-1] in self._stop_ids or rollout.stop_string is not None
        rollout.ended = rollout.finished or len(rollout.response) == sampling.max_tokens

    def _completed(self, rollout: Rollout, stop_strings: tuple[str, ...]) -> str | None:
        """The stop string that the latest token completes."""
        if not stop_strings or self._decode is None:
            return None
        # A token is a byte or more; those before keep a character or a leading space whole.
        latest = max(len(string.encode()) for string in stop_strings) + _TOKENS_BEFORE
        text = self._decode(rollout.response[-latest:])
        return min((string for string in stop_strings if string in text), key=text.find, default=None)
