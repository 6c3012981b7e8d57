"""docs/options.md and docs/metrics.md, generated from the declarations of options and metrics.

``python -m docs.tables`` writes them; with ``--check`` it only compares.
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

import docstring_parser

from thinktwice_fast.bounds import bounds_of
from thinktwice_fast.cli.command import PROGRAM
from thinktwice_fast.cli.main import COMMANDS, load_command
from thinktwice_fast.config import Config
from thinktwice_fast.run.metrics import AVERAGE, METRICS
from thinktwice_fast.run.parsing import field_helps

Row = tuple[str, ...]

_MADE = "<!-- Made by `make tables` from the declarations in the code: change those. -->"
_OPTIONS = """
Options given later win: defaults (the `tiny` recipe), then each `--config` file, then the command line. An unknown
option, a value out of its range and an option that would be ignored are errors. In a YAML file a section is a key with
its options below it, as in `configs/tiny.yaml`. `--help` says the same as these tables.
""".strip()
_METRICS = """
Keys of the records in `metrics.jsonl`, and of every tracker (`--track`). Solve and refine steps never share a key; what
solutions and refinements of a joint pair have in common, sampling speed and the update, has keys of `pair`.
""".strip()


def options_table(config_class: type, positional: str | None = None) -> str:
    """Markdown of every option below ``config_class``: a table per nested dataclass, under its name and docstring.

    Name as on the command line (``positional`` is given without one), type and bounds, default as YAML, its docstring.
    """
    return "\n\n".join(_option_sections(config_class, "", positional))


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
        f"{_code(AVERAGE)}: the plain mean over the sets that have the metric; `{{sign}}` is pos or neg. "
        "\\* differs between two runs of one seed."
    )
    return f"{_table(('Metric', 'Phases', 'Unit', 'Definition'), rows)}\n\n{legend}"


def _option_sections(owner: type, prefix: str, positional: str | None = None) -> list[str]:
    assert dataclasses.is_dataclass(owner)
    hints = typing.get_type_hints(owner)
    helps = field_helps(owner)
    nested = [field.name for field in dataclasses.fields(owner) if dataclasses.is_dataclass(hints[field.name])]
    rows = [
        (
            _code(("" if field.name == positional else f"--{prefix}") + field.name),
            _range_text(field, hints[field.name]),
            _default_text(field),
            helps[field.name],
        )
        for field in dataclasses.fields(owner)
        if field.name not in nested
    ]
    about = docstring_parser.parse_from_object(owner).short_description
    heading = f"### {prefix.removesuffix('.')}\n\n" if prefix else ""
    sections = [f"{heading}{about}\n\n{_table(('Option', 'Type', 'Default', 'Meaning'), rows)}"]
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
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
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


def documents() -> dict[str, str]:
    """The generated files, by name."""
    commands = {name: load_command(name) for name in COMMANDS}
    sections = [
        f"## {PROGRAM} {name}\n\n"
        + ("Those of `train.py`." if c.options is Config else options_table(c.options, c.positional))
        for name, c in commands.items()
    ]
    training = f"## train.py\n\n{options_table(Config)}"
    return {
        "options.md": "\n\n".join(("# Every option", _MADE, _OPTIONS, training, *sections)) + "\n",
        "metrics.md": "\n\n".join(("# Every metric", _MADE, _METRICS, metrics_table())) + "\n",
    }


def update(folder: Path, check: bool) -> list[str]:
    """Names of the files in ``folder`` that were not up to date; brings them there unless ``check``."""
    stale = []
    for name, text in documents().items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    return stale


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 1 for files out of date under ``--check``, else 0."""
    parser = argparse.ArgumentParser(prog="python -m docs.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file is out of date")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of the files; default: docs/")
    options = parser.parse_args(arguments)
    stale = update(options.folder, options.check)
    if options.check and stale:
        print(f"out of date: {', '.join(stale)}: run python -m docs.tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
