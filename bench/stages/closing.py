"""The closing table of a stage of gpu_check.sh: ``python -m bench.stages.closing STAGE WORK [OUTPUT]``.

It is printed, and goes with the tables behind it into STAGE.txt and STAGE.json in OUTPUT, by default
``bench/results/<gpu>-<date>``. Status 1 if a result was wrong.
"""

import datetime
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from bench import ROOT
from bench.core import report
from bench.core.hardware import short_name
from bench.stages.notes import Line, Notes, result

PARTS, MACHINE = "parts.tsv", "machine.json"
CUT_OFF = ("124", "137")  # statuses of what timeout ended
_GOALS = {"pair": 20}  # most seconds of a whole part on a GPU
_COUNTS = re.compile(r"\b\d+ (?:passed|failed|errors?|skipped)\b")


def parts(work: Path, on_gpu: bool) -> list[Line]:
    """A line for each part that the script has run, from its list and their logs, and one on its time where that has a
    goal."""
    lines = []
    for row in (work / PARTS).read_text().splitlines():
        name, status, seconds = row.split("\t")
        end = "".join((work / f"{name}.log").read_text(errors="replace").splitlines(keepends=True)[-1:])
        figure = ", ".join([f"{seconds} s", *_COUNTS.findall(end), *(["cut off"] if status in CUT_OFF else [])])
        lines.append(result(name, figure, "passes", status == "0"))
        if goal := _GOALS.get(name):
            met = int(seconds) < goal and status == "0" if on_gpu else None
            lines.append(Line(f"{name}: the whole command", f"{seconds} s", f"< {goal} s", met))
    return lines


def main(stage: str, work: Path, output: Path | None = None) -> int:
    machine = json.loads((work / MACHINE).read_text())
    notes = Notes(work)
    lines = parts(work, on_gpu=machine["gpu"] is not None) + notes.lines()
    date = datetime.date.today().isoformat()
    if output is None:
        output = ROOT / "bench" / "results" / f"{short_name(machine['gpu'])}-{date}"
    output.mkdir(parents=True, exist_ok=True)
    table = report.table(
        [("check", "figure", "goal", ""), *((line.check, line.figure, line.goal, line.verdict) for line in lines)]
    )
    line = report.machine_line({"machine": machine, "device": "cuda" if machine["gpu"] else "cpu"})
    (output / f"{stage}.txt").write_text("\n\n".join(filter(None, [line, table, notes.details().rstrip()])) + "\n")
    rows = [{**asdict(line), "verdict": line.verdict} for line in lines]
    document = {"stage": stage, "date": date, "machine": machine, "lines": rows}
    (output / f"{stage}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{table}\n\nwritten: {output}/{stage}.txt")
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
