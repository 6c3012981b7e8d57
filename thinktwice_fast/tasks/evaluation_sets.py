"""The evaluation sets of a run: ready ones by name, sources, and sources with options of their own."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from thinktwice_fast.config import ARITHMETIC, Config, DataOptions, EvalOptions
from thinktwice_fast.errors import Option, UserError, one_line
from thinktwice_fast.tasks.source import Source
from thinktwice_fast.tasks.sources import load_source
from thinktwice_fast.tasks.tables import FILE_LOADERS

_TEXT = "a text"
_TEXTS = "a text or a list of texts"
_LIST = "a list of texts"
_NUMBER = "a whole number"
_KINDS = {
    "source": _TEXT, "subset": _TEXTS, "split": _TEXT, "question_column": _TEXT, "context_column": _TEXT,
    "answer_column": _TEXT, "choices_column": _TEXT, "wrong_columns": _LIST, "choices_seed": _NUMBER,
    "instruction": _TEXT, "limit": _NUMBER, "reward": _TEXT,
}  # fmt: skip
FROM_EVAL = ("subset", "split", "question_column", "answer_column", "instruction", "limit")
"""Options that a set which leaves them open takes from `eval`."""
_MATHS = ("math", "math_strict")  # a ready set's "math" is the run's own one of these, where it has one
_FILE = "file"  # of a ready set alone: its name in `eval.data_root`

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationSet:
    """One of ``eval.sets``, with everything that is needed to load and grade it."""

    data: DataOptions
    section: str = "eval"  # that its options stand in, for remedies
    reward: str | None = None  # how to grade it; None = as the run does
    ready: bool = False
    local: bool = False  # a ready one, from `eval.data_root`
    from_eval: frozenset[str] = frozenset()  # options of `eval` that it follows

    def load(self) -> Source:
        """Its problems, checked.

        Raises:
            UserError: as `load_source`.
        """
        return load_source(self.data, held_out=True, prefix=self.section, or_verl=self.local)


def evaluation_sets(config: Config) -> dict[str, EvaluationSet]:
    """The sets of ``eval.sets`` by name; where that is left open, the held-out part of an arithmetic ``data.source``.

    Raises:
        UserError: a name that can't be one, an unknown ready set, an unknown option of a set or one of the wrong type,
            a ready set that ``eval.data_root`` lacks, a file of ready sets that is missing or malformed.
    """
    asked = config.eval.sets
    if asked is None:
        arithmetic = config.data.source.startswith(ARITHMETIC)
        asked = {"held_out": config.data.source} if arithmetic else {}
    ready = ready_sets(config.eval.ready_sets)
    if not isinstance(asked, dict):
        for name in asked:
            if name not in ready:
                raise UserError(
                    (Option("eval.sets"), f": no ready set {name!r} (there are {', '.join(ready)})"),
                    "check the name",
                    "give a source of your own a name, {name: source}",
                )
        asked = {name: name for name in asked}
    for name in asked:
        if any(character in name for character in "/."):
            raise UserError(
                (Option("eval.sets"), f": {name!r} can't name a set (no '/' or '.'; options of one go into {{}})"),
                "rename it",
            )
    return {name: _resolved(name, given, config, ready) for name, given in asked.items()}


def ready_sets(more: str | None = None) -> dict[str, Entry]:
    """The ready sets by name: those shipped, and those of the file ``more``, which go before.

    Raises:
        UserError: the file is missing or malformed, or an entry has an unknown option or one of the wrong type.
    """
    own = {} if more is None else _read_entries(Path(more), Option("eval.ready_sets", more))
    return own | {name: entry for name, entry in _shipped().items() if name not in own}


@functools.cache
def _shipped() -> dict[str, Entry]:
    with resources.as_file(resources.files("thinktwice_fast") / "assets" / "ready_sets.yaml") as path:
        return _read_entries(path, path.name)


def _read_entries(path: Path, name: str | Option) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError((name, f": not readable as YAML ({one_line(error)})"), "check the file") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise UserError((name, ": holds no ready sets"), "write them as in thinktwice_fast/assets/ready_sets.yaml")
    for set_name, entry in content.items():
        _check(entry, (name, f": {set_name}"), {**_KINDS, _FILE: _TEXT})
    return {str(set_name): entry for set_name, entry in content.items()}


def _check(entry: Entry, where: tuple[str | Option, ...], kinds: Mapping[str, str]) -> None:
    unknown = [str(key) for key in entry if key not in kinds]
    if unknown:
        what = f": no option {', '.join(unknown)} of a set (there are {', '.join(kinds)})"
        raise UserError((*where, what), "check the name")
    for key, value in entry.items():
        if value is not None and not _fits(value, kinds[key]):
            raise UserError((*where, f": {key} {value!r}"), f"give {kinds[key]}")
    if entry.get("source") is None:
        raise UserError((*where, ": no source"), "give a file, a hub data set or a ready set's name")


def _fits(value: Any, kind: str) -> bool:
    if kind == _NUMBER:
        return isinstance(value, int) and not isinstance(value, bool)
    texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return (texts and kind != _TEXT) or (isinstance(value, str) and kind != _LIST)


def _resolved(name: str, given: str | Entry, config: Config, ready: Mapping[str, Entry]) -> EvaluationSet:
    own: Entry = {"source": given} if isinstance(given, str) else given
    section = "eval" if isinstance(given, str) else f"eval.sets.{name}"
    _check(own, (Option(section),), _KINDS)
    entry = ready.get(own["source"])
    options = {key: value for key, value in own.items() if value is not None}
    local = None
    if entry is not None:
        options = {**entry, **options, "source": entry["source"]}
        local = _local_file(options, own["source"], config.eval)
    _check_source(str(local or options["source"]), own, section)
    from_eval = frozenset(_open_options(options, ready=entry is not None))
    options |= {option: getattr(config.eval, option) for option in from_eval}
    arithmetic = options["source"].startswith(ARITHMETIC)
    if options.get("instruction") is None:
        options["instruction"] = "" if arithmetic else config.data.instruction
    if arithmetic and not options["limit"]:
        what = (Option(f"{section}.limit", 0), f" has no end with {options['source']}")
        raise UserError(what, "give a number of problems")
    if local is not None:
        options |= {"source": str(local), "subset": None}
    reward = options.pop("reward", None)
    if reward == _MATHS[0] and own.get("reward") is None and config.reward in _MATHS:
        reward = None
    options.pop(_FILE, None)
    options["wrong_columns"] = tuple(options.get("wrong_columns") or ())
    return EvaluationSet(DataOptions(**options), section, reward, entry is not None, local is not None, from_eval)


def _check_source(source: str, own: Entry, section: str) -> None:
    for option in ("subset", "split"):
        if _is_file(source) and own.get(option) is not None:
            raise UserError(
                (Option(f"{section}.{option}"), f" would be ignored with the file {source}"), "leave it out"
            )


def _open_options(options: Entry, ready: bool) -> list[str]:
    if options["source"].startswith(ARITHMETIC):
        follows: tuple[str, ...] = ("limit",)
    elif ready:
        follows = ("split", "limit")
    elif _is_file(options["source"]):
        follows = tuple(option for option in FROM_EVAL if option not in ("subset", "split"))
    else:
        follows = FROM_EVAL
    return [option for option in follows if options.get(option) is None]


def _local_file(options: Entry, name: str, evaluation: EvalOptions) -> Path | None:
    """The file of a ready set; None where the hub is to be asked."""
    if evaluation.data_root is None:
        return None
    root, stem = Path(evaluation.data_root).expanduser(), options.get(_FILE) or name
    for ending in FILE_LOADERS:
        if (root / f"{stem}{ending}").is_file():
            return root / f"{stem}{ending}"
    raise UserError(
        (
            Option("eval.data_root", evaluation.data_root),
            f": no {stem}.parquet in it (or {', '.join(FILE_LOADERS)}) for the set {name}",
        ),
        "put it there",
        "leave the set out",
    )


def source_kind(source: str) -> str:
    """ "arithmetic", "file" or "hub", as `load_source` will take it."""
    if source.startswith(ARITHMETIC):
        return "arithmetic"
    return "file" if _is_file(source) else "hub"


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return path.suffix in FILE_LOADERS or path.exists()
