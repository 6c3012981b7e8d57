"""Problem sources: the generated arithmetic task, local files and hub data sets."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinktwice_fast.config import ARITHMETIC, DataOptions
from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks import choices, tables
from thinktwice_fast.tasks.answers import final_answer
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.choices import Choices
from thinktwice_fast.tasks.source import Source

if TYPE_CHECKING:
    import datasets

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_VERL_COLUMNS = ("prompt", "reward_model.ground_truth")
_SOLUTION = "solution"
_QUESTION_COLUMNS = (_VERL_COLUMNS[0], "question", "problem")
_ANSWER_COLUMNS = (_VERL_COLUMNS[1], "answer", _SOLUTION)
_BOX = "\\boxed{}"
_OF_PROBLEMS = ("question_column", "context_column", "answer_column", "choices_column", "wrong_columns", "instruction")
_OF_TABLES = ("subset", "target_column", *_OF_PROBLEMS)


def load_source(options: DataOptions, *, held_out: bool = False, prefix: str = "data", or_verl: bool = False) -> Source:
    """The problems that ``options`` name, all of them checked.

    A question is a text or, in the verl schema, a list of chat messages that ends with a user message. What is taken
    of an answer: `answers.final_answer`.

    Args:
        options: `DataOptions`; ``shuffle`` is the caller's business.
        held_out: of an arithmetic source take the held-out part; files and hub data sets have splits for that.
        prefix: the section of the options that ``options`` were made from, for remedies: "data", or "eval" for an
            evaluation set.
        or_verl: the columns named are those of the hub's form: a table in the verl schema is read as such.

    Raises:
        UserError: a file that is missing, empty or malformed, a hub data set, subset or split that cannot be loaded, a
            missing column, a question or answer that is not text, options of a question without the right one among
            them, an option that the source would ignore.
    """
    if options.source.startswith(ARITHMETIC):
        return _arithmetic(options, held_out, prefix)
    table = _load_table(options, prefix)
    if options.target_column is not None and tables.holds_lists(table, options.target_column):
        return ChatSource(table, options, prefix)
    if or_verl and all(tables.has_column(table, path) for path in _VERL_COLUMNS):
        question, answer = _VERL_COLUMNS
        options = replace(options, question_column=question, answer_column=answer, context_column=None,
                          choices_column=None, wrong_columns=(), choices_seed=0)  # fmt: skip
    return TableSource(table, options, prefix)


class ChatSource(Source):
    """Whole chats from the rows of a `datasets.Dataset`: what is learned is the last turn, an assistant's.

    Raises:
        UserError: an option that names another part of a problem, a chat that is malformed or ends otherwise.
    """

    def __init__(self, table: "datasets.Dataset", options: DataOptions, prefix: str) -> None:
        for name in _OF_PROBLEMS:
            if getattr(options, name):
                raise UserError(
                    (Option(f"{prefix}.{name}"), " would be ignored: ", Option(f"{prefix}.target_column"),
                     f" {options.target_column} holds whole chats"),
                    "leave it out",
                )  # fmt: skip
        assert options.target_column is not None
        self._name, self._target = options.source, options.target_column
        self._table = table.select(range(min(options.limit or len(table), len(table))))
        self.size = len(self._table)
        for index in range(self.size):
            self._chat(index)

    def problem(self, index: int) -> Problem:
        """The chat in row ``index``; it has no gold answer."""
        *asked, response = self._chat(index)
        return Problem(index, tuple(asked), "", response["content"], self._table[index])

    def _chat(self, index: int) -> list[Message]:
        place = _place(self._name, self._target, index)
        value = tables.value_at(self._table[index], self._target)
        messages = _checked_messages(value or [], place)
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise UserError(
                f"{place}: the chat does not end with an assistant message that has text, after another message; end "
                "it with the response to learn"
            )
        return messages


class TableSource(Source):
    """Problems from the rows of a `datasets.Dataset`; see `load_source`."""

    def __init__(self, table: "datasets.Dataset", options: DataOptions, prefix: str) -> None:
        self._name = options.source
        self._prefix = prefix
        self._instruction = options.instruction
        self._seed = options.choices_seed
        names = table.column_names
        self._question = self._column(table, options.question_column, _QUESTION_COLUMNS, "question")
        self._answer = self._column(table, options.answer_column, _ANSWER_COLUMNS, "answer")
        self._worked = options.answer_column is None and self._answer == _SOLUTION  # whose answer must be in a box
        self._context = self._named(table, options.context_column, "context")
        self._choices = self._named(table, options.choices_column, "choices")
        self._target = self._named(table, options.target_column, "target")
        self._wrong = [self._column(table, name, (), "wrong") for name in options.wrong_columns]
        if self._seed and not self._wrong:
            seed, wrong = (Option(f"{prefix}.{name}") for name in ("choices_seed", "wrong_columns"))
            raise UserError((seed, " would be ignored without ", wrong), "leave it out")
        if self._choices and self._wrong:
            listed, wrong = (Option(f"{prefix}.{name}") for name in ("choices_column", "wrong_columns"))
            raise UserError((listed, " and ", wrong, " both say where the options are"), "give one of them")
        if len(table) == 0:
            raise UserError(f"{self._name}: no rows (columns {', '.join(names)}); give a source with problems")
        self._table = table.select(range(min(options.limit or len(table), len(table))))
        self.size = len(self._table)
        self._check_rows()

    def problem(self, index: int) -> Problem:
        """The problem in row ``index``."""
        row = self._table[index]
        target = None if self._target is None else self._text(row, self._target, index)
        options = self._options(row, index)
        gold = options.letter if options else self._gold(row, index)
        return Problem(index, self._messages(row, index, options)[0], gold, target, row)

    def _check_rows(self) -> None:
        paths = (self._question, self._context, self._answer, self._choices, *self._wrong, self._target)
        named = [path for path in paths if path is not None]
        tops = {path if path in self._table.column_names else path.partition(".")[0] for path in named}
        held = 0
        for index, row in enumerate(self._table.select_columns(sorted(tops))):
            options = self._options(row, index)
            held += self._messages(row, index, options)[1]
            if options is None:
                self._gold(row, index)
            if self._target is not None:
                self._text(row, self._target, index)
        if held:
            self.notes = (
                f"{self._name}: {held} of {self.size} prompts say already what the instruction says (or where to put "
                f"the {_BOX}): it is not appended to them",
            )

    def _named(self, table: "datasets.Dataset", wanted: str | None, what: str) -> str | None:
        return None if wanted is None else self._column(table, wanted, (), what)

    def _column(self, table: "datasets.Dataset", wanted: str | None, usual: tuple[str, ...], what: str) -> str:
        candidates = (wanted,) if wanted is not None else usual
        for path in candidates:
            if tables.has_column(table, path):
                return path
        missing = " or ".join(candidates)
        option = "wrong_columns" if what == "wrong" else f"{what}_column"
        raise UserError(
            f"{self._name}: no column {missing} for the {what}; it has {', '.join(table.column_names) or 'none'}",
            ("name the right one with ", Option(f"{self._prefix}.{option}")),
        )

    def _text(self, row: dict[str, Any], path: str, index: int) -> str:
        value = tables.value_at(row, path)
        if not isinstance(value, str):
            kind = "empty (null)" if value is None else f"of type {type(value).__name__}"
            raise UserError(f"{_place(self._name, path, index)}: {kind}, not text; make it a string")
        return value

    def _gold(self, row: dict[str, Any], index: int) -> str:
        value = tables.value_at(row, self._answer)
        text = _as_text(value)
        if text is None:
            text = self._text(row, self._answer, index)
        gold = final_answer(text)
        if not gold or (self._worked and gold == text.strip()):
            what = f"no answer in a {_BOX}" if self._worked else "no answer"
            raise UserError(f"{_place(self._name, self._answer, index)}: {what}; fill it in, or drop the row")
        return gold

    def _options(self, row: dict[str, Any], index: int) -> Choices | None:
        """The options of a multiple-choice question; None where it is none."""
        if self._wrong:
            wrong = [self._text(row, path, index) for path in self._wrong]
            return choices.shuffled(self._text(row, self._answer, index), wrong, self._seed, index)
        if self._choices is None:
            return None
        try:
            return choices.listed(tables.value_at(row, self._choices), self._gold(row, index))
        except ValueError as error:
            raise UserError(f"{_place(self._name, self._choices, index)}: {error}; mend the row") from error

    def _messages(self, row: dict[str, Any], index: int, options: Choices | None) -> tuple[tuple[Message, ...], bool]:
        """The chat, and whether it held the instruction already."""
        value = tables.value_at(row, self._question)
        if isinstance(value, list):
            messages = self._checked_chat(value, index)
        else:
            messages = [{"role": "user", "content": self._text(row, self._question, index)}]
        asked = messages[-1]
        if self._context is not None and tables.value_at(row, self._context) is not None:
            context = self._text(row, self._context, index).strip()
            asked["content"] = f"{context}\n\n{asked['content']}" if context else asked["content"]
        if options is not None:
            asked["content"] = f"{asked['content'].strip()}\n\n{options.shown()}"
        held = bool(self._instruction) and _holds(messages, self._instruction)
        if self._instruction and not held:
            asked["content"] += (" " if options is None else "\n\n") + self._instruction
        return tuple(messages), held

    def _checked_chat(self, value: list[Any], index: int) -> list[Message]:
        place = _place(self._name, self._question, index)
        messages = _checked_messages(value, place)
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"{place}: the chat does not end with a user message; end it with the question")
        return messages


def _place(name: str, column: str, index: int) -> str:
    return f"{name}: row {index} (from 0), column {column}"


def _checked_messages(value: Sequence[Any], place: str) -> list[Message]:
    messages = []
    for message in value:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{place}: a message without text for role and content; give each both as strings")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _as_text(value: Any) -> str | None:
    """A truth value or a number as an answer; None for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value) if isinstance(value, int) else None


def _holds(messages: Sequence[Message], instruction: str) -> bool:
    """Whether a chat says what the instruction says: the same words, or where to box the answer."""
    said = " ".join(" ".join(message["content"] for message in messages).split())
    return " ".join(instruction.split()).removesuffix(".") in said or (_BOX in instruction and _BOX in said)


def _arithmetic(options: DataOptions, held_out: bool, prefix: str) -> ArithmeticSource:
    for name in _OF_TABLES:
        if getattr(options, name):
            raise UserError(
                (Option(f"{prefix}.{name}"), f" means nothing to {options.source}, which the program makes itself"),
                "leave it out",
            )
    return ArithmeticSource(options.source.removeprefix(ARITHMETIC), held_out, options.limit)


def _load_table(options: DataOptions, prefix: str) -> "datasets.Dataset":
    path = Path(options.source).expanduser()
    if path.exists() or path.suffix in tables.FILE_LOADERS:
        return tables.load_file(path, options.source)
    if not _HUB_NAME.fullmatch(options.source):
        raise UserError(f"{options.source}: no such file; give a file, a hub data set's name, or arithmetic:tm5")
    return tables.load_hub(options.source, options.subset, options.split, prefix)
