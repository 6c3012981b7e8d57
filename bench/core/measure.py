"""Measures all contenders of one case: first whether each is right, then its time in rounds that take turns, then its
memory. Only what is right gets a time.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from bench.core.contender import CEILING, OURS, PLAIN, Outputs
from bench.core.memory import peak_memory
from bench.core.op import Case, Op, Size
from bench.core.stats import median, median_ratio, quantile

_FP32_LIMIT = 1e-5
_PEER_FP32_LIMIT = 1e-4
_PEER_LOW_PRECISION_LIMIT = 0.05
_UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9, "tokens/s": 1.0}


@dataclass(frozen=True)
class Setting:
    size: Size
    device: torch.device
    seconds: float  # for the rounds of one case
    rounds: tuple[int, int]  # at least, at most


SETTINGS: dict[Size, Setting] = {
    "toy": Setting("toy", torch.device("cpu"), 0.1, (3, 5)),
    "cpu": Setting("cpu", torch.device("cpu"), 12.0, (3, 15)),
    "gpu": Setting("gpu", torch.device("cuda", 0), 3.0, (7, 40)),
}


@dataclass(frozen=True)
class Record:
    """What is known of one contender in one case."""

    op: str
    case: str
    contender: str
    status: Literal["ok", "wrong", "not run", "ceiling"]
    reason: str = ""
    tokens: int = 0
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


def measure_case(op: Op, case: Case[Any], setting: Setting) -> list[Record]:
    """A record per contender, and one of the ceiling."""
    gc.freeze()  # what the libraries made at their import need not be looked through again in each collection
    try:
        return _measured(op, case, op.inputs(case, setting.device), setting)
    finally:
        gc.unfreeze()


def _measured(op: Op, case: Case[Any], batch: Any, setting: Setting) -> list[Record]:
    records = _check(op, case, batch, setting)
    ready: dict[str, Callable[[], Any]] = {
        name: partial(op.contenders[name].run, batch) for name, record in records.items() if record.status == "ok"
    }
    if op.ceiling is not None:
        ready[CEILING] = op.ceiling.prepare(batch)
        records[CEILING] = replace(_blank(op, case, CEILING), status="ceiling", reason=op.ceiling.name)
    least, most = setting.rounds
    rounds = min(least, case.rounds or least), case.rounds or most
    for name, times in _rounds(ready, op, replace(setting, seconds=case.seconds or setting.seconds, rounds=rounds)):
        p20, p80 = quantile(times, 0.2), quantile(times, 0.8)
        records[name] = replace(records[name], seconds=times, median=median(times), p20=p20, p80=p80)
    del ready
    for name, contender in op.contenders.items():
        if records[name].status != "ok":
            continue
        if op.details is not None:
            records[name] = replace(records[name], details=op.details(batch, contender))
        if case.memory:
            peak = op.memory(batch, contender) if op.memory else peak_memory(op, case, name, batch, setting.size)
            records[name] = replace(records[name], memory=peak)
    return [_compared(record, records, op, case) if record.seconds else record for record in records.values()]


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
    if name == OURS and plain is not None and plain.status == "ok":
        return max(_FP32_LIMIT, 2 * plain.errors[result])
    return _PEER_LOW_PRECISION_LIMIT


def _blank(op: Op, case: Case[Any], name: str) -> Record:
    return Record(op.name, case.name, name, "ok", tokens=case.shape.tokens, main=case.counts, unit=op.unit)


def _check(op: Op, case: Case[Any], batch: Any, setting: Setting) -> dict[str, Record]:
    want = op.truth(batch)
    records: dict[str, Record] = {}
    for name in sorted(op.contenders, key=lambda name: name != PLAIN):  # the limits need plain torch's errors
        record, contender = _blank(op, case, name), op.contenders[name]
        reason, errors = _why_not(op, name, case, setting.device), {}
        if reason is None:
            try:
                errors = op.judge(batch, contender) if op.judge else errors_of(contender.run(batch), want)
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        if reason is not None:
            records[name] = replace(record, status="not run", reason=reason)
        elif op.judge:
            records[name] = _judged(record, errors, op.limits(case.dtype))
        else:
            plain = records.get(PLAIN)
            limits = {result: error_limit(name, result, case.dtype, plain) for result in errors}
            records[name] = _judged(record, errors, limits)
        _collect(setting.device)
    return {name: records[name] for name in op.contenders}


def _why_not(op: Op, name: str, case: Case[Any], device: torch.device) -> str | None:
    contender = op.contenders[name]
    if name in case.left_out or (case.only_targets and not (contender.in_targets or name in (OURS, PLAIN))):
        return "left out of this case: a round of all would take long"
    return contender.unable(device)


def _judged(record: Record, errors: dict[str, float], limits: Mapping[str, float]) -> Record:
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limits[name]]  # NaN is wrong too
    if not wrong:
        return replace(record, errors=errors)
    return replace(record, status="wrong", reason=f"error of {', '.join(wrong)}", errors=errors)


def _rounds(ready: Mapping[str, Callable[[], Any]], op: Op, setting: Setting) -> list[tuple[str, list[float]]]:
    """Seconds of each round. All contenders are measured in turn, A B C A B C, so that noise meets all of them."""
    repeats = {name: _repeats(call, setting.device) if op.short else 1 for name, call in ready.items()}
    if setting.device.type == "cuda":  # the caching allocator starts empty, and clocks rise
        for name, call in ready.items():
            seconds_of(call, setting.device, repeats[name])
    times: dict[str, list[float]] = {name: [] for name in ready}
    least, most = setting.rounds
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > setting.seconds:
            break
        gc.collect()
        for name, call in ready.items():
            times[name].append(seconds_of(call, setting.device, repeats[name]))
    return list(times.items())


def _repeats(call: Callable[[], Any], device: torch.device) -> int:
    """So many calls that a sample lasts 5 ms and the clock's own grain does not show."""
    return min(1000, math.ceil(0.005 / max(seconds_of(call, device, 3), 1e-7)))


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Of one call, on average over the repeats."""
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


def _compared(record: Record, records: Mapping[str, Record], op: Op, case: Case[Any]) -> Record:
    """With its rate, and its time in those of ours and of the ceiling, each for the same work."""
    ours, ceiling = records.get(OURS), records.get(CEILING)
    if ours is not None and ours.seconds:
        record = replace(record, to_ours=median_ratio(record.seconds, ours.seconds))
    if op.work is None:
        return record
    own_work = op.ceiling.work if record.contender == CEILING and op.ceiling else op.work
    if record.to_ours is not None:
        record = replace(record, to_ours=record.to_ours * op.work(case) / own_work(case))
    record = replace(record, rate=own_work(case) / (median(record.seconds) * _UNITS[op.unit]))
    if ceiling is not None and op.ceiling is not None:
        share = own_work(case) / op.ceiling.work(case)
        record = replace(record, of_ceiling=share * median_ratio(ceiling.seconds, record.seconds))
    return record
