"""The file that metrics go to; trackers (``tracking.py``) get the same.

``metrics.jsonl`` holds one JSON object per line: ``step``, ``phase``, then metrics under the names declared in
``metrics.py``.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from thinktwice_fast.errors import UserError
from thinktwice_fast.run.metrics import PHASES, POLICY, Record, find_metric


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per record, handed to the operating system before returning.

    Raises:
        UserError: the file cannot be written (no space left, say).
        ValueError: a value is NaN or infinite, which JSON cannot hold.
    """
    try:
        with path.open("ab") as file:
            for record in records:
                line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
                # A lone surrogate (legal in a JSON data set) has no UTF-8 form; its backslash form is a JSON escape.
                file.write(line.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; mend that, then continue with --resume auto") from None


def read_json_lines(path: Path) -> Iterator[Record]:
    """The records of a JSON lines file, in order, without a last line that a kill cut in half.

    Raises:
        UserError: the file is missing, or a line that others follow is not a record with a ``step``.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the path of a run's JSON lines file") from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record["step"]
            except (ValueError, TypeError, KeyError):
                # Lines are appended whole, so only the end of the file can be torn.
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}, line {number} is not a record of a run; delete that line") from None
            yield record


def read_metrics(path: Path) -> list[Record]:
    """Every record of a ``metrics.jsonl``; raises UserError as `read_json_lines` does."""
    return list(read_json_lines(path))


def truncate_json_lines(path: Path, last_step: int | None) -> None:
    """Keep only the records with ``step`` <= ``last_step``, or none where it is None.

    What a killed run wrote after its last checkpoint will be written again. The file is replaced in one rename:
    a kill leaves the old or the new one. A missing file stays missing.

    Raises:
        UserError: as `read_json_lines` and `append_json_lines`.
    """
    if not path.exists():
        return
    if last_step is None:
        path.unlink()
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    append_json_lines(temporary, (record for record in read_json_lines(path) if record["step"] <= last_step))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class MetricsWriter:
    """Writes ``folder/metrics.jsonl``. For rank 0 alone.

    Args:
        folder: The run's folder; made where it is missing.
        resume_step: Step of the checkpoint that the run continues from: later records are removed. None for a run from
            the start: the same for all records.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        truncate_json_lines(self.path, resume_step)

    def write(self, step: int, phase: str, values: Mapping[str, float | None]) -> Record:
        """Write one record and return it as written.

        NaN and infinities become null: JSON has neither, and a broken metric must not stop a run.

        Raises:
            KeyError: an undeclared name, or one that belongs to another phase.
            UserError: the file cannot be written.
        """
        assert phase in PHASES, phase
        record: Record = {"step": step, "phase": phase}
        for name, value in values.items():
            find_metric(name)
            if "/" in name and name.partition("/")[0] not in (POLICY if phase == "pair" else (phase,)):
                raise KeyError(f"metric {name!r} does not belong into a record of phase {phase!r}")
            record[name] = value if value is not None and math.isfinite(value) else None
        append_json_lines(self.path, [record])
        return record
