"""The curves of a page as plain data; assets/report/charts.js draws them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from thinktwice_fast.run.metrics import SAMPLED, Record
from thinktwice_fast.run.page.inputs import Method
from thinktwice_fast.run.report import curve, evaluation_sets, smooth

_POINTS = 300  # most that a curve has; more are averaged
_STACK_POINTS = 60
_DIGITS = 6  # that are kept of a number
_GIB = 1 << 30
_PARTS = ("rollout", "grading", "teacher", "update")

Points = dict[int, float]  # by step


@dataclass(frozen=True)
class Series:
    """One curve: mean of the runs of a method at each step, with their range where there are several."""

    name: str
    colour: str  # a class of the style sheet
    steps: list[int]
    values: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    method: int = 0  # whose it is
    dashed: bool = False
    dots: bool = False  # few points, each of which is of interest


@dataclass(frozen=True)
class Chart:
    """One picture."""

    section: str  # of the page
    title: str
    note: str  # what one sees in it
    form: str  # of its numbers: "share", "number", "gibibytes", "seconds"
    series: list[Series]
    stacked: bool = False


@dataclass(frozen=True)
class _Plan:
    """A chart of metrics: each with its name in the legend and its colour."""

    section: str
    title: str
    note: str
    form: str
    metrics: Sequence[tuple[str, str, str]]
    smoothed: bool = True


def _of_phases(section: str, title: str, note: str, form: str, metric: str, phases: Sequence[str] = SAMPLED) -> _Plan:
    return _Plan(section, title, note, form, [(f"{phase}/{metric}", phase, phase) for phase in phases])


_UPDATED = (*SAMPLED, "pair", "sft")
_TRAINING = (
    _of_phases("learning", "Training reward", "mean of a step's samples, smoothed", "number", "reward"),
    _of_phases("learning", "Training loss", "nats a token, smoothed", "number", "loss", ("sft",)),
    _of_phases(
        "signal",
        "Groups with a signal",
        "groups whose rewards differ; the others teach nothing",
        "share",
        "group_signal_rate",
    ),
    _of_phases("signal", "Response length", "tokens, mean", "number", "response_tokens"),
    _of_phases("signal", "Cut off", "responses without an end, of all", "share", "truncation_rate"),
    _of_phases("signal", "Entropy", "nats, of the distribution a token was drawn from", "number", "entropy"),
    _of_phases("signal", "Gradient norm", "before clipping", "number", "grad_norm", _UPDATED),
    _of_phases("cost", "Sampling speed", "tokens a second", "number", "tokens_per_second", (*SAMPLED, "pair")),
)
_MEMORY = _Plan(
    "cost",
    "Peak memory",
    "GiB, most that a process has held so far",
    "gibibytes",
    [("peak_memory_bytes", "peak", "update")],
    smoothed=False,
)


def charts(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Every chart that the runs have numbers for, as JSON."""
    sets = list(dict.fromkeys(name for m in methods for run in m.runs for name in evaluation_sets(run.records)))
    plans = [plan for name in reversed(sets) for plan in _evaluation_plans(name, len(sets) > 1)]
    drawn = [_chart(plan, methods) for plan in (*plans, *_TRAINING, _MEMORY)]
    drawn += [_time(methods, number) for number in range(len(methods))]
    return [asdict(chart) for chart in drawn if chart.series]


def axes(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Of each method's first run: generations and minutes by step, for other axes than steps."""
    found = []
    for method in methods:
        records = [record for record in method.runs[0].records if record.get("generations") is not None]
        records = records[-1 :: -(-(-len(records) // _POINTS) or 1)][::-1]
        steps = [0, *(record["step"] for record in records)]
        generations = [0, *(record["generations"] for record in records)]
        minutes = [0.0, *(round(record["elapsed_seconds"] / 60, 2) for record in records)]
        found.append({"steps": steps, "generations": generations, "minutes": minutes})
    return found


def time_parts(records: Sequence[Record]) -> list[tuple[int, dict[str, float]]]:
    """Seconds of each part of a pair of steps (or of a step that has no other half), by its last step."""
    paired = any(record["phase"] == "refine" for record in records)
    found: list[tuple[int, dict[str, float]]] = []
    parts: dict[str, float] = {}
    for record in records:
        phase = record["phase"]
        whole = record.get(f"{phase}/seconds_step")
        if whole is None:
            continue
        known = {part: seconds for part in _PARTS if (seconds := record.get(f"{phase}/seconds_{part}")) is not None}
        for part, seconds in (*known.items(), ("other", max(0.0, whole - sum(known.values())))):
            name = part if part == "other" or phase not in SAMPLED else f"{phase}: {part}"
            parts[name] = parts.get(name, 0.0) + seconds
        if phase != "solve" or not paired:
            found.append((record["step"], parts))
            parts = {}
    return found


def _evaluation_plans(name: str, several: bool) -> list[_Plan]:
    of = f" ({name})" if several else ""
    prefix = f"eval/{name}"
    accuracies = [(f"{prefix}/solve_accuracy", "solution", "solve"), (f"{prefix}/refine_accuracy", "refined", "refine")]
    fixed, damaged = (f"{prefix}/fix_wrong", "fixed", "fixed"), (f"{prefix}/damage_correct", "spoiled", "spoiled")
    return [
        _Plan("learning", f"Held-out accuracy{of}", "before and after refinement", "share", accuracies, False),
        _Plan("learning", f"Rectify{of}", "wrong solutions put right, of the wrong ones", "share", [fixed], False),
        _Plan("learning", f"Fortify{of}", "right solutions spoiled, of the right ones", "share", [damaged], False),
    ]


def _chart(plan: _Plan, methods: Sequence[Method]) -> Chart:
    drawn = []
    for number, method in enumerate(methods):
        for place, (metric, name, colour) in enumerate(plan.metrics):
            runs = [_points(run.records, metric, smooth if plan.smoothed else list) for run in method.runs]
            steps, values, low, high = _together(runs)
            if not steps:
                continue
            if len(methods) > 1:
                name, colour = (f"{method.label}: {name}", f"m{number % 8}")
            few = not plan.smoothed and len(steps) <= 60 and plan is not _MEMORY
            dashed = place > 0 and len(methods) > 1
            drawn.append(Series(name, colour, steps, values, low, high, number, dashed, few))
    return Chart(plan.section, plan.title, plan.note, plan.form, drawn)


def _time(methods: Sequence[Method], number: int) -> Chart:
    method, series = methods[number], []
    runs = [dict(time_parts(run.records)) for run in method.runs]
    names = dict.fromkeys(name for run in runs for parts in run.values() for name in parts)
    for name in sorted(names, key=lambda name: name == "other"):
        points = [{step: parts.get(name, 0.0) for step, parts in run.items()} for run in runs]
        steps, values, _, _ = _together(points, _STACK_POINTS)
        series.append(Series(name, f"t-{name.replace(': ', '-')}", steps, values, method=number))
    title = f"Time of a step by part ({method.label})" if len(methods) > 1 else "Time of a step by part"
    paired = any(name.startswith("refine") for name in names)
    note = "seconds of a solve step and the refine step after it" if paired else "seconds"
    return Chart("cost", title, note, "seconds", series, stacked=True)


def _points(records: Sequence[Record], metric: str, change: Callable[[Sequence[float]], list[float]]) -> Points:
    steps, values = curve(records, metric)
    scale = 1 / _GIB if metric.endswith("_bytes") else 1
    return {step: scale * value for step, value in zip(steps, change(values), strict=True)}


def _together(runs: Sequence[Points], most: int = _POINTS) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all runs have; mean, least and greatest value there, the last two empty for one run."""
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    columns = [[run[step] for run in runs] for step in steps]
    means = _thinned((sum(column) / len(column) for column in columns), most)
    low, high = (_thinned(map(pick, columns), most) if len(runs) > 1 else [] for pick in (min, max))
    return [round(step) for step in _thinned(steps, most)], means, low, high


def _thinned(values: Iterable[float], most: int) -> list[float]:
    """At most so many means of as many neighbours each."""
    all_values = list(values)
    width = -(-len(all_values) // most) or 1
    pieces = (all_values[start : start + width] for start in range(0, len(all_values), width))
    return [float(f"{sum(piece) / len(piece):.{_DIGITS}g}") for piece in pieces]
