"""What a run leaves for people: the picture of its curves, the closing summary, transcripts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from thinktwice_fast.errors import UserError
from thinktwice_fast.run.metrics import AVERAGE, POLICY, SAMPLED, Record
from thinktwice_fast.run.metrics_file import append_json_lines
from thinktwice_fast.run.progress import clock

Curve = tuple[list[int], list[float]]  # steps, values

COLOURS = {
    "solve": "#2f6fb7",
    "refine": "#d9772b",
    "sft": "#2f6fb7",
    "fix_wrong": "#2e8b57",
    "damage_correct": "#b8344a",
}

_GIB = 1 << 30
SUMMARY_ROWS = (
    ("solve_accuracy", "solve accuracy"),
    ("refine_accuracy", "accuracy after refinement"),
    ("fix_wrong", "fix-wrong"),
    ("damage_correct", "damage-correct"),
)


@dataclass(frozen=True)
class Transcript:
    """One sample as people read it."""

    problem: int  # the problem's number in its source
    prompt: str
    response: str
    reward: float | None
    base: str | None = None  # of a refinement: the solution it refines
    base_reward: float | None = None


def write_transcripts(path: Path, step: int, phase: str, samples: Iterable[Transcript]) -> None:
    """Append samples as JSON lines: ``step``, ``phase``, ``problem``, ``prompt``, ``response``, ``reward``, and for
    ``phase`` "refine" also ``base`` and ``base_reward``.

    `metrics.truncate_json_lines` drops what was written after a checkpoint. Raises UserError where the file cannot
    be written.
    """
    records = []
    for sample in samples:
        record: Record = {"step": step, "phase": phase, "problem": sample.problem, "prompt": sample.prompt}
        if phase == "refine":
            record |= {"base": sample.base, "base_reward": sample.base_reward}
        records.append(record | {"response": sample.response, "reward": sample.reward})
    append_json_lines(path, records)


def curve(records: Sequence[Record], name: str) -> Curve:
    """Steps and values of the metric ``name``, where it has one."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a twelfth of the points, fewer at the ends; under 24 points they stay."""
    half = len(values) // 24
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def evaluation_sets(records: Iterable[Record]) -> list[str]:
    """Names of the evaluation sets in the order they first appear, the average last."""
    names = dict.fromkeys(
        name.split("/")[1] for record in records if record["phase"] == "eval" for name in record if "/" in name
    )
    return sorted(names, key=lambda name: name == AVERAGE)


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draw a run as a PNG of 1500 x 675 pixels.

    Left: reward (SFT: loss) in training, faint as measured and strong as smoothed, and held-out accuracy before and
    after refinement. Right: fix-wrong ("rectify") over damage-correct ("fortify"). Several evaluation sets are shown
    by their average. Raises UserError where the file cannot be written.
    """
    trained_sft = any(record["phase"] == "sft" for record in records)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    if trained_sft:
        loss_axes = figure.add_subplot(grid[0, 0])
        _draw_training(loss_axes, records, "sft/loss", "sft", "")
        _finish(loss_axes, "Training loss", "nats a token")
        accuracy_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    else:
        accuracy_axes = figure.add_subplot(grid[:, 0])
    for phase in SAMPLED:
        _draw_training(accuracy_axes, records, f"{phase}/reward", phase, f"training reward, {phase}")
    sets = evaluation_sets(records)
    shown = sets[-1] if sets else ""
    label = f"{shown} of {len(sets) - 1} sets" if shown == AVERAGE else shown
    _draw_evaluation(accuracy_axes, records, f"eval/{shown}/solve_accuracy", "solve", f"{label}: solve accuracy")
    _draw_evaluation(accuracy_axes, records, f"eval/{shown}/refine_accuracy", "refine", f"{label}: after refinement")
    sampled = any(record["phase"] in POLICY for record in records)
    title = "Training reward and held-out accuracy" if sampled else "Held-out accuracy"
    _finish(accuracy_axes, title, "reward, accuracy" if sampled else "accuracy")
    low, high = accuracy_axes.dataLim.intervaly
    if low >= 0 and high <= 1:  # a reward of one's own may leave the range of accuracies
        accuracy_axes.set_ylim(0, 1.03)
    accuracy_axes.set_xlabel("step")

    rectify = figure.add_subplot(grid[0, 1], sharex=accuracy_axes)
    fortify = figure.add_subplot(grid[1, 1], sharex=accuracy_axes)
    _draw_share(rectify, records, f"eval/{shown}/fix_wrong", "Rectify: wrong solutions put right")
    _draw_share(fortify, records, f"eval/{shown}/damage_correct", "Fortify: right solutions spoiled")
    fortify.set_xlabel("step")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give a folder with room that can be written") from None


def _draw_training(axes: Axes, records: Sequence[Record], name: str, colour: str, label: str) -> None:
    steps, values = curve(records, name)
    if steps:
        axes.plot(steps, values, color=COLOURS[colour], alpha=0.25, linewidth=0.8)
        style = ".-" if len(steps) < 10 else "-"
        axes.plot(steps, smooth(values), style, color=COLOURS[colour], linewidth=1.8, label=label)


def _draw_evaluation(axes: Axes, records: Sequence[Record], name: str, colour: str, label: str) -> None:
    steps, values = curve(records, name)
    if steps:
        axes.plot(steps, values, "o--", color=COLOURS[colour], markersize=5, linewidth=1.2, label=label)


def _draw_share(axes: Axes, records: Sequence[Record], name: str, title: str) -> None:
    steps, values = curve(records, name)
    metric = name.rpartition("/")[2]
    if steps:
        axes.plot(steps, values, "o-", color=COLOURS[metric], markersize=4.5, linewidth=1.8)
        rises = values[-1] > values[0]
        for end, side, below in ((0, "left", rises), (len(steps) - 1, "right", False)):
            axes.annotate(
                f"{values[end]:.1%}",
                (steps[end], values[end]),
                (0, -14 if below else 7),
                textcoords="offset points",
                ha=side,
                fontsize=9,
            )
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#777777")
    _finish(axes, title, metric.replace("_", "-"))
    axes.set_ylim(0, 1.25 * max(values, default=0.8) or 0.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _finish(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(y_label)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.margins(x=0.03)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def summary(records: Sequence[Record], paths: Mapping[str, Path], predicted: int | None = None) -> str:
    """The text that ends a run: held-out figures before and after training, cost, and what was written where.

    Args:
        records: All records of the run; "before" is its first evaluation, "after" its last.
        paths: What was written, by what it is ("metrics": .../metrics.jsonl).
        predicted: Bytes of memory that each process was expected to hold at its peak.
    """
    blocks = [
        _evaluation_block(records),
        _cost_block(records, predicted),
        aligned([(what, str(p)) for what, p in paths.items()]),
    ]
    return "\n\n".join(block for block in blocks if block)


def _evaluation_block(records: Sequence[Record]) -> str:
    evaluations = [record for record in records if record["phase"] == "eval"]
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    shown = [last] if first is last else [first, last]
    head = ["held-out", *(f"step {record['step']}" for record in shown)]
    rows: list[tuple[str, ...]] = [(*head, "points") if len(shown) == 2 else tuple(head)]
    sets = evaluation_sets(evaluations)
    for name in sets:
        if len(sets) > 1:
            rows.append((name,) + ("",) * (len(rows[0]) - 1))
        for key, label in (*SUMMARY_ROWS, *_largest_pass_at_k(last, name)):
            values = [record.get(f"eval/{name}/{key}") for record in shown]
            if any(value is not None for value in values):
                rows.append((f"  {label}", *map(_percent, values), *_change(values)))
    return aligned(rows, numbers=True)


def _largest_pass_at_k(record: Record, name: str) -> list[tuple[str, str]]:
    prefix = f"eval/{name}/solve_pass@"
    counts = [int(key.removeprefix(prefix)) for key in record if key.startswith(prefix)]
    if not counts or max(counts) == 1:
        return []
    k = max(counts)
    return [(f"solve_pass@{k}", f"pass@{k}"), (f"refine_pass@{k}", f"pass@{k} after refinement")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _change(values: Sequence[float | None]) -> list[str]:
    if len(values) < 2:
        return []
    before, after = values
    return ["" if before is None or after is None else f"{100 * (after - before):+.1f}"]


def _cost_block(records: Sequence[Record], predicted: int | None) -> str:
    rows = []
    losses = curve(records, "sft/loss")[1]
    if losses:
        rows.append(("training loss", f"{losses[0]:.3f} -> {losses[-1]:.3f} nats a token"))
    generations = curve(records, "generations")[1]
    if generations and generations[-1]:
        rows.append(("sampled generations", f"{generations[-1]:,}"))
    seconds = curve(records, "elapsed_seconds")[1]
    if seconds:
        rows.append(("time", f"{clock(seconds[-1])} (h:mm:ss)"))
    peaks = curve(records, "peak_memory_bytes")[1]
    if peaks and predicted is not None:
        rows.append(("peak memory", f"{max(peaks) / _GIB:.2f} GiB a process ({predicted / _GIB:.2f} predicted)"))
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]], numbers: bool = False) -> str:
    """Rows as text in columns: the first to the left, the others to the right where they are ``numbers``."""
    if not rows:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if numbers and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
