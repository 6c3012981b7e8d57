"""Problem sources: the generated arithmetic task, local files and hub data sets."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinktwice_fast.config import DataOptions
from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks import tables
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.source import Source

if TYPE_CHECKING:
    import datasets

_ARITHMETIC = "arithmetic:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_QUESTION_COLUMNS = ("prompt", "question", "problem")
_ANSWER_COLUMNS = ("reward_model.ground_truth", "answer")


def load_source(options: DataOptions, *, held_out: bool = False, prefix: str = "data") -> Source:
    """The problems that ``options`` name, all of them checked.

    A question is a text or, in the verl schema, a list of chat messages that ends with a user message; of an answer
    with a "####" (GSM8K) the part after the last one is taken.

    Args:
        options: `DataOptions`; ``shuffle`` is the caller's business.
        held_out: of an arithmetic source take the held-out part; files and hub data sets have splits for that.
        prefix: the section of the options that ``options`` were made from, for remedies: "data", or "eval" for an
            evaluation set.

    Raises:
        UserError: a file that is missing, empty or malformed, a hub data set, subset or split that cannot be loaded, a
            missing column, a question or answer that is not text, an option that the source would ignore.
    """
    if options.source.startswith(_ARITHMETIC):
        return _arithmetic(options, held_out, prefix)
    return TableSource(_load_table(options, prefix), options, prefix)


class TableSource(Source):
    """Problems from the rows of a `datasets.Dataset`; see `load_source`."""

    def __init__(self, table: "datasets.Dataset", options: DataOptions, prefix: str) -> None:
        self._name = options.source
        self._prefix = prefix
        self._instruction = options.instruction
        names = table.column_names
        self._question = self._column(table, options.question_column, _QUESTION_COLUMNS, "question")
        self._answer = self._column(table, options.answer_column, _ANSWER_COLUMNS, "answer")
        self._target: str | None = None
        if options.target_column is not None:
            self._target = self._column(table, options.target_column, (), "target")
        if len(table) == 0:
            raise UserError(f"{self._name}: no rows (columns {', '.join(names)}); give a source with problems")
        self._table = table.select(range(min(options.limit or len(table), len(table))))
        self.size = len(self._table)
        self._check_rows()

    def problem(self, index: int) -> Problem:
        """The problem in row ``index``."""
        row = self._table[index]
        target = None if self._target is None else self._text(row, self._target, index)
        return Problem(index, self._messages(row, index), self._gold(row, index), target, row)

    def _check_rows(self) -> None:
        paths = [path for path in (self._question, self._answer, self._target) if path is not None]
        tops = {path if path in self._table.column_names else path.partition(".")[0] for path in paths}
        for index, row in enumerate(self._table.select_columns(sorted(tops))):
            self._messages(row, index)
            self._gold(row, index)
            if self._target is not None:
                self._text(row, self._target, index)

    def _column(self, table: "datasets.Dataset", wanted: str | None, usual: tuple[str, ...], what: str) -> str:
        candidates = (wanted,) if wanted is not None else usual
        for path in candidates:
            if tables.has_column(table, path):
                return path
        missing = " or ".join(candidates)
        raise UserError(
            f"{self._name}: no column {missing} for the {what}; it has {', '.join(table.column_names) or 'none'}",
            ("name the right one with ", Option(f"{self._prefix}.{what}_column")),
        )

    def _text(self, row: dict[str, Any], path: str, index: int) -> str:
        value = tables.value_at(row, path)
        if not isinstance(value, str):
            kind = "empty (null)" if value is None else f"of type {type(value).__name__}"
            raise UserError(f"{self._name}: row {index} (from 0), column {path}: {kind}, not text; make it a string")
        return value

    def _gold(self, row: dict[str, Any], index: int) -> str:
        gold = self._text(row, self._answer, index).rpartition("####")[2].strip()
        if not gold:
            raise UserError(
                f"{self._name}: row {index} (from 0), column {self._answer}: no answer; fill it in, or drop the row"
            )
        return gold

    def _messages(self, row: dict[str, Any], index: int) -> tuple[Message, ...]:
        value = tables.value_at(row, self._question)
        if isinstance(value, list):
            messages = self._checked_chat(value, index)
        else:
            messages = [{"role": "user", "content": self._text(row, self._question, index)}]
        if self._instruction:
            messages[-1]["content"] += " " + self._instruction
        return tuple(messages)

    def _checked_chat(self, value: list[Any], index: int) -> list[Message]:
        place = f"{self._name}: row {index} (from 0), column {self._question}"
        messages = []
        for message in value:
            parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
            if not all(isinstance(part, str) for part in parts):
                raise UserError(f"{place}: a message without text for role and content; give each both as strings")
            messages.append({"role": message["role"], "content": message["content"]})
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"{place}: the chat does not end with a user message; end it with the question")
        return messages


def _arithmetic(options: DataOptions, held_out: bool, prefix: str) -> ArithmeticSource:
    for name in ("subset", "question_column", "answer_column", "target_column", "instruction"):
        if getattr(options, name):
            raise UserError(
                (Option(f"{prefix}.{name}"), f" means nothing to {options.source}, which the program makes itself"),
                "leave it out",
            )
    return ArithmeticSource(options.source.removeprefix(_ARITHMETIC), held_out, options.limit)


def _load_table(options: DataOptions, prefix: str) -> "datasets.Dataset":
    path = Path(options.source).expanduser()
    if path.exists() or path.suffix in tables.FILE_LOADERS:
        return tables.load_file(path, options.source)
    if not _HUB_NAME.fullmatch(options.source):
        raise UserError(f"{options.source}: no such file; give a file, a hub data set's name, or arithmetic:tm5")
    return tables.load_hub(options.source, options.subset, options.split, prefix)
