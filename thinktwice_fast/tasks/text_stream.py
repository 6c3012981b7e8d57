"""The text of a response token by token, for those who show it."""

from collections.abc import Sequence
from functools import partial

from thinktwice_fast.tasks.prompts import ChatFormat


class TextStream:
    """Cuts the text of a growing response where no later token can change what has been given out.

    A character's UTF-8 bytes may be spread over several tokens: they wait until it is whole. So does what may turn out
    to be the beginning of a stop string, which is no part of the text.
    """

    def __init__(self, chat: ChatFormat, stop_ids: frozenset[int], stop_strings: tuple[str, ...] = ()):
        self._decode = partial(chat.response_text, stop_ids=stop_ids)
        self._beginnings = {stop[:end] for stop in stop_strings for end in range(1, len(stop))}
        self._start = 0  # of the tokens decoded again: some decoders need those before to place spaces
        self._given = 0
        self._held = ""

    def text(self, ids: Sequence[int], last: bool, stop_string: str | None = None) -> str:
        """What the newest of the response's tokens add; with ``last`` all that is left, up to its ``stop_string``."""
        text = self._held + self._decoded(ids, last)
        if last:
            self._held = ""
            return text.partition(stop_string)[0] if stop_string else text
        ends = (text[-length:] for length in range(len(text), 0, -1))
        self._held = next((end for end in ends if end in self._beginnings), "")
        return text.removesuffix(self._held)

    def _decoded(self, ids: Sequence[int], last: bool) -> str:
        before = self._decode(ids[self._start : self._given])
        now = self._decode(ids[self._start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        self._start, self._given = self._given, len(ids)
        return now[len(before) :]


class TokenTexts:
    """What each token of a response adds to its text, quickly for many responses."""

    def __init__(self, chat: ChatFormat, stop_ids: frozenset[int]):
        self._chat = chat
        self._stop_ids = stop_ids
        self._alone: dict[int, str] = {}  # texts of tokens by themselves

    def split(self, ids: Sequence[int]) -> list[str]:
        """A text per token; joined, they are the response's text.

        Empty: a stop token, and a token that leaves a character unfinished, whose text comes with the one that ends it.
        """
        for token in set(ids) - self._alone.keys():
            self._alone[token] = self._text([token])
        texts = [self._alone[token] for token in ids]
        if "".join(texts) == self._text(ids):
            return texts
        # A character over several tokens, or a tokenizer whose tokens have other texts beside others.
        stream = TextStream(self._chat, self._stop_ids)
        return [stream.text(ids[:end], last=end == len(ids)) for end in range(1, len(ids) + 1)]

    def _text(self, ids: Sequence[int]) -> str:
        return self._chat.response_text(ids, self._stop_ids)
