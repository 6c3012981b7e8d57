"""The tables and sentences of a page, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from thinktwice_fast.run.metrics import AVERAGE, Record
from thinktwice_fast.run.page.charts import time_parts
from thinktwice_fast.run.page.inputs import EvaluationFile, Method, RunFiles
from thinktwice_fast.run.progress import clock
from thinktwice_fast.run.report import SUMMARY_ROWS, curve, evaluation_sets

Rows = Sequence[Sequence[str]]

_GIB = 1 << 30
_WHERE = ("device", "cpu")  # that a profiled kernel or call takes time on


def table(caption: str, head: Sequence[str], rows: Rows) -> str:
    """A table whose first column names its rows; nothing where there are none."""
    if not rows:
        return ""
    headings = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{headings}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def verdict(run: RunFiles) -> str:
    """Whether refining helps, by the last evaluation: the sentence that a page begins with."""
    records = [record for record in run.records if record["phase"] == "eval"]
    sets = evaluation_sets(records)
    if not sets:
        return "No evaluation yet: the transcripts below say what refining does."
    name = sets[-1]
    last = records[-1]
    solve, refine, fixed, spoiled = (last.get(f"eval/{name}/{key}") for key, _ in SUMMARY_ROWS)
    if solve is None or refine is None:
        return "The last evaluation has no refinements."
    gain = 100 * (refine - solve)
    word = "helps" if gain > 0 else "hurts" if gain < 0 else "changes nothing"
    shares = [
        f"it {what} {100 * share:.1f} of 100 {which} solutions"
        for share, what, which in ((fixed, "fixes", "wrong"), (spoiled, "spoils", "right"))
        if share is not None
    ]
    where = f"{len(sets) - 1} held-out sets" if name == AVERAGE else name.replace("_", "-")
    return (
        f"Refining {word}: {100 * solve:.1f} % of answers are right before it, {100 * refine:.1f} % after it "
        f"({gain:+.1f} points; {where}, step {last['step']}); {' and '.join(shares)}."
    )


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What a run took, in few words each."""
    found = [("steps", f"{max((record['step'] for record in run.records), default=0):,}")]
    for name, metric, form in (
        ("generations", "generations", lambda value: f"{value:,.0f}"),
        ("time", "elapsed_seconds", clock),
        ("peak memory", "peak_memory_bytes", lambda value: f"{value / _GIB:.2f} GiB"),
    ):
        values = curve(run.records, metric)[1]
        if values and values[-1]:
            found.append((name, form(max(values))))
    return found


def evaluation_tables(methods: Sequence[Method]) -> str:
    """Of each run its evaluations: first, last, and the change in points; a row per figure."""
    tables = []
    runs = [run for method in methods for run in method.runs]
    for run in runs:
        records = [record for record in run.records if record["phase"] == "eval"]
        for name in reversed(evaluation_sets(records)):
            shown = _spread([record for record in records if f"eval/{name}/solve_accuracy" in record])
            caption = f"{name.replace('_', '-')}{f', {run.name}' if len(runs) > 1 else ''}"
            head = ["figure", *(f"step {record['step']}" for record in shown), "points"]
            tables.append(table(caption, head, _evaluation_rows(shown, f"eval/{name}/")))
    return "".join(tables)


def result_tables(evaluations: Sequence[EvaluationFile]) -> str:
    """Of each evaluation and set: a row per figure, a column per model and one for what later ones have beyond the
    first, with intervals."""
    tables = []
    for evaluation in evaluations:
        for name in next(iter(evaluation.models.values()), {}):
            columns = {model: (sets[name], False) for model, sets in evaluation.models.items()}
            columns |= {f"{model}, points": (sets[name], True) for model, sets in evaluation.differences.items()}
            figures = dict.fromkeys(figure for estimates, _ in columns.values() for figure in estimates)
            rows = [
                (_label(figure), *(_estimate(own.get(figure), figure, signed) for own, signed in columns.values()))
                for figure in figures
            ]
            count = f"{evaluation.problems[name]:,} problems" if name in evaluation.problems else "plain mean of sets"
            tables.append(table(f"{evaluation.name}: {name} ({count})", ["figure", *columns], rows))
    return "".join(tables)


def time_table(runs: Sequence[RunFiles]) -> str:
    """Where each run's time went, in all."""
    parts: dict[str, list[float]] = {}
    for number, run in enumerate(runs):
        spent: dict[str, float] = {}
        for _, step in time_parts(run.records):
            spent = {name: spent.get(name, 0.0) + step.get(name, 0.0) for name in dict.fromkeys((*spent, *step))}
        spent |= {what: sum(curve(run.records, f"seconds_{what}")[1]) for what in ("evaluation", "checkpoint")}
        for name, seconds in spent.items():
            parts.setdefault(name, [0.0] * len(runs))[number] = seconds
    wholes = [sum(column) or 1.0 for column in zip(*parts.values(), strict=True)]
    rows = [
        (name, *(f"{clock(s)} ({100 * s / whole:.1f} %)" for s, whole in zip(seconds, wholes, strict=True)))
        for name, seconds in sorted(parts.items(), key=lambda part: part[0] == "other")
        if any(seconds)
    ]
    return table("Time in all (h:mm:ss)", ["part", *(run.name for run in runs)], rows)


def profile_tables(runs: Sequence[RunFiles]) -> str:
    """The slowest kernels and calls of each run that was profiled."""
    tables = []
    for run in runs:
        rows = [
            (
                _shortened(row["name"]),
                f"{row['calls']:,}",
                f"{row['self_device_ms']:,.1f}",
                f"{row['self_cpu_ms']:,.1f}",
            )
            for row in run.profile
        ]
        inside = table(run.name, ["name", "calls", "ms on the device", "ms on the host"], rows)
        if inside:
            tables.append(
                f"<details><summary>Slowest kernels and calls of the profiled steps</summary>{inside}</details>"
            )
    return "".join(tables)


def configurations(runs: Sequence[RunFiles]) -> str:
    """Of each run its versions, and its options to be folded out; of several first the options that differ."""
    options = [run.method() for run in runs]
    names = sorted({name for own in options for name in own if any(own.get(name) != o.get(name) for o in options)})
    rows = [(name, *(str(own.get(name)) for own in options)) for name in names]
    blocks = [table("Options that differ", ["option", *(run.name for run in runs)], rows)]
    versions = dict.fromkeys(name for run in runs for name in run.versions)
    rows = [(name, *(run.versions.get(name, "-") for run in runs)) for name in versions]
    blocks.append(table("Versions", ["", *(run.name for run in runs)], rows))
    for run in runs:
        blocks.append(
            f"<details><summary>Every option of {escape(run.name)}</summary><pre>{escape(run.config)}</pre></details>"
        )
    return "".join(blocks)


def _spread(records: Sequence[Record], most: int = 6) -> list[Record]:
    """The first, the last, and some between, evenly."""
    count = len(records)
    if count <= most:
        return list(records)
    return [records[round(place * (count - 1) / (most - 1))] for place in range(most)]


def _evaluation_rows(records: Sequence[Record], prefix: str) -> list[list[str]]:
    names = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    rows = []
    for name in names:
        figure = name.removeprefix(prefix)
        values = [record.get(name) for record in records]
        first, last = values[0], values[-1]
        change = "" if first is None or last is None or len(values) < 2 else _number(last - first, figure, signed=True)
        rows.append([_label(figure), *(_number(value, figure) for value in values), change])
    return rows


def _shortened(name: str, most: int = 70) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _label(figure: str) -> str:
    named = dict(SUMMARY_ROWS)
    return named.get(figure) or figure.replace("_", " ")


def _number(value: float | None, figure: str, signed: bool = False) -> str:
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if figure.endswith("tokens"):
        return f"{value:{sign}.1f}"
    return f"{100 * value:{sign}.1f}" + ("" if signed else " %")


def _estimate(estimate: Mapping[str, Any] | None, figure: str, signed: bool) -> str:
    if estimate is None:
        return "-"
    value, low, high = (_number(estimate[name], figure, signed) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
