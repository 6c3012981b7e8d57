"""Puts a page together: one HTML file that needs nothing else, neither a network nor a server."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from thinktwice_fast.errors import UserError
from thinktwice_fast.run.page import tables
from thinktwice_fast.run.page.charts import axes, charts
from thinktwice_fast.run.page.inputs import Inputs, read_inputs
from thinktwice_fast.run.page.pairs import changes, pairs
from thinktwice_fast.run.transcripts import CHANGES

PAGE = "report.html"
MOST_BYTES = 5_000_000  # of a page
_ASSETS = Path(__file__).parents[2] / "assets" / "report"
_SCRIPTS = ("dom.js", "charts.js", "diff.js", "tokens.js", "pairs.js", "main.js")


def write_page(paths: Sequence[Path], output: Path) -> None:
    """Write what the folders of runs and evaluations hold as one HTML file of at most ``MOST_BYTES``.

    Args:
        paths: folders of runs and evaluations, at least one.
        output: the file; replaced in one rename.

    Raises:
        UserError: a folder that is neither, or a file that can't be read or written.
    """
    page = make_page(read_inputs(paths))
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.write_bytes(page)
        temporary.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}: give another file with --output") from None


def make_page(inputs: Inputs) -> bytes:
    """The page as UTF-8; with as many transcripts as there is room for."""
    fields, curves = _fields(inputs), {"charts": charts(inputs.methods), "axes": axes(inputs.methods)}
    room = MOST_BYTES
    while True:
        page = _filled(fields | {"data": _script_data(curves | {"pairs": pairs(inputs.runs, room)})})
        if len(page) <= MOST_BYTES or room == 0:
            return page
        room = room // 2 if room > MOST_BYTES // 64 else 0


def _fields(inputs: Inputs) -> dict[str, str]:
    """What the marks of report.html stand for, but for the data."""
    runs = inputs.runs
    counts = [changes(run.transcripts) for run in runs]
    several = len(runs) > 1
    return {
        "title": escape(", ".join([*(run.name for run in runs), *(one.name for one in inputs.evaluations)])),
        "style": _asset("report.css"),
        "verdicts": "".join(_verdict(tables.verdict(run), run.name if several else "") for run in runs),
        "counts": _counts({what: sum(count[what] for count in counts) for what in CHANGES}),
        "facts": "".join(_facts(tables.facts(run), run.name if several else "") for run in runs),
        "evaluations": tables.evaluation_tables(inputs.methods) + tables.result_tables(inputs.evaluations),
        "time": tables.time_table(runs) + tables.profile_tables(runs),
        "configuration": tables.configurations(runs),
        "script": "\n".join(map(_asset, _SCRIPTS)),
    }


def _filled(fields: dict[str, str]) -> bytes:
    page = _asset("report.html")
    for name, text in fields.items():
        before, mark, after = page.partition(f"<!--{name}-->")
        assert mark, name
        page = before + text + after
    # A lone surrogate (legal in a JSON data set) has no UTF-8 form; in the data its backslash form is a JSON escape.
    return page.encode("utf-8", "backslashreplace")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _script_data(data: dict[str, Any]) -> str:
    # A "<" could end the element that the data stands in.
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _verdict(sentence: str, run: str) -> str:
    name = f"<b>{escape(run)}.</b> " if run else ""
    return f"<p>{name}{escape(sentence)}</p>"


def _facts(facts: Sequence[tuple[str, str]], run: str) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return (f"<h3>{escape(run)}</h3>" if run else "") + f'<dl class="facts">{cells}</dl>'


def _counts(counts: dict[str, int]) -> str:
    if not any(counts.values()):
        return ""
    buttons = "".join(
        f'<button class="count {slug}" data-show="{slug}"><b>{count:,}</b> {escape(what)}</button>'
        for what, count in counts.items()
        for slug in [what.replace(" ", "-")]
    )
    hint = "Refinements in the transcripts; each number opens them:"
    return f'<p class="hint">{hint}</p><div class="counts">{buttons}</div>'
