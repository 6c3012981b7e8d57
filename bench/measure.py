"""Measures all contenders of one case: first whether each is right, then its time in rounds that take turns, then its
memory. Only what is right gets a time.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bench.memory import peak_memory
from bench.shapes import Case, Size
from bench.stats import median, median_ratio, quantile

OURS = "thinktwice"
PLAIN = "torch"
CEILING = "ceiling"
Outputs = Mapping[str, Tensor]
Status = Literal["ok", "wrong", "not run", "ceiling"]

_FP32_LIMIT = 1e-5
_PEER_FP32_LIMIT = 1e-4
_PEER_LOW_PRECISION_LIMIT = 0.05


def always(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute an op, forward and backward: `run` gives results and gradients by name."""

    run: Callable[[Any], Outputs]
    unable: Callable[[torch.device], str | None] = always  # why it cannot run on that device
    compiled: bool = False  # compiles for a shape when it first meets it
    in_targets: bool = False  # one that a target names


@dataclass(frozen=True)
class Ceiling:
    """The fastest that the machine can do such work: `prepare` makes the buffers and gives what to time."""

    name: str
    prepare: Callable[[Any], Callable[[], None]]
    work: Callable[[Case], float]  # what it does, in the unit of the op's work


@dataclass(frozen=True)
class Op:
    name: str
    module: str  # that has it in its list OPS
    cases: Callable[[Size], list[Case]]
    inputs: Callable[[Case, torch.device], Any]
    contenders: Mapping[str, Contender]
    truth: Callable[[Any], Outputs] = lambda batch: {}  # what the results are held against
    # Instead, where there is no one truth, as for what is drawn at random: errors by name, and how large each may be.
    judge: Callable[[Any, Contender], dict[str, float]] | None = None
    limits: Callable[[torch.dtype], Mapping[str, float]] = lambda dtype: {}
    # Instead of calls in a process of their own, where contenders have one: bytes at the peak of the timed calls.
    memory: Callable[[Any, Contender], int] | None = None
    details: Callable[[Any, Contender], dict[str, float]] | None = None  # of the timed calls, to be shown by name
    work: Callable[[Case], float] | None = None  # FLOP, bytes or tokens of one call
    unit: Literal["TFLOP/s", "GB/s", "tokens/s", ""] = ""
    ceiling: Ceiling | None = None
    short: bool = False  # calls of microseconds, timed many at a time


@dataclass(frozen=True)
class Setting:
    size: Size
    device: torch.device
    seconds: float  # for the rounds of one case
    rounds: tuple[int, int]  # at least, at most


SETTINGS: dict[Size, Setting] = {
    "toy": Setting("toy", torch.device("cpu"), 0.5, (3, 5)),
    "cpu": Setting("cpu", torch.device("cpu"), 12.0, (3, 15)),
    "gpu": Setting("gpu", torch.device("cuda", 0), 3.0, (7, 40)),
}


@dataclass(frozen=True)
class Record:
    """What is known of one contender in one case."""

    op: str
    case: str
    contender: str
    status: Status
    reason: str = ""
    tokens: int = 0
    vocabulary: int = 0
    main: bool = True  # of the main comparison, which the targets are for: no row that could be skipped
    errors: dict[str, float] = field(default_factory=dict)  # ||out - ref|| / ||ref|| of each result
    seconds: list[float] = field(default_factory=list)  # of each round
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    memory: int | None = None  # bytes at the peak beyond the inputs; results and gradients count
    details: dict[str, float] = field(default_factory=dict)
    rate: float | None = None
    unit: str = ""
    of_ceiling: float | None = None
    to_ours: float | None = None  # how many times our time, for the same work

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_case(op: Op, case: Case, setting: Setting) -> list[Record]:
    """A record per contender, and one of the ceiling."""
    batch = op.inputs(case, setting.device)
    records = _check(op, case, batch, setting)
    ready: dict[str, Callable[[], Any]] = {
        name: _bound(op.contenders[name], batch) for name, record in records.items() if record.status == "ok"
    }
    if op.ceiling is not None:
        ready[CEILING] = op.ceiling.prepare(batch)
        records[CEILING] = replace(_blank(op, case, CEILING, "ceiling"), reason=op.ceiling.name)
    least, most = setting.rounds
    own = replace(
        setting,
        seconds=case.seconds or setting.seconds,
        rounds=(min(least, case.rounds or least), case.rounds or most),
    )
    for name, times in _rounds(ready, op, own).items():
        records[name] = replace(
            records[name], seconds=times, median=median(times), p20=quantile(times, 0.2), p80=quantile(times, 0.8)
        )
    del ready
    for name, contender in op.contenders.items():
        if records[name].status != "ok":
            continue
        if op.details is not None:
            records[name] = replace(records[name], details=op.details(batch, contender))
        if case.memory:
            peak = op.memory(batch, contender) if op.memory else peak_memory(op, case, name, batch, setting)
            records[name] = replace(records[name], memory=peak)
    return [_compared(record, records, op, case) for record in records.values()]


def errors_of(got: Outputs, want: Outputs) -> dict[str, float]:
    """Relative error of each result; inf for one that is missing or of another shape."""
    found = {}
    for name, value in want.items():
        other = got.get(name)
        if other is None or other.shape != value.shape:
            found[name] = math.inf
        else:
            found[name] = float((other.double() - value).norm() / value.double().norm())
    return found


def error_limit(name: str, result: str, dtype: torch.dtype, plain: Record | None) -> float:
    """Ours: 1e-5 in fp32; in bf16 twice the error of plain torch. A peer may be ten times as far off in fp32, and 5 %
    in bf16: its time is worth knowing as long as it computes the same thing."""
    if dtype == torch.float32:
        return _FP32_LIMIT if name == OURS else _PEER_FP32_LIMIT
    if name != OURS:
        return _PEER_LOW_PRECISION_LIMIT
    known = plain is not None and plain.status == "ok"
    return max(_FP32_LIMIT, 2 * plain.errors[result]) if plain and known else _PEER_LOW_PRECISION_LIMIT


def _blank(op: Op, case: Case, name: str, status: Status, reason: str = "") -> Record:
    return Record(
        op.name,
        case.name,
        name,
        status,
        reason,
        case.tokens,
        case.vocabulary,
        case.counts and not case.skippable,
        unit=op.unit,
    )


def _check(op: Op, case: Case, batch: Any, setting: Setting) -> dict[str, Record]:
    want = op.truth(batch)
    records: dict[str, Record] = {}
    for name in sorted(op.contenders, key=lambda name: name != PLAIN):  # the limits need plain torch's errors
        reason = _why_not(op.contenders[name], name, case, setting)
        if reason is None:
            try:
                contender = op.contenders[name]
                errors = op.judge(batch, contender) if op.judge else errors_of(contender.run(batch), want)
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        if reason is not None:
            records[name] = _blank(op, case, name, "not run", reason)
        else:
            plain = records.get(PLAIN)
            limits = op.limits(case.dtype) if op.judge else _limits(name, errors, case.dtype, plain)
            records[name] = _judged(_blank(op, case, name, "ok"), errors, limits)
        _collect(setting.device)
    return {name: records[name] for name in op.contenders}


def _why_not(contender: Contender, name: str, case: Case, setting: Setting) -> str | None:
    if name in case.left_out or (case.only_targets and not (contender.in_targets or name in (OURS, PLAIN))):
        return "left out of this case: a round of all would take long"
    return contender.unable(setting.device)


def _limits(name: str, results: Iterable[str], dtype: torch.dtype, plain: Record | None) -> dict[str, float]:
    return {result: error_limit(name, result, dtype, plain) for result in results}


def _judged(record: Record, errors: dict[str, float], limits: Mapping[str, float]) -> Record:
    wrong = {name: error for name, error in errors.items() if not error <= limits[name]}  # NaN is wrong too
    if not wrong:
        return replace(record, errors=errors)
    reason = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
    return replace(record, status="wrong", reason=f"error of {reason}", errors=errors)


def _bound(contender: Contender, batch: Any) -> Callable[[], Any]:
    return lambda: contender.run(batch)


def _rounds(ready: Mapping[str, Callable[[], Any]], op: Op, setting: Setting) -> dict[str, list[float]]:
    """Seconds of each round. All contenders are measured in turn, A B C A B C, so that noise meets all of them."""
    repeats = {name: _repeats(call, setting.device) if op.short else 1 for name, call in ready.items()}
    if setting.device.type == "cuda":  # the caching allocator starts empty, and clocks rise
        for name, call in ready.items():
            _sample(call, repeats[name], setting.device)
    times: dict[str, list[float]] = {name: [] for name in ready}
    least, most = setting.rounds
    gc.freeze()  # what the libraries made at their import need not be looked through again in each round
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > setting.seconds:
            break
        gc.collect()
        for name, call in ready.items():
            times[name].append(_sample(call, repeats[name], setting.device))
    gc.unfreeze()
    return times


def _repeats(call: Callable[[], Any], device: torch.device) -> int:
    """So many calls that a sample lasts 5 ms and the clock's own grain does not show."""
    return min(1000, math.ceil(0.005 / max(_sample(call, 3, device), 1e-7)))


def _sample(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _compared(record: Record, records: Mapping[str, Record], op: Op, case: Case) -> Record:
    if not record.seconds:
        return record
    ours, ceiling = records.get(OURS), records.get(CEILING)
    if ours is not None and ours.seconds:
        record = replace(record, to_ours=median_ratio(record.seconds, ours.seconds))
    if op.work is None:
        return record
    own_work = op.ceiling.work if record.contender == CEILING and op.ceiling else op.work
    if record.to_ours is not None:
        record = replace(record, to_ours=record.to_ours * op.work(case) / own_work(case))
    record = replace(record, rate=own_work(case) / _per_second(op.unit, record.seconds))
    if ceiling is not None and op.ceiling is not None:
        share = own_work(case) / op.ceiling.work(case)
        record = replace(record, of_ceiling=share * median_ratio(ceiling.seconds, record.seconds))
    return record


def _per_second(unit: str, seconds: Sequence[float]) -> float:
    return median(seconds) * {"TFLOP/s": 1e12, "GB/s": 1e9, "tokens/s": 1.0}[unit]
