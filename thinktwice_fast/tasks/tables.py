"""Rows of local files and hub data sets as a `datasets.Dataset`, with errors that a reader can act on."""

import csv
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinktwice_fast.errors import Option, Text, UserError, one_line

if TYPE_CHECKING:
    import datasets


def load_file(path: Path, name: str) -> "datasets.Dataset":
    """The rows of a jsonl, json, parquet or csv file; nothing is written beside it or kept in a cache.

    Args:
        path: the file.
        name: what error messages call it.

    Raises:
        UserError: as of `check_file`, or a malformed file.
    """
    check_file(path, name)
    try:
        return FILE_LOADERS[path.suffix](path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or one_line(error)}); check the file") from error


def check_file(path: Path, name: str) -> None:
    """Raise UserError for no such file, an empty one, another kind of file; found without reading it."""
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "no such file; check the path"
        raise UserError(f"{name}: {what}")
    if path.suffix not in FILE_LOADERS:
        raise UserError(f"{name}: not a file of a known kind; give one that ends in {', '.join(FILE_LOADERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{name}: the file is empty; give one with problems")


def load_hub(name: str, subset: str | Sequence[str] | None, split: str, prefix: str) -> "datasets.Dataset":
    """A split of a hub data set; of several subsets, one behind the other.

    Args:
        name: of the data set.
        subset: one, several, or None for a data set without any.
        split: name of the split.
        prefix: the section of the options that name subset and split, for remedies.

    Raises:
        UserError: it cannot be reached, has no such subset or split, or its subsets have different columns.
    """
    import datasets

    _quiet()
    subsets = [subset] if subset is None or isinstance(subset, str) else subset
    try:
        parts = [datasets.load_dataset(name, part, split=split) for part in subsets]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error)
        remedies: tuple[Text, ...] = ("check the name and the network", "give a local jsonl, parquet or csv file")
        if "Config name is missing" in reason or "BuilderConfig" in reason:
            remedies = (("choose one with ", Option(f"{prefix}.subset")),)
        elif "split" in reason.lower():
            remedies = (("choose one with ", Option(f"{prefix}.split")),)
        raise UserError(f"hub data set {name}, split {split}, cannot be loaded ({reason})", *remedies) from error


def has_column(table: "datasets.Dataset", path: str) -> bool:
    """Whether a table has a column ``name``, a field ``column.field`` in one, or lists that ``column.0`` looks into."""
    import datasets

    top, _, field = path.partition(".")
    if path in table.column_names:
        return True
    if not field or top not in table.column_names:
        return False
    inner = table.features[top]
    return field in inner if isinstance(inner, dict) else field.isdigit() and not isinstance(inner, datasets.Value)


def holds_lists(table: "datasets.Dataset", path: str) -> bool:
    """Whether a column's values are lists, chats for instance."""
    import datasets

    return path in table.column_names and not isinstance(table.features[path], (dict, datasets.Value))


def value_at(row: dict[str, Any], path: str) -> Any:
    """The value of a column ``name``, a field ``column.field`` or a place ``column.0``; None where the row lacks it."""
    if path in row:
        return row[path]
    top, _, field = path.partition(".")
    inner = row.get(top)
    if isinstance(inner, list):
        return inner[int(field)] if int(field) < len(inner) else None
    return inner.get(field) if isinstance(inner, dict) else None


def _load_jsonl(path: Path, name: str) -> "datasets.Dataset":
    return _from_rows(list(_json_lines(path, name)), name)


def _json_lines(path: Path, name: str) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise UserError(
                    f"{name}: line {number} is malformed JSON ({one_line(error)}); mend the line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{name}: line {number} is not a JSON object; write one {{...}} on each line")
            yield row


def _load_json(path: Path, name: str) -> "datasets.Dataset":
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, under the other name
            return _load_jsonl(path, name)
        raise UserError(f"{name}: malformed JSON in line {error.lineno} ({error.msg}); mend the file") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name}: malformed JSON ({one_line(error)}); mend the file") from error
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{name}: not a list of JSON objects; write [{{...}}, ...] or one object per line")
    return _from_rows(rows, name)


def _from_rows(rows: list[dict[str, Any]], name: str) -> "datasets.Dataset":
    import datasets

    _quiet()
    if not rows:
        raise UserError(f"{name}: no rows in the file; give one with problems")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table: dict[str, list[Any]] = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            datasets.Dataset.from_dict({column: values})
        except (ValueError, TypeError, NotImplementedError, OverflowError) as error:
            raise UserError(
                f"{name}: {_odd_one_out(values, column) or _misfit(column, error)}; give it one type"
            ) from error
        table[column] = values
    return datasets.Dataset.from_dict(table)


def _odd_one_out(values: list[Any], column: str) -> str:
    """The first value that is of another type than the rest, of text where there is any; "" where all are alike."""
    kinds = [type(value).__name__ for value in values]
    usual = "str" if "str" in kinds else next((kind for kind in kinds if kind != "NoneType"), "NoneType")
    for row, kind in enumerate(kinds):
        if kind not in (usual, "NoneType"):
            return f"row {row} (from 0), column {column}: of type {kind}, others {usual}"
    return ""


def _misfit(column: str, error: Exception) -> str:
    return f"column {column} does not fit one type ({one_line(error)})"


def _load_parquet(path: Path, name: str) -> "datasets.Dataset":
    return _load_with_builder("parquet", path, name)


def _load_csv(path: Path, name: str) -> "datasets.Dataset":
    import datasets

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: not a readable csv file ({one_line(error)}); save it as UTF-8") from error
    # A gold answer such as 1,000 or 007 is text, whatever it looks like; so are "None" and "NA".
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return _load_with_builder("csv", path, name, features=features, keep_default_na=False, encoding="utf-8-sig")


def _load_with_builder(kind: str, path: Path, name: str, **options: Any) -> "datasets.Dataset":
    import datasets

    _quiet()
    with tempfile.TemporaryDirectory(prefix="thinktwice-") as cache:
        try:
            loaded = datasets.load_dataset(kind, data_files=str(path), cache_dir=cache, keep_in_memory=True, **options)
            return loaded["train"]
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = one_line(error.__cause__ or error)
            if "corresponds to no data" in reason:
                raise UserError(f"{name}: no rows in the file; give one with problems") from error
            raise UserError(f"{name}: not a readable {kind} file ({reason}); mend or replace it") from error


FILE_LOADERS: dict[str, Callable[[Path, str], "datasets.Dataset"]] = {
    ".jsonl": _load_jsonl,
    ".json": _load_json,
    ".parquet": _load_parquet,
    ".csv": _load_csv,
}
"""Known endings of local files."""


def _quiet() -> None:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    # Errors too: what they say reaches the user as one line of ours.
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
