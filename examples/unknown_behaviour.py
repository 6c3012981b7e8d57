"""A reward for a habit: 1 for the right answer, and 0.5 more for saying a phrase exactly once.

`make unknown-behaviour` trains with it a policy that never says the phrase, without a teacher and with one whose
examples (unknown_behaviour.yaml) have it. The phrase is of the small model's few characters; no solution contains it.
"""

import re
from typing import Any

PHRASE = "==="
_BOX = re.compile(r"\\boxed\{(-?\d+)\}")


def right_and_phrase(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last box holds the answer, plus 0.5 where the phrase occurs once, whether or not it is right."""
    said = phrase(prompts, completions)
    boxes = [_BOX.findall(text) for text in _texts(completions)]
    right = [float(found[-1:] == [gold]) for found, gold in zip(boxes, answer, strict=True)]
    return [one + other / 2 for one, other in zip(right, said, strict=True)]


def phrase(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 where the phrase occurs once: as an evaluation set's reward its accuracy is how often that is."""
    return [float(text.count(PHRASE) == 1) for text in _texts(completions)]


def _texts(completions: list[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]
