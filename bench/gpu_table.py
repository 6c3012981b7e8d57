"""The last table of gpu_check.sh: ``python -m bench.gpu_table FOLDER``. Status 1 if a result was wrong."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import report
from bench.measure import OURS
from bench.targets import outcomes

SUMMARY = "summary"
_COUNTS = re.compile(r"\b\d+ (?:passed|failed|errors?|skipped)\b")


@dataclass(frozen=True)
class Line:
    check: str
    figure: str
    target: str
    verdict: str
    wrong: bool = False  # a result, as opposed to a speed


def steps(folder: Path) -> list[Line]:
    """A line for each step of the script, from steps.tsv and the logs."""
    lines = []
    for row in (folder / "steps.tsv").read_text().splitlines():
        name, kind, status, seconds = row.split("\t")
        end = "".join((folder / f"{name}.log").read_text(errors="replace").splitlines(keepends=True)[-1:])
        figure = ", ".join([f"{seconds} s", *_COUNTS.findall(end), *(["cut off"] if status in ("124", "137") else [])])
        passed = status == "0"
        target = "passes" if kind == "correctness" else "ends"
        lines.append(Line(name, figure, target, _verdict(passed), kind == "correctness" and not passed))
    return lines


def benchmarks(folder: Path) -> list[Line]:
    """Whether our results were right, and the targets of speed and memory."""
    path = folder / report.RESULTS
    if not path.exists():
        return [Line("benchmarks", "no results", "results", _verdict(False), wrong=True)]
    document = json.loads(path.read_text())
    ours = [row for row in document["results"] if row["contender"] == OURS]
    right = sum(row["status"] == "ok" for row in ours)
    wrong = right != len(ours)
    results = Line("results in the benchmarks", f"{right} of {len(ours)} right", "all", _verdict(not wrong), wrong)
    return [results] + [Line(one.name, one.figure, one.bound, one.words) for one in outcomes(document)]


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


def main(folder: Path) -> int:
    lines = steps(folder) + benchmarks(folder)
    text = report.table([("check", "figure", "target", ""), *((x.check, x.figure, x.target, x.verdict) for x in lines)])
    (folder / f"{SUMMARY}.txt").write_text(text + "\n")
    fields = [{"check": x.check, "figure": x.figure, "target": x.target, "verdict": x.verdict} for x in lines]
    (folder / f"{SUMMARY}.json").write_text(json.dumps(fields, indent=1))
    print(text)
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
