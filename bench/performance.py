"""docs/performance.md, made of what lies in bench/results/: ``python -m bench.performance docs/performance.md``.

With ``--check`` it only compares. A folder of results is a machine and a day. Of each come its README.md, the closing
tables of the stages of gpu_check.sh (STAGE.json), the steps of runs (NAME-metrics.jsonl), and the tables of the
benchmarks (NAME.txt); tables of kernels (NAME-profile.txt) are linked.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import ROOT, predictions
from bench.core.report import markdown

RESULTS = ROOT / "bench" / "results"
_HEAD = """\
# Performance

What was measured, on which machine, and with what result, and first what to expect of a GPU; made by `make performance`
from [bench/results](../bench/results), never by hand. [docs/log.md](log.md) says why things are as they are.

- On a GPU: `bench/gpu_check.sh STAGE` with the stages `correct`, `ops`, `decode` and `step`, each under four minutes.
  A goal that is not met is a goal: the results beside it are right unless it says otherwise.
- On a CPU: `make bench`.
"""
_STAGES = ("correct", "ops", "decode", "step")
_DATED = re.compile(r".*-\d{4}-\d\d-\d\d")
_STEP_COLUMNS = (
    ("step", "step"),
    ("phase", "phase"),
    ("prompt tokens", "prompt_tokens"),
    ("response tokens", "response_tokens"),
    ("rollout s", "seconds_rollout"),
    ("tokens/s", "tokens_per_second"),
    ("update s", "seconds_update"),
    ("step s", "seconds_step"),
    ("peak memory, GB", "peak_memory_bytes"),
)


def document(results: Path) -> str:
    """The whole text: machines with a date first, the latest at the top."""
    folders = [path for path in results.iterdir() if path.is_dir()]
    folders.sort(key=lambda path: (bool(_DATED.fullmatch(path.name)), path.name[-10:], path.name), reverse=True)
    return "\n".join([_HEAD, predictions.section(), *("\n".join(_section(folder)) for folder in folders)])


def _section(folder: Path) -> Iterator[str]:
    title, about = _introduction(folder)
    yield f"## {title}\n"
    if about:
        yield about + "\n"
    stages = _stages(folder)
    for name, found in stages.items():
        yield from _stage(folder / f"{name}.txt", found)
    for path in sorted(folder.glob("*-metrics.jsonl")):
        yield f"[{path.name}]({_link(path)})\n"
        yield _steps(path) + "\n"
    for path in sorted(path for path in folder.glob("*.txt") if path.stem not in stages):
        if path.stem.endswith("-profile"):
            yield f"Kernels: [{path.name}]({_link(path)})\n"
        else:
            yield f"<details>\n<summary>{path.name}</summary>\n\n```\n{path.read_text().strip()}\n```\n\n</details>\n"


def _introduction(folder: Path) -> tuple[str, str]:
    """Title and text of its README.md; the folder's own name where there is none."""
    path = folder / "README.md"
    if not path.exists():
        return folder.name, ""
    heading, _, rest = path.read_text().partition("\n")
    # Links of the README are seen from its own folder.
    return heading.removeprefix("# "), rest.strip().replace("(../../../docs/", "(")


def _stages(folder: Path) -> dict[str, Any]:
    """What the stages of gpu_check.sh found, by their name; the records of the benchmarks are another kind of file."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: found[name] for name in _STAGES if "stage" in found.get(name, ())}


def _stage(text: Path, found: dict[str, Any]) -> Iterator[str]:
    yield f"### {found['stage']}, {found['date']}\n"
    yield f"{text.read_text().partition(chr(10))[0]}; [all tables]({_link(text)})\n"
    rows = [(line["check"], line["figure"], line["goal"], line["verdict"]) for line in found["lines"]]
    yield markdown(("check", "figure", "goal", ""), rows) + "\n"


def _steps(path: Path) -> str:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [[_cell(record, name) for _, name in _STEP_COLUMNS] for record in records]
    return markdown([title for title, _ in _STEP_COLUMNS], rows)


def _cell(record: dict[str, Any], name: str) -> str:
    value = record[name if name in record else f"{record['phase']}/{name}"]
    if name == "peak_memory_bytes":
        value /= 1e9
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _link(path: Path) -> str:
    return f"../bench/results/{path.parent.name}/{path.name}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status: 0, or 1 for a file out of date under ``--check``."""
    parser = argparse.ArgumentParser(prog="python -m bench.performance", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is out of date")
    options = parser.parse_args(arguments)
    text = document(RESULTS)
    if not options.check:
        options.file.write_text(text)
    elif not options.file.exists() or options.file.read_text() != text:
        print(f"{options.file} is out of date: run make performance", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
