"""What a page shows, read from the folders of runs and evaluations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import METRICS_FILE, read_json_lines, read_metrics
from thinktwice_fast.run.options import CONFIG_FILE
from thinktwice_fast.run.profiling import TOP
from thinktwice_fast.run.transcripts import TRANSCRIPTS
from thinktwice_fast.run.versions import VERSIONS

RESULTS = "results.json"  # of an evaluation by `thinktwice-fast eval`
_NO_METHOD = ("seed", "output", "resume")  # options that two runs of one method differ in


@dataclass(frozen=True)
class RunFiles:
    """One run's folder."""

    name: str
    records: list[Record]
    transcripts: list[Record]
    config: str  # YAML
    versions: Mapping[str, str]
    profile: Sequence[Mapping[str, Any]]  # the slowest kernels and calls of profiled steps

    def method(self) -> dict[str, Any]:
        """Every option by its full name, but for those that seeds of one method differ in."""
        options = _flat(yaml.safe_load(self.config) or {})
        return {name: value for name, value in options.items() if name not in _NO_METHOD}


@dataclass(frozen=True)
class EvaluationFile:
    """One evaluation's ``results.json``."""

    name: str
    problems: Mapping[str, int]  # by set
    models: Mapping[str, Mapping[str, Mapping[str, Any]]]  # estimates by model, set and figure
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]]  # of later models to the first


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: Sequence[RunFiles]


@dataclass(frozen=True)
class Inputs:
    """All of it."""

    methods: Sequence[Method]
    evaluations: Sequence[EvaluationFile]

    @property
    def runs(self) -> list[RunFiles]:
        """Those of all methods."""
        return [run for method in self.methods for run in method.runs]


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read the folders of runs and evaluations.

    Raises:
        UserError: one is neither, or can't be read.
    """
    names = _short_names(paths)
    runs, evaluations = [], []
    for path, name in zip(paths, names, strict=True):
        if (path / METRICS_FILE).is_file():
            runs.append(_read_run(path, name))
        elif (path / RESULTS).is_file():
            evaluations.append(_read_evaluation(path / RESULTS, name))
        else:
            raise UserError(
                f"{path}: holds neither {METRICS_FILE} nor {RESULTS}: give the --output folder of a run or of an "
                "evaluation"
            )
    return Inputs(_by_method(runs), evaluations)


def _read_run(folder: Path, name: str) -> RunFiles:
    transcripts, config = folder / TRANSCRIPTS, folder / CONFIG_FILE
    versions, profile = folder / VERSIONS, folder / TOP
    found = list(read_json_lines(transcripts)) if transcripts.is_file() else []
    return RunFiles(
        name,
        read_metrics(folder / METRICS_FILE),
        [record for record in found if "tokens" in record],  # an older version wrote fewer keys
        config.read_text(encoding="utf-8") if config.is_file() else "",
        json.loads(versions.read_text(encoding="utf-8")) if versions.is_file() else {},
        json.loads(profile.read_text(encoding="utf-8")) if profile.is_file() else [],
    )


def _read_evaluation(path: Path, name: str) -> EvaluationFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return EvaluationFile(name, content["problems"], content["models"], content["differences"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no result of thinktwice-fast eval ({one_line(error)}): evaluate again") from None


def _by_method(runs: Sequence[RunFiles]) -> list[Method]:
    groups: list[tuple[dict[str, Any], list[RunFiles]]] = []
    for run in runs:
        method = run.method()
        same = next((members for options, members in groups if options == method), None)
        if same is None:
            groups.append((method, [run]))
        else:
            same.append(run)
    return [Method(_label(members), members) for _, members in groups]


def _label(runs: Sequence[RunFiles]) -> str:
    names = ", ".join(run.name for run in runs)
    return names if len(runs) == 1 else f"{names} ({len(runs)} seeds)"


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _short_names(paths: Sequence[Path]) -> list[str]:
    """As much of each path, from its end, as tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("a folder is given twice: give each once")
