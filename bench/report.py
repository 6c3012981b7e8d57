"""Tables and charts of a benchmark run: ``python -m bench.report [FOLDER]``, by default build/bench."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import CEILING, OURS
from bench.targets import outcomes

RESULTS, TABLE = "results.json", "table.txt"
_COLUMNS = (
    "contender",
    "rounds",
    "median ms",
    "p20",
    "p80",
    "memory MiB",
    "rate",
    "of ceiling",
    "time / ours",
    "error",
)
Row = Mapping[str, Any]


def write(document: Mapping[str, Any], folder: Path) -> str:
    """Write table and charts into the folder; the table is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = render(document)
    (folder / TABLE).write_text(text + "\n")
    for op, cases in by_case(document["results"]).items():
        draw(op, cases, folder / f"{op.replace(' ', '_')}.png")
    return text


def render(document: Mapping[str, Any]) -> str:
    parts = [machine_line(document)]
    for op, cases in by_case(document["results"]).items():
        for case, rows in cases.items():
            parts.append(f"{op}, {case}\n" + case_table(rows))
    verdicts = [(one.name, one.figure, one.bound, one.words) for one in outcomes(document)]
    parts.append(table([("target", "figure", "bound", ""), *verdicts]))
    return "\n\n".join(parts)


def case_table(rows: Sequence[Row]) -> str:
    """The contenders of one case."""
    text = table([_COLUMNS, *(_cells(row) for row in rows)])
    text += "".join(f"\n  {row['contender']}: {row['status']}: {row['reason']}" for row in _untimed(rows))
    return text + "".join(f"\n  {row['contender']}: {_details(row)}" for row in rows if row.get("details"))


def machine_line(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = f"{machine['gpu']}, driver {machine['driver']}" if document["device"] == "cuda" else machine["cpu"]
    return f"{where}, {machine['threads']} threads, load {machine['load']:.1f}; Python {machine['python']}, {versions}"


def by_case(records: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """op -> case -> records, the ceiling last."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in records:
        found.setdefault(row["op"], {}).setdefault(row["case"], []).append(row)
    return found


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


def _untimed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row["seconds"]]


def draw(op: str, cases: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Bars of time, and of memory where it was measured: a row of panels per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = max(len(rows) for rows in cases.values())
    figure, axes = plt.subplots(len(cases), 2, figsize=(11, len(cases) * (1 + 0.28 * count)), squeeze=False)
    for (case, rows), (left, right) in zip(cases.items(), axes, strict=True):
        _bars(left, [(row["contender"], 1000 * row["median"]) for row in rows if row["seconds"]], "ms, median")
        left.set_title(f"{op}, {case}", fontsize=9, loc="left")
        memory = [(row["contender"], row["memory"] / 2**20) for row in rows if row["memory"] is not None]
        if memory:
            _bars(right, memory, "MiB at the peak, beyond the inputs")
        else:
            right.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(axes: Any, values: Sequence[tuple[str, float]], unit: str) -> None:
    names = [name for name, _ in values]
    colors = ["#d1495b" if name == OURS else "#9aa5b1" if name == CEILING else "#30638e" for name in names]
    bars = axes.barh(range(len(values)), [value for _, value in values], color=colors)
    axes.bar_label(bars, fmt="%.4g", fontsize=7, padding=2)
    axes.set_yticks(range(len(values)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)


def main(folder: Path) -> None:
    print(write(json.loads((folder / RESULTS).read_text()), folder))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/bench"))
