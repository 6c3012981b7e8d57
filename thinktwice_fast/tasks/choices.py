"""Multiple choice: the options of a question, as they are shown, and the letter of the right one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Choices:
    """The options of one question."""

    texts: tuple[str, ...]
    right: int  # place of the right one

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return ascii_uppercase[self.right]

    def shown(self) -> str:
        """The options, a line each: ``A. one``, ``B. two``, ..."""
        return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.texts, strict=False))


def listed(options: Any, answer: str) -> Choices:
    """Options from a column that lists them.

    Args:
        options: a list of texts, or ``{"label": [...], "text": [...]}`` (ARC, CommonsenseQA) with labels of any kind.
        answer: the label of the right option; without labels its letter.

    Raises:
        ValueError: another form, too few or too many, no option of that label.
    """
    texts = options.get("text") if isinstance(options, dict) else options
    labels = options.get("label") if isinstance(options, dict) else list(ascii_uppercase)
    if not _are_texts(texts) or not _are_texts(labels):
        raise ValueError("no list of options (texts, or {label: [...], text: [...]})")
    if not isinstance(options, dict):
        labels = labels[: len(texts)]
    if not 2 <= len(texts) <= len(ascii_uppercase) or len(labels) != len(texts):
        raise ValueError(f"{len(texts)} options and {len(labels)} labels; a question takes 2 to {len(ascii_uppercase)}")
    if answer not in labels:
        raise ValueError(f"the answer {answer!r} is none of the options {', '.join(labels)}")
    return Choices(tuple(text.strip() for text in texts), labels.index(answer))


def shuffled(right: str, wrong: Sequence[str], seed: int, index: int) -> Choices:
    """The options of question ``index`` in an order that ``seed`` and ``index`` alone decide."""
    order = list(range(1 + len(wrong)))
    random.Random(f"choices:{seed}:{index}").shuffle(order)
    texts = (right, *wrong)
    return Choices(tuple(texts[place].strip() for place in order), order.index(0))


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
