"""The README's tables of options and metrics, generated from their declarations.

``python -m thinktwice_fast.run.tables README.md`` rewrites them in place; with ``--check`` it only compares.
"""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import docstring_parser  # what jsonargparse reads the same help texts with

from thinktwice_fast.bounds import bounds_of
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.metrics import AVERAGE, METRICS

Row = tuple[str, ...]


def options_table(config_class: type) -> str:
    """Markdown of every option below ``config_class``: a table per nested dataclass, under its docstring.

    Name as on the command line, type and bounds, default as YAML, and the docstring of the field.
    """
    return "\n\n".join(_option_sections(config_class, ""))


def metrics_table() -> str:
    """Markdown of every metric: name, phases that have it, unit, definition; a star at timing metrics."""
    rows = [
        (
            _code(metric.name) + (" \\*" if metric.timing else ""),
            ", ".join(metric.phases),
            metric.unit,
            metric.definition,
        )
        for metric in METRICS
    ]
    legend = (
        "`{phase}` is the phase that the record belongs to, `{set}` the name of an evaluation set or "
        f"{_code(AVERAGE)}: the plain mean over the sets that have the metric. "
        "\\* differs between two runs of one seed."
    )
    return f"{_table(('Metric', 'Phases', 'Unit', 'Definition'), rows)}\n\n{legend}"


def _option_sections(owner: type, prefix: str) -> list[str]:
    assert dataclasses.is_dataclass(owner)
    hints = typing.get_type_hints(owner)
    docs = docstring_parser.parse_from_object(owner)
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in docs.params}
    nested = [field.name for field in dataclasses.fields(owner) if dataclasses.is_dataclass(hints[field.name])]
    rows = [
        (
            _code(f"--{prefix}{field.name}"),
            _range_text(field, hints[field.name]),
            _default_text(field),
            helps[field.name],
        )
        for field in dataclasses.fields(owner)
        if field.name not in nested
    ]
    sections = [f"{docs.short_description}\n\n{_table(('Option', 'Type', 'Default', 'Meaning'), rows)}"]
    for name in nested:
        sections += _option_sections(hints[name], f"{prefix}{name}.")
    return sections


def _range_text(field: "dataclasses.Field[Any]", hint: Any) -> str:
    bounds = bounds_of(field)
    return _type_text(hint) if bounds is None else f"{_type_text(hint)}, {bounds}"


def _type_text(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(_code(str(choice)) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_text(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type_text(argument) for argument in arguments)}]"
    if origin is dict:
        return f"{{{_type_text(arguments[0])}: {_type_text(arguments[1])}}}"
    return "null" if hint is types.NoneType else hint.__name__


def _default_text(field: "dataclasses.Field[Any]") -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    assert default is not dataclasses.MISSING, field.name
    return _code(default if isinstance(default, str) and default else json.dumps(default))


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def with_tables(text: str, tables: dict[str, str]) -> str:
    """``text`` with each table of ``tables`` between its markers ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        UserError: a marker is missing, stands twice, or the two stand in the wrong order.
    """
    for name, table in tables.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
            raise UserError(f"the file needs one line {opening} and after it one line {closing}; add them")
        before, _, rest = text.partition(opening)
        after = rest.partition(closing)[2]
        text = f"{before}{opening}\n\n{table}\n\n{closing}{after}"
    return text


def update_file(path: Path, check: bool) -> bool:
    """Whether ``path`` already held the current tables; brings it up to date unless ``check``.

    Raises:
        UserError: the file cannot be read or written, or lacks the markers.
    """
    try:
        old = path.read_text(encoding="utf-8")
        new = with_tables(old, {"options": options_table(Config), "metrics": metrics_table()})
        if new != old and not check:
            path.write_text(new, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of the README") from None
    return new == old


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 for a file out of date under ``--check``, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m thinktwice_fast.run.tables", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file with the markers")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is out of date")
    options = parser.parse_args(arguments)
    try:
        current = update_file(options.file, options.check)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check and not current:
        print(
            f"{options.file} is out of date: run python -m thinktwice_fast.run.tables {options.file}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
