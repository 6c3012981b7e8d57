"""Whole steps of the race on one GPU, with random weights: ``python -m bench.stages.race WORK SECONDS [--cpu]``.

The job is ``configs/race/qwen3-1.7b-gsm8k.yaml``, of whose model only the shape is taken and in place of whose problems
there are as many random ones of GSM8K's lengths, since neither can be fetched where the GPU is. Nothing is evaluated or
saved. While it trains, the memory it will take is predicted by ``--dry-run``.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import ROOT
from bench.core import hardware
from bench.core.process import python
from bench.core.report import table
from bench.models import LARGE, TOY, Workload, shape_config, untrained_folder
from bench.stages.notes import Line, Notes, result
from bench.step.cases import flop_of
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import read_metrics

RACE = ROOT / "configs" / "race" / "qwen3-1.7b-gsm8k.yaml"
_STEPS = 4
_SECONDS = {"solve": 16.0, "refine": 19.0}  # goals of a step that is not the first of its phase
_MFU, _ROOM = 0.45, 0.8
_MISMATCH = 0.1  # nats; bfloat16 in rollout and training
# Characters, each of which the shipped model's tokenizer makes a token of, of GSM8K's questions: mean and spread, and
# the least and most.
_QUESTION = (110, 40, 40, 300)
_MIB, _GIB = 1 << 20, 1 << 30
_TRAIN = str(ROOT / "thinktwice_fast" / "train.py")
_PREDICTED = re.compile(r"predicted peak ([\d,]+) MiB.* ha(?:s|ve) ([\d,]+) MiB")


@dataclass(frozen=True)
class Race:
    """The job on disk, and the shape of its model."""

    config: Path
    shape: str
    prompts: int
    samples: int  # of each prompt
    output: Path


def prepare(work: Path, cpu: bool) -> Race:
    shape = TOY if cpu else LARGE
    config: dict[str, Any] = yaml.safe_load(RACE.read_text())
    config |= {
        "data": {"source": str(_problems(work / "problems.jsonl"))},
        "eval": {"sets": {}},
        "run": {"steps": _STEPS, "save": False, "transcripts_every": 0},
        "output": str(work / "race-run"),
    }
    model = {"path": str(untrained_folder(shape, work / "race-model")), "random_init": True}
    # Random weights solve nothing: this term gives every token a gradient.
    changed = {"model": model, "loss": {"entropy_coef": 0.001}}
    if cpu:
        config |= {"problems_per_step": 2, "samples_per_problem": 2}
        model |= {"device": "cpu", "compute_dtype": "float32"}
        changed["rollout"] = {"max_response_tokens": 8, "max_prompt_tokens": 640}
    for section, options in changed.items():
        config[section] = config.get(section, {}) | options
    path = work / "race.yaml"
    path.write_text(yaml.safe_dump(config))
    return Race(path, shape, config["problems_per_step"], config["samples_per_problem"], Path(config["output"]))


def _problems(path: Path) -> Path:
    """Expressions as long as GSM8K's questions are."""
    numbers = random.Random(0)
    mean, spread, least, most = _QUESTION
    lengths = [min(most, max(least, round(numbers.gauss(mean, spread)))) for _ in range(1024)]
    rows = [{"question": "".join(numbers.choices("0123456789+-", k=length)), "answer": "0"} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(work: Path, seconds: float, cpu: bool) -> int:
    deadline = time.monotonic() + seconds
    notes, race = Notes(work), prepare(work, cpu)
    command = [python(), _TRAIN, "--config", str(race.config)]
    training = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    planned = ""
    status: int | None = None  # cut off
    try:
        planned = _plan([*command, "--output", str(work / "race-plan")])  # the folder of the run is taken by now
        notes.tell("what was planned", planned)
        status = training.wait(max(1.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass  # what it has done by then is judged
    finally:
        if training.poll() is None:
            os.killpg(training.pid, signal.SIGKILL)
    metrics = race.output / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    if records:
        notes.tell("metrics", _table(records))
    lines = judge(race, records, planned, status)
    notes.add(*lines)
    return int(any(line.wrong for line in lines))


def judge(race: Race, records: Sequence[Record], planned: str, status: int | None) -> list[Line]:
    """What the steps that were done say.

    Args:
        planned: what ``--dry-run`` printed.
        status: of the run; None if it was cut off.
    """
    return [*_results(records, status), *_speeds(records, race), *_memory(records, planned, race)]


def _plan(command: Sequence[str]) -> str:
    """What ``--dry-run`` says; what goes wrong with it goes to the log."""
    return subprocess.run([*command, "--dry-run"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout


def _table(records: Sequence[Record]) -> str:
    """A column for each step."""
    names = dict.fromkeys(name.rpartition("/")[2] for record in records for name in record)
    rows = [[name] for name in names]
    for record in records:
        values = {name.rpartition("/")[2]: value for name, value in record.items()}
        for row in rows:
            value = values.get(row[0], "")
            row.append(f"{value:.6g}" if isinstance(value, float) else str(value))
    return table(rows)


def _results(records: Sequence[Record], status: int | None) -> Iterator[Line]:
    """Whether it came to its end, or was cut off in good health; and whether rollout and training agree."""
    ended = "cut off" if status is None else f"status {status}"
    done = f"{len(records)} of {_STEPS}, {ended}"
    yield Line("steps of the race", done, f"{_STEPS}", len(records) == _STEPS, wrong=bool(status))
    # What is not finite is written as null.
    apart = [record[f"{record['phase']}/mismatch"] for record in records]
    if records:
        worst = math.inf if None in apart else max(apart)
        name = "log-probabilities of rollout and training"
        yield result(name, f"{worst:.1e} apart", f"< {_MISMATCH}", worst < _MISMATCH)


def _speeds(records: Sequence[Record], race: Race) -> Iterator[Line]:
    """Of each step; the goals are for the last one of each phase, which is not a first use where there are two."""
    judged = {record["phase"]: record["step"] for record in records}
    for record in records:
        phase = record["phase"]
        rollout, update, step = (record[f"{phase}/seconds_{part}"] for part in ("rollout", "update", "step"))
        rate, prompt = record[f"{phase}/tokens_per_second"], record[f"{phase}/prompt_tokens"]
        name = f"step {record['step']}, {phase}, prompts of {prompt:.0f} tokens"
        figure = f"{step:.1f} s: {rollout:.1f} rollout ({rate:,.0f} tok/s) + {update:.1f} update"
        last = judged[phase] == record["step"]
        goal = _SECONDS[phase]
        met = step <= goal if race.shape == LARGE else None
        yield Line(name, figure, f"<= {goal:g} s", met) if last else Line(name, figure)
        share = _share_of_peak(record, race)
        if last and share is not None:
            yield Line(f"step {record['step']}, MFU of the update", f"{share:.1%}", f">= {_MFU:.0%}", share >= _MFU)


def _share_of_peak(record: Record, race: Race) -> float | None:
    """Of the products that an update cannot save, with each prompt once; None where the peak is not known."""
    peak, phase = hardware.peak_flop(), record["phase"]
    if peak is None:
        return None
    step = Workload(race.shape, race.prompts, race.samples, round(record[f"{phase}/response_tokens"]))
    flop = flop_of(step, shape_config(race.shape), round(record[f"{phase}/prompt_tokens"])).update
    return flop / record[f"{phase}/seconds_update"] / peak


def _memory(records: Sequence[Record], planned: str, race: Race) -> Iterator[Line]:
    found = _PREDICTED.search(planned)
    if not found:
        yield Line("predicted peak memory", "none", f"<= {_ROOM:.0%} of the device")
        return
    predicted, room = (_MIB * int(number.replace(",", "")) for number in found.groups())
    of_device = f"{predicted / _GIB:.1f} GiB of {room / _GIB:.1f}"
    yield Line("predicted peak memory", of_device, f"<= {_ROOM:.0%} of the device", predicted <= _ROOM * room)
    # Of a toy the program itself is all that counts, and every import moves it.
    if records:
        peak = max(record["peak_memory_bytes"] for record in records)
        met = peak <= predicted if race.shape == LARGE else None
        yield Line("peak memory", f"{peak / _GIB:.1f} GiB", f"<= {predicted / _GIB:.1f} GiB", met)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), "--cpu" in sys.argv))
