"""Supervised examples: whole, in order, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from tests.algorithms.stubs import END, problem
from tests.small_models import bpe_tokenizer
from thinktwice_fast.algorithms.sft import SFT
from thinktwice_fast.config import Config, DataOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.tasks.sources import load_source
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


def test_of_a_chat_the_last_turn_is_learned_as_the_template_writes_it(tmp_path: Path) -> None:
    """Prompt and response are the template's own tokens; the loss begins with the turn and ends with its end token."""
    chats = [[("user", "2 + 3?"), ("assistant", "4")], [("system", "Add."), ("user", "2 + 3?"), ("assistant", "4"),
             ("user", "Recheck."), ("assistant", "2 + 3 = 5")]]  # fmt: skip
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = load_source(DataOptions(source=str(file), target_column="messages"))
    updater, tokenizer = Updater(), bpe_tokenizer()

    def examples(position: int) -> Any:
        return source[position].messages, source[position].target

    SFT(Config(problems_per_step=2), examples, CHAT, END, cast(Any, updater)).step(1)
    for row, learned in zip(rows, updater.learned, strict=True):
        whole = str(tokenizer.apply_chat_template(row["messages"], tokenize=False)).removesuffix("\n")
        assert [*learned.prompt, *learned.response] == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(learned.response) == row["messages"][-1]["content"] + "<|im_end|>"


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
