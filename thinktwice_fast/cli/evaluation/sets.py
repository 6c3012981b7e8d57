"""The sets of an evaluation, from their names on the command line."""

from dataclasses import dataclass, replace
from pathlib import Path

from thinktwice_fast.cli.evaluation.drawing import MOST_PROBLEMS
from thinktwice_fast.cli.evaluation.options import EvalOptions
from thinktwice_fast.config import Config, DataOptions
from thinktwice_fast.config import EvalOptions as EvaluationOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.evaluation_sets import evaluation_sets, ready_sets


@dataclass(frozen=True)
class ProblemSet:
    """Problems under a name."""

    name: str
    source: str  # where they come from
    problems: list[Problem]
    reward: str  # that grades them
    notes: tuple[str, ...] = ()  # for the user


def load_sets(options: EvalOptions) -> list[ProblemSet]:
    """The sets that ``options`` name, checked.

    Raises:
        UserError: an unknown set, two of one name, one that can't be loaded.
    """
    ready = ready_sets(options.ready_sets)
    sources: dict[str, str] = {}
    for given in options.sets:
        source = _ready_name(given, list(ready))
        name = source if source in ready else _own_name(given)
        if name in sources:
            raise UserError(f"--sets: {sources[name]} and {given} would both be called {name}: rename one")
        sources[name] = source
    config = Config(
        reward=options.reward,
        data=DataOptions(instruction=options.instruction),
        eval=EvaluationOptions(
            sets=dict(sources),
            ready_sets=options.ready_sets,
            data_root=options.data_root,
            subset=options.subset,
            split=options.split,
            question_column=options.question_column,
            answer_column=options.answer_column,
            limit=options.limit,
        ),
    )
    loaded = []
    for name, entry in evaluation_sets(config).items():
        rows = entry.load()
        if len(rows) > MOST_PROBLEMS:
            raise UserError(f"{name}: {len(rows)} problems are more than {MOST_PROBLEMS}: set --limit")
        problems = [replace(problem, reward=entry.reward) for problem in rows]
        loaded.append(ProblemSet(name, sources[name], problems, entry.reward or options.reward, rows.notes))
    return loaded


def _ready_name(given: str, ready: list[str]) -> str:
    """A ready set's name where ``given`` is the beginning of one alone, else as given."""
    if given in ready or Path(given).expanduser().exists():
        return given
    beginning = [name for name in ready if name.startswith(given)]
    return beginning[0] if len(beginning) == 1 else given


def _own_name(source: str) -> str:
    """``held-out/test.jsonl`` -> ``test``, ``arithmetic:tm5`` -> ``tm5``."""
    return Path(source).stem.rpartition(":")[2].replace(".", "_")
