"""What the charts of trainings share."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes


def draw_runs(
    axes: Axes, runs: Sequence[tuple[Any, Any]], mean: tuple[Any, Any], *, colour: str, label: str, marker: str = "o"
) -> None:
    """A faint line for each run and a strong one for their mean, each given as its places and values."""
    for places, values in runs:
        axes.plot(places, values, color=colour, alpha=0.3, linewidth=0.9)
    axes.plot(*mean, f"{marker}-", color=colour, markersize=4.5, linewidth=1.8, label=label)


def finish(axes: Axes, title: str, x_label: str) -> None:
    """Title, label of the places, grid and legend."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
