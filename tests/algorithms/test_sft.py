"""Supervised examples: whole, in order, and refused where they do not fit."""

from typing import Any, cast

import pytest

from tests.algorithms.stubs import END, problem
from tests.small_models import bpe_tokenizer
from thinktwice_fast.algorithms.sft import SFT
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.update.batches import Example

pytestmark = pytest.mark.usefixtures("one_process")

CHAT = ChatFormat(bpe_tokenizer())
PROMPT = len(CHAT.prompt_ids(problem(3).messages))
RESPONSE = len(CHAT.encode("The answer is 15")) + 1


class Updater:
    """Keeps what it is to learn."""

    def __init__(self) -> None:
        self.learned: list[Example] = []

    def supervised_update(self, examples: list[Example]) -> dict[str, float]:
        self.learned += examples
        return {}


def sft(room: int) -> tuple[SFT, Updater]:
    """Two examples a step, of ``room`` tokens at most; all but the targets are alike."""
    config = Config(problems_per_step=2)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = room - 5, 5
    updater = Updater()

    def examples(position: int) -> Any:
        return problem(3).messages, "The answer is 15" + " and 15" * (position == 3)

    return SFT(config, examples, CHAT, END, cast(Any, updater)), updater


def test_examples_are_learned_whole_with_their_end_token() -> None:
    algorithm, updater = sft(PROMPT + RESPONSE)
    algorithm.step(1)
    assert [len(example.response) for example in updater.learned] == [RESPONSE] * 2
    assert all(example.response[-1] == END for example in updater.learned)


def test_an_example_that_does_not_fit_is_named_and_nothing_is_learned_of_its_batch() -> None:
    algorithm, updater = sft(PROMPT + RESPONSE)
    algorithm.step(1)
    with pytest.raises(
        UserError,
        match=rf"^example 3: its prompt of {PROMPT} tokens and its response of \d+, end token included, are more than "
        rf"the {PROMPT + RESPONSE} of .*: raise --rollout\.max_response_tokens$",
    ):
        algorithm.step(2)
    assert len(updater.learned) == 2
    assert algorithm.state() == {"position": 2}


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    algorithm, _ = sft(PROMPT)
    with pytest.raises(UserError, match=r"^example 0: .* leaves no room .*: raise --rollout\.max_prompt_tokens$"):
        algorithm.step(1)
