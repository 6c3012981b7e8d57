"""Trackers: the same numbers under the same names in all of them, and none of them stops a run.

W&B and Trackio are stand-ins that take what wandb 0.31 and trackio 0.43 do.
"""

import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from thinktwice_fast import parallel
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Base, Group, Problem, Rollout
from thinktwice_fast.run.metrics import metrics_of
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.run.output import Output
from thinktwice_fast.run.tracking import tracker_names

QUESTION = {"role": "user", "content": "1+1?"}
VALUES = {"refine/reward": 0.25, "generations": 64}


class Run:
    """Of either library."""

    def __init__(self, **options: Any):
        self.options = options
        self.id = options.get("id") or "new"
        self.rows: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        self.rows.append(data if step is None else {"step": step, **data})

    def finish(self) -> None:
        self.finished = True


class Wandb(ModuleType):
    class Error(Exception):
        pass

    class Settings:
        def __init__(self, *, init_timeout: float, finish_timeout: float):
            pass

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]):
            self.rows = [dict(zip(columns, row, strict=True)) for row in data]

    def __init__(self, name: str):
        super().__init__(name)
        self.runs: list[Run] = []

    def init(self, project: str, name: str, dir: str, config: dict[str, Any], id: str | None, resume: str,
             settings: Settings, mode: str | None = None) -> Run:  # fmt: skip
        if mode != "offline":
            raise self.Error("No API key configured. Use `wandb login` to log in.")
        self.runs.append(Run(project=project, name=name, config=config, id=id, resume=resume))
        return self.runs[-1]


class Trackio(ModuleType):
    class Trace:
        def __init__(self, messages: list[dict[str, str]], metadata: dict[str, Any]):
            self.messages, self.metadata = messages, metadata

    def __init__(self, name: str):
        super().__init__(name)
        self.runs: list[Run] = []

    def init(self, project: str, name: str, config: dict[str, Any], resume: str, embed: bool) -> Run:
        self.runs.append(Run(project=project, name=name, config=config, resume=resume))
        return self.runs[-1]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> tuple[Wandb, Trackio]:
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    found = Wandb("wandb"), Trackio("trackio")
    for library in found:
        library.__spec__ = ModuleSpec(library.__name__, None, origin="somewhere")
        monkeypatch.setitem(sys.modules, library.__name__, library)
    return found


def session(folder: Path, resumed_after: int | None = None) -> Output:
    config = Config(output=str(folder), track="tensorboard, wandb,trackio")
    return Output(config, resumed_after or 0, resumed_after is not None)


def refined() -> Group:
    rollout = Rollout(0, 0, (1,), text="still 2", reward=1.0, advantage=0.5)
    problem = Problem(7, (QUESTION,), "2")
    return Group(0, problem, (QUESTION,), (1,), Base((3,), "3", 0.0), [rollout])


def test_all_get_the_same_and_a_resumed_run_goes_on(tmp_path: Path, libraries: tuple[Wandb, Trackio]) -> None:
    wandb, trackio = libraries
    for resumed_after, steps in ((None, (2, 4)), (2, (4,))):
        with session(tmp_path, resumed_after) as output:
            for step in steps:
                output.record(step, "refine", VALUES | {"refine/reward": step / 8, "refine/loss": math.nan})
            output.transcripts(4, "refine", [refined()])
    table, traces = (library.runs[0].rows.pop()["refine/rollouts"] for library in libraries)
    assert len(table.rows) == 1 and table.rows[0] == {
        "step": 4, "problem": 7, "prompt": "user: 1+1?", "base": "3", "base_reward": 0.0, "response": "still 2",
        "reward": 1.0, "advantage": 0.5,
    }  # fmt: skip
    assert [trace.messages for trace in traces] == [[QUESTION, {"role": "assistant", "content": "still 2"}]]
    assert traces[0].metadata == {"problem": 7, "base_reward": 0.0, "reward": 1.0, "advantage": 0.5}

    written = [{"step": record["step"], **metrics_of(record)} for record in read_metrics(tmp_path / "metrics.jsonl")]
    expected = [{name: value for name, value in record.items() if value is not None} for record in written]
    assert wandb.runs[0].rows == trackio.runs[0].rows == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]} == {
        name: [(record["step"], record[name]) for record in expected] for name in VALUES
    }
    assert all(run.finished and run.options["config"]["seed"] == 0 for run in (*wandb.runs, *trackio.runs))
    assert [run.options["id"] for run in wandb.runs] == [None, "new"]
    assert [run.options["resume"] for run in trackio.runs] == ["never", "allow"]


def test_one_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path: Path,
    libraries: tuple[Wandb, Trackio],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb, trackio = libraries
    monkeypatch.setattr(wandb, "init", None)
    with session(tmp_path) as output:
        output.record(1, "refine", VALUES)
        monkeypatch.setattr(trackio.runs[0], "log", None)
        for step in (2, 3):
            output.record(step, "refine", VALUES)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["wandb", "trackio"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("generations")] == [1, 2, 3]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracker_names("none") == ()
    with pytest.raises(UserError, match="no tracker 'mlflow': name tensorboard, wandb, trackio"):
        tracker_names("tensorboard,mlflow")
    (tmp_path / "wandb").mkdir()  # as W&B leaves it where it was used
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="wandb is not installed: run `pip install wandb`"):
        tracker_names("wandb")
