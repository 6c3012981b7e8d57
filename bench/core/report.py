"""Tables of a benchmark run."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.core.contender import CEILING
from bench.core.targets import Outcome, Row

RESULTS, TABLE = "results.json", "table.txt"
_COLUMNS = (
    *("contender", "rounds", "median ms", "p20", "p80"),
    *("memory MiB", "rate", "of ceiling", "time / ours", "error"),
)


def write(document: Mapping[str, Any], outcomes: Iterable[Outcome], folder: Path) -> str:
    """Write the table into the folder; it is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = render(document, outcomes)
    (folder / TABLE).write_text(text + "\n")
    return text


def render(document: Mapping[str, Any], outcomes: Iterable[Outcome]) -> str:
    parts = [machine_line(document)]
    cases: dict[str, list[Row]] = {}
    for row in document["results"]:
        cases.setdefault(f"{row['op']}, {row['case']}", []).append(row)
    parts += [f"{title}\n{case_table(rows)}" for title, rows in cases.items()]
    verdicts = [(one.name, one.figure, one.bound, one.words) for one in outcomes]
    parts.append(table([("target", "figure", "bound", ""), *verdicts]))
    return "\n\n".join(parts)


def case_table(rows: Sequence[Row]) -> str:
    """The contenders of one case."""
    text = table([_COLUMNS, *(_cells(row) for row in rows)])
    untimed = [row for row in rows if not row["seconds"]]
    text += "".join(f"\n  {row['contender']}: {row['status']}: {row['reason']}" for row in untimed)
    return text + "".join(f"\n  {row['contender']}: {_details(row)}" for row in rows if row.get("details"))


def machine_line(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = f"{machine['gpu']}, driver {machine['driver']}" if document["device"] == "cuda" else machine["cpu"]
    return f"{where}, {machine['threads']} threads, load {machine['load']:.1f}; Python {machine['python']}, {versions}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for their cells; the first one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _details(row: Row) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in row["details"].items())


def _cells(row: Row) -> tuple[str, ...]:
    if not row["seconds"]:
        return (row["contender"], row["status"], *[""] * (len(_COLUMNS) - 2))
    milliseconds = [f"{1000 * row[name]:.4g}" for name in ("median", "p20", "p80")]
    return (
        f"{CEILING}: {row['reason']}" if row["contender"] == CEILING else row["contender"],
        str(len(row["seconds"])),
        *milliseconds,
        "" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}",
        "" if row["rate"] is None else _rate(row["rate"], row["unit"]),
        "" if row["of_ceiling"] is None else f"{100 * row['of_ceiling']:.0f} %",
        "" if row["to_ours"] is None else f"{row['to_ours']:.2f}",
        f"{max(row['errors'].values()):.1e}" if row["errors"] else "",
    )


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.0f} {unit}" if rate >= 1000 else f"{rate:.3g} {unit}"
