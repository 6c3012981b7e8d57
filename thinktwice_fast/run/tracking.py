"""Where metrics and rollouts go beside the run's own files: ``track: tensorboard,wandb,trackio``.

All get the names of ``metrics.py``. What a tracker raises is shown once, and it gets nothing more: none stops a run.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.records import Group, Rollout

PROJECT = "thinktwice-fast"  # as W&B and Trackio call what runs are collected in
Sample = tuple[Group, Rollout]

_NO_TRACKER = "none"
_COLUMNS = ("step", "problem", "prompt", "base", "base_reward", "response", "reward", "advantage")
_CONNECT_SECONDS = 30.0
_UPLOAD_SECONDS = 300.0


@dataclass(frozen=True)
class Session:
    """What a tracker is told of the run when it begins or goes on."""

    folder: Path  # of the run
    options: dict[str, Any]
    resume_step: int | None  # of the checkpoint that it continues from; None = from the start


class Tracker(Protocol):
    """One of them, told what happens in the order of steps, but for those that a resumed run makes again."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in metrics, which are finite numbers."""

    def log_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        """Take in what was sampled for people to read."""

    def close(self) -> None:
        """Send what is left."""


class Trackers:
    """Those that a run has, as one.

    Args:
        names: as `tracker_names` gives them.
        session: of the run.
        warn: shows one line.
    """

    def __init__(self, names: Iterable[str], session: Session, warn: Callable[[str], None]):
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._guard(name, partial(self._begin, name, session))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Metrics by name; those without a value are left out."""
        given = {name: value for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.log(step, given))

    def log_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        """Rollouts of a step, for people to read."""
        self._each(lambda tracker: tracker.log_rollouts(step, phase, samples))

    def close(self) -> None:
        """The run ends."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _begin(self, name: str, session: Session) -> None:
        self._open[name] = TRACKERS[name](session)

    def _each(self, told: Callable[[Tracker], None]) -> None:
        for name, tracker in tuple(self._open.items()):
            self._guard(name, partial(told, tracker))

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # they are others' code, and run over networks
            self._open.pop(name, None)
            self._warn(f"warning: {name} failed and gets nothing more; the run goes on without it: {one_line(error)}")


class _TensorBoard:
    def __init__(self, session: Session):
        # Imported here because it takes seconds, and of all processes only one needs it.
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if session.resume_step is None else session.resume_step + 1
        self._writer = SummaryWriter(str(session.folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # The writer's own interval is two minutes, all of which a kill would lose.
        self._writer.flush()

    def log_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        pass  # it has no place for what one wants to search and sort

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run in ``folder/wandb``, which a resumed one goes on with. Steps that are made again have two points then.

    Without a key or a network it is written for a later ``wandb sync``.
    """

    def __init__(self, session: Session):
        self._wandb = import_module("wandb")
        identity = session.folder / "wandb" / "run-id.txt"
        known = session.resume_step is not None and identity.is_file()
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": str(session.folder),
            "dir": str(session.folder),
            "config": session.options,
            "id": identity.read_text() if known else None,
            "resume": "allow",
            "settings": self._wandb.Settings(init_timeout=_CONNECT_SECONDS, finish_timeout=_UPLOAD_SECONDS),
        }
        try:
            self._run = self._wandb.init(**options)
        except self._wandb.Error:
            self._run = self._wandb.init(**options, mode="offline")
        identity.parent.mkdir(exist_ok=True)
        identity.write_text(self._run.id)
        # Its own steps may not go back; those of a resumed run do.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def log_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        rows = [[_row(step, *sample)[column] for column in _COLUMNS] for sample in samples]
        self._run.log({"step": step, f"{phase}/rollouts": self._wandb.Table(columns=list(_COLUMNS), data=rows)})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of Trackio's own database, which a resumed one goes on with; ``TRACKIO_SPACE_ID`` sends it to a Space."""

    def __init__(self, session: Session):
        self._trackio = import_module("trackio")
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=str(session.folder),
            config=session.options,
            resume="never" if session.resume_step is None else "allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_rollouts(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        self._run.log({f"{phase}/rollouts": [self._trace(step, *sample) for sample in samples]}, step=step)

    def close(self) -> None:
        self._run.finish()

    def _trace(self, step: int, group: Group, rollout: Rollout) -> Any:
        row = _row(step, group, rollout)
        about = {name: row[name] for name in ("problem", "base_reward", "reward", "advantage")}
        answer = {"role": "assistant", "content": rollout.text}
        return self._trackio.Trace(messages=[*map(dict, group.messages), answer], metadata=about)


TRACKERS: dict[str, Callable[[Session], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
"""By name, which is that of the package too."""


def tracker_names(track: str) -> tuple[str, ...]:
    """What the option ``track`` names.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    names = tuple(dict.fromkeys(name.strip() for name in track.split(",")))
    if names == (_NO_TRACKER,):
        return ()
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"--track {track}: there is no tracker {name!r}: name {', '.join(TRACKERS)}, separated by commas, or "
                f"{_NO_TRACKER}"
            )
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name here is no package
            raise UserError(f"--track {track}: {name} is not installed: run `pip install {name}`, or leave it out")
    return names


def _row(step: int, group: Group, rollout: Rollout) -> dict[str, Any]:
    base = group.base
    return {
        "step": step,
        "problem": group.problem.index,
        "prompt": "\n\n".join(f"{message['role']}: {message['content']}" for message in group.messages),
        "base": None if base is None else base.text,
        "base_reward": None if base is None else base.reward,
        "response": rollout.text,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
    }
