"""Texts of responses, token by token."""

import random

import pytest

from tests.small_models import bpe_tokenizer
from thinktwice_fast.tasks.arithmetic import build_tokenizer
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.tasks.text_stream import TextStream, TokenTexts

STOP = frozenset({bpe_tokenizer().eos_token_id})


@pytest.mark.parametrize("stop_string", ["## Question", None])
def test_what_may_begin_a_stop_string_waits(stop_string: str | None) -> None:
    text, begun = "a line\n\n\nand ### a Questio, then\n", "## Question"
    ids = bpe_tokenizer()(text + begun, add_special_tokens=False)["input_ids"]
    stream = TextStream(ChatFormat(bpe_tokenizer()), STOP, ("## Question: next", "## Question", "\n\n\n\n"))
    pieces = [stream.text(ids[:end], False) for end in range(1, len(ids))]
    assert "".join(pieces) == text
    assert "".join(pieces) + stream.text(ids, True, stop_string) == (text if stop_string else text + begun)


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_character_waits_until_all_its_bytes_are_there(cut: int) -> None:
    """Every token is a byte or a few of them: a Japanese character takes up to 3, the emoji 4."""
    text = "Die Länge: 日本語 🎉 \\boxed{½} é"
    ids = bpe_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    chat = ChatFormat(bpe_tokenizer())
    stream = TextStream(chat, STOP)
    pieces = [stream.text(ids[:end], False) for end in range(1, len(ids), cut)] + [stream.text(ids, True)]
    assert cut > 1 or TokenTexts(chat, STOP).split(ids) == pieces
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces.count("") > 3 and len(pieces) - pieces.count("") > 10 // cut


def test_any_tokens_join_to_what_they_decode_to() -> None:
    chat, numbers = ChatFormat(bpe_tokenizer()), random.Random(1)
    for _ in range(100):
        ids = numbers.choices(range(len(bpe_tokenizer())), k=40)
        ids = [number for number in ids if number not in STOP]
        stream = TextStream(chat, STOP)
        pieces = [stream.text(ids[: end + 1], end + 1 == len(ids)) for end in range(len(ids))]
        assert "".join(pieces) == chat.response_text(ids, STOP)
        texts = TokenTexts(chat, STOP).split(ids)
        assert len(texts) == len(ids) and "".join(texts) == "".join(pieces)


def test_a_text_for_each_token() -> None:
    tokenizer = build_tokenizer()
    ids = [*tokenizer("8-8=0\n0+5=5", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    texts = TokenTexts(ChatFormat(tokenizer), frozenset({tokenizer.eos_token_id})).split(ids)
    assert texts == ["8", "-", "8", "=", "0", "\n", "0", "+", "5", "=", "5", ""]
