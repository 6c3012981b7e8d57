"""What an evaluation leaves for people: a table, ``results.json``, a chart, and logs for other viewers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from thinktwice_fast.cli.evaluation.drawing import Times
from thinktwice_fast.cli.evaluation.inspect_log import write_log
from thinktwice_fast.cli.evaluation.intervals import Estimate
from thinktwice_fast.cli.evaluation.options import EvalOptions
from thinktwice_fast.cli.evaluation.sets import ProblemSet
from thinktwice_fast.cli.evaluation.store import Store
from thinktwice_fast.cli.evaluation.summary import Cell, Estimates, Summary, summarise
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.metrics import AVERAGE
from thinktwice_fast.run.progress import clock
from thinktwice_fast.run.report import COLOURS, aligned

_LABELS = {
    "accuracy": "accuracy",
    "majority": "majority",
    "pass@": "pass@{k}",
    "fix_wrong": "fix-wrong",
    "damage_correct": "damage-correct",
    "boxed_rate": "boxed",
    "truncation_rate": "cut off",
    "tokens": "tokens",
}
_PHASES = ("solve", "refine")


def report(
    cells: Sequence[Cell],
    sets: Sequence[ProblemSet],
    options: EvalOptions,
    times: Times,
    folder: Callable[[str, ProblemSet], Path],
) -> None:
    """Write everything into the output folder and print the table.

    Args:
        cells: what was found.
        sets: that were evaluated.
        options: of the evaluation.
        times: of this process.
        folder: of a model's responses to a set.

    Raises:
        UserError: it can't be written.
    """
    output = Path(options.output)
    summary = summarise(cells, options.k, options.seed)
    results, chart = output / "results.json", output / "chart.png"
    written = {"results": results, "chart": chart}
    try:
        plot(summary, chart)
        if options.export == "inspect":
            written["logs"] = output / "inspect"
            written["logs"].mkdir(exist_ok=True)
            for model in options.model:
                for problems in sets:
                    store = Store(folder(model, problems), 0)
                    own = summary.models[model][problems.name]
                    write_log(written["logs"], model, problems, store, options, own)
        seconds = {name: round(value, 3) for name, value in _seconds(times).items()}
        content = {"options": asdict(options), "seconds": seconds, **summary.json()}
        results.with_suffix(".tmp").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        results.with_suffix(".tmp").replace(results)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}: mend that, then repeat the command") from error
    blocks = [table(summary), cross_table(summary), _time_line(times)]
    blocks.append(aligned([(what, str(path)) for what, path in written.items()]))
    print("\n\n".join(block for block in blocks if block), flush=True)


def table(summary: Summary) -> str:
    """A block per set: a row per figure, before and after refinement, of each model and of what it is beyond the
    first."""
    blocks = []
    for name in next(iter(summary.models.values())):
        count = "plain mean" if name == AVERAGE else f"{summary.problems[name]:,} problems"
        columns: list[tuple[str, Estimates, bool]] = []
        for model, sets in summary.models.items():
            columns.append((_short(model, summary), sets[name], False))
            if model in summary.differences:
                columns.append(("difference", summary.differences[model][name], True))
        rows = [(f"{name} ({count})", *(title for title, _, _ in columns))]
        names = dict.fromkeys(figure for _, estimates, _ in columns for figure in estimates)
        for figure in sorted(names, key=_order):
            shown = [_text(estimates.get(figure), figure, signed) for _, estimates, signed in columns]
            rows.append((f"  {_label(figure)}", *shown))
        blocks.append(aligned(rows, numbers=True))
    return "\n\n".join(blocks)


def cross_table(summary: Summary) -> str:
    """Matrices of the last set (or the average): who refines in rows, whose solutions in columns."""
    if not summary.cross:
        return ""
    blocks = []
    name = list(next(iter(summary.models.values())))[-1]
    models = list(summary.models)
    any_of = [figure for figure in summary.cross[models[0]][models[0]][name] if figure.startswith("refine_")]
    for figure in any_of:
        rows = [(f"{name}: {_label(figure)}, of solutions by", *(_short(model, summary) for model in models))]
        for refiner in models:
            cells = (summary.cross[refiner][solver][name].get(figure) for solver in models)
            rows.append((f"  refined by {_short(refiner, summary)}", *(_text(cell, figure, False) for cell in cells)))
        blocks.append(aligned(rows, numbers=True))
    return "\n\n".join(blocks)


def plot(summary: Summary, path: Path) -> None:
    """Left: accuracy before and after refinement, by set; right: pass@k of the last (the average)."""
    picture = Figure(figsize=(11, 4.5), layout="constrained")
    bars, curves = picture.subplots(1, 2, width_ratios=(1.7, 1))
    models, names = list(summary.models), list(next(iter(summary.models.values())))
    width = 0.8 / (2 * len(models))
    for number, model in enumerate(models):
        fade = 1 - 0.6 * number / len(models)
        for phase_number, phase in enumerate(_PHASES):
            found = [summary.models[model][name].get(f"{phase}_accuracy") for name in names]
            shift = (2 * number + phase_number - len(models) + 0.5) * width
            label = f"{_short(model, summary)}, {'after refinement' if phase_number else 'solutions'}"
            _draw_bars(bars, shift, width, found, COLOURS[phase], fade, label)
            points = _pass_points(summary.models[model][names[-1]], phase)
            if points:
                style = "o-" if phase_number else "o--"
                curves.plot(*zip(*points, strict=True), style, color=COLOURS[phase], alpha=fade, label=label)
    bars.set_xticks(range(len(names)), names)
    bars.set_title("Accuracy, with 95 % intervals", loc="left", fontsize=11)
    curves.set_title(f"pass@k, {names[-1]}", loc="left", fontsize=11)
    curves.set_xscale("log", base=2)
    ks = sorted(
        {k for sets in summary.models.values() for phase in _PHASES for k, _ in _pass_points(sets[names[-1]], phase)}
    )
    curves.set_xticks(ks, map(str, ks))
    curves.set_xlabel("k")
    for axes in (bars, curves):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=120)


def _draw_bars(
    axes: Axes, shift: float, width: float, found: Sequence[Estimate | None], colour: str, fade: float, label: str
) -> None:
    places = [place + shift for place, estimate in enumerate(found) if estimate is not None]
    known = [estimate for estimate in found if estimate is not None]
    if not known:
        return
    errors = [[e.value - e.low for e in known], [e.high - e.value for e in known]]
    heights = [estimate.value for estimate in known]
    axes.bar(places, heights, width, yerr=errors, color=colour, alpha=fade, label=label, error_kw={"elinewidth": 0.8})


def _pass_points(estimates: Estimates, phase: str) -> list[tuple[int, float]]:
    prefix = f"{phase}_pass@"
    points = [(int(name.removeprefix(prefix)), e.value) for name, e in estimates.items() if name.startswith(prefix)]
    return sorted(points)


def _label(figure: str) -> str:
    prefix, _, k = figure.partition("@")
    bare = prefix.removeprefix("solve_").removeprefix("refine_") + ("@" if k else "")
    after = " after refinement" if figure.startswith("refine_") else ""
    return _LABELS[bare].format(k=k) + after


def _order(figure: str) -> tuple[int, int, bool]:
    prefix, _, k = figure.partition("@")
    bare = prefix.removeprefix("solve_").removeprefix("refine_") + ("@" if k else "")
    return list(_LABELS).index(bare), int(k or 0), figure.startswith("refine_")


def _text(estimate: Estimate | None, figure: str, signed: bool) -> str:
    if estimate is None:
        return "-"
    sign, scale, unit = "+" if signed else "", 100.0, " %"
    if figure.endswith("tokens"):
        scale, unit = 1.0, ""
    elif signed:
        unit = ""
    form = f"{sign}.1f"
    text = f"{format(scale * estimate.value, form)}{unit}"
    return f"{text} [{format(scale * estimate.low, form)}, {format(scale * estimate.high, form)}]"


def _short(model: str, summary: Summary) -> str:
    """As much of a model's name, from its end, as tells it from the others."""
    parts = {name: Path(name).parts for name in summary.models}
    for length in range(1, max(map(len, parts.values())) + 1):
        ends = {name: "/".join(own[-length:]) for name, own in parts.items()}
        if len(set(ends.values())) == len(ends):
            return ends[model]
    return model


def _seconds(times: Times) -> dict[str, float]:
    return {"start_up": times.start_up, "engine": times.engine, "grading": times.grading, "other": times.other}


def _time_line(times: Times) -> str:
    seconds = _seconds(times)
    start_up = seconds.pop("start_up")
    whole = sum(seconds.values())
    if not whole:
        return ""
    engine, grading, other = (100 * value / whole for value in seconds.values())
    return (
        f"time {clock(whole)}: engine {engine:.1f} %, waiting for graders {grading:.1f} %, other {other:.1f} %; "
        f"start-up {clock(start_up)} on top"
    )
