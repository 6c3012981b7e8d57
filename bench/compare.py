"""ThinkTwice beside GRPO, Dr.GRPO and DAPO at equal generations: ``python -m bench.compare`` (``make compare``).

All from the shipped model, on the default task, so many seeds of each. Writes its section of docs/results.md, and
docs/results.png; what is finished is not done again.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench import ROOT
from bench.algorithms import runs, train
from bench.core.charts import draw_runs, finish
from bench.core.report import markdown
from bench.curves import (
    AXES,
    FALLING,
    FIGURES,
    GENERATIONS,
    MOST_SEEDS,
    SECONDS,
    SOLVE_UPDATES,
    Arms,
    Curves,
    Interval,
    difference,
    interval,
    reached,
    read_off,
)
from bench.models import set_options
from bench.results_document import RESULTS, write_section
from bench.runs import Options, Run
from thinktwice_fast.config import Config, LossOptions, optimizer_steps_per_step
from thinktwice_fast.run.metrics import POLICY, Record
from thinktwice_fast.run.options import published_loss

_SEEDS, _STEPS = 5, 200
SEQUENTIAL, JOINT, GRPO = "thinktwice", "thinktwice, joint", "grpo"
_EVALUATIONS = 10  # of a run, beside the first
_LOOKS: Mapping[str, tuple[str, str]] = {  # colours that differ to colour-blind eyes as well, and markers
    SEQUENTIAL: ("#d55e00", "o"),
    JOINT: ("#e69f00", "s"),
    GRPO: ("#0072b2", "^"),
    "dr_grpo": ("#009e73", "v"),
    "dapo": ("#a3538a", "D"),
}
_ABOUT = """\
## Methods at equal generations

`make compare` (seeds: {seeds}): every run starts from the shipped model and has the default job's options, but for
those of this table: one optimizer step a phase, so that updates are counted alike. The `grpo` arm is ThinkTwice's own
loss without refine steps; `dr_grpo` and `dapo` have their published losses.

{options}

The held-out figures are of 400 problems, 4 solutions of each sampled as the paper does (temperature 0.7, top-p 0.8,
top-k 20), and one greedy refinement of each solution; in percent. `±` is the half width of the 95 % interval over
seeds (Student's t). Methods draw different numbers of samples a step, so figures are read off the curves, on the
straight line between two evaluations.

![Held-out accuracy of solutions and after one refinement, over generations](results.png)

### At {generations:,.0f} generations

{figures}

### Less `grpo`, in points

Seed by seed; **bold** where the interval leaves 0 out. At {generations:,.0f} generations:

{at_generations}

At {solve_updates:,.0f} solve updates, that is, steps that learned from solutions:

{at_solve_updates}

At {seconds:,.0f} seconds of training steps (one thread, two runs side by side; evaluations not counted):

{at_seconds}

### Why

Up to {generations:,.0f} generations, mean over seeds; a group has a signal if its rewards differ, and a fifth is one of
the run's length.

{causes}

{findings}
"""


def compared(steps: int) -> dict[str, Options]:
    """Each arm's options, for at least as many generations as ``steps`` sequential steps draw."""
    ours = asdict(LossOptions())
    own_loss: Options = {
        f"loss.{name}": ours[name] for name, value in published_loss("grpo").items() if value != ours[name]
    }
    return {
        SEQUENTIAL: _options("thinktwice", steps),
        JOINT: {**_options("thinktwice", steps // 2), "thinktwice.pairing": "joint"},
        GRPO: {**_options("grpo", steps), **own_loss},
        "dr_grpo": _options("dr_grpo", steps),
        "dapo": _options("dapo", steps * 7 // 8),  # a fifth more a step, for groups without signal
    }


def _options(algorithm: str, steps: int) -> dict[str, str | int | float]:
    return {
        "algorithm": algorithm,
        "run.steps": steps,
        "update.minibatch_sequences": 0,
        "eval.every": steps // _EVALUATIONS,
        "eval.samples": 4,
        "eval.temperature": 0.7,
        "eval.top_p": 0.8,
        "eval.top_k": 20,
        "track": "none",
    }


def document(arms: Mapping[str, Sequence[Run]], curves: Arms) -> str:
    """The section: every table and sentence."""
    at = {axis: reached(curves, axis) for axis in AXES}
    causes = causes_of(arms, curves, at[GENERATIONS])
    return _ABOUT.format(
        seeds=len(curves[GRPO]),
        generations=at[GENERATIONS],
        solve_updates=at[SOLVE_UPDATES],
        seconds=at[SECONDS],
        options=options_table({name: arm[0].options for name, arm in arms.items()}),
        figures=figures_table(curves, at[GENERATIONS]),
        at_generations=differences_table(curves, GENERATIONS, at[GENERATIONS]),
        at_solve_updates=differences_table(curves, SOLVE_UPDATES, at[SOLVE_UPDATES]),
        at_seconds=differences_table(curves, SECONDS, at[SECONDS]),
        causes=causes_table(causes),
        findings="\n".join(findings(curves, causes, name, at) for name in (SEQUENTIAL, JOINT)),
    )


def options_table(arms: Mapping[str, Options]) -> str:
    """Which options each arm has beside a seed; those of every arm stand in its last row."""
    arms = {name: {key: options[key] for key in options if key != "seed"} for name, options in arms.items()}
    first, *others = arms.values()
    shared = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    own = {name: {key: options[key] for key in options if key not in shared} for name, options in arms.items()}
    rows = [(name, " ".join(f"`--{key} {value}`" for key, value in part.items())) for name, part in own.items()]
    every = " ".join(f"`--{key} {value}`" for key, value in shared.items())
    return markdown(["arm", "options"], [*rows, ("every arm", every)])


def figures_table(arms: Arms, generations: float) -> str:
    """Held-out figures of each arm at so many generations, and of the start."""
    everyone = next(iter(arms.values()))
    start = ["start", *(read_off(everyone, GENERATIONS, 0, figure).points() for figure in FIGURES)]
    rows = [
        [name, *(read_off(arm, GENERATIONS, generations, figure).points() for figure in FIGURES)]
        for name, arm in arms.items()
    ]
    return markdown(["arm", *FIGURES], [start, *rows])


def differences_table(arms: Arms, axis: str, place: float) -> str:
    """Figures of each other arm less GRPO's at a place of an axis."""
    rows = [
        [name, *(_bold(difference(arm, arms[GRPO], axis, place, figure)) for figure in FIGURES)]
        for name, arm in arms.items()
        if name != GRPO
    ]
    return markdown(["arm", *FIGURES], rows)


def _bold(found: Interval) -> str:
    text = found.points(signed=True)
    return f"**{text}**" if found.above or found.below else text


class Causes(NamedTuple):
    """What a run learned from, up to some number of generations; shares of groups are None where it has no such."""

    optimizer_steps: int
    solve_updates: int
    refining: float  # share of the generations
    solve_signal: tuple[float | None, float | None]  # share of groups with one, in the first and the last fifth
    refine_signal: tuple[float | None, float | None]
    refine_reward: float | None  # in the last fifth
    seconds: float

    @classmethod
    def of(cls, curves: Curves, minibatches: int, generations: float) -> "Causes":
        """Of a finished run, whose steps have so many mini-batches."""
        steps = [
            record for record in curves.records if record["phase"] in POLICY and record["generations"] <= generations
        ]
        count = max(2, len(steps) // 5)  # a solve and a refine step at least
        first, last = steps[:count], steps[-count:]
        solved = sum("solve/reward" in record for record in steps)
        refined = sum("refine/reward" in record for record in steps)
        solve_signal, refine_signal = (
            (_mean(first, f"{phase}/group_signal_rate"), _mean(last, f"{phase}/group_signal_rate"))
            for phase in ("solve", "refine")
        )
        return cls(
            minibatches * len(steps),
            solved,
            refined / (solved + refined),
            solve_signal,
            refine_signal,
            _mean(last, "refine/reward"),
            sum(record[f"{record['phase']}/seconds_step"] for record in steps),
        )


def _mean(records: Sequence[Record], metric: str) -> float | None:
    values = [record[metric] for record in records if record.get(metric) is not None]
    return statistics.mean(values) if values else None


def causes_of(arms: Mapping[str, Sequence[Run]], curves: Arms, generations: float) -> dict[str, list[Causes]]:
    """Of every run of every arm."""
    return {
        name: [Causes.of(one, minibatches, generations) for one in curves[name]]
        for name, minibatches in ((name, _minibatches(arm[0].options)) for name, arm in arms.items())
    }


def _minibatches(options: Options) -> int:
    """Of a step, the other options being the default job's."""
    config = Config()
    set_options(config, options)
    return optimizer_steps_per_step(config)


def causes_table(causes: Mapping[str, Sequence[Causes]]) -> str:
    """What each arm learned from, mean over seeds."""
    head = ["arm", "optimizer steps", "solve updates", "refinements, of the generations"]
    head += [f"{phase} groups with a signal, first and last fifth" for phase in ("solve", "refine")]
    rows = []
    for name, found in causes.items():
        counts = [f"{statistics.mean(one):,.0f}" for one in zip(*[part[:2] for part in found], strict=True)]
        signals = [
            " → ".join(_share(fifth) for fifth in zip(*signal, strict=True) if None not in fifth) or "-"
            for signal in ([part.solve_signal for part in found], [part.refine_signal for part in found])
        ]
        right = _share([part.refine_reward for part in found])
        seconds = f"{statistics.mean([part.seconds for part in found]):,.0f}"
        rows.append([name, *counts, _share([part.refining for part in found]), *signals, right, seconds])
    return markdown([*head, "refinements right, last fifth", "seconds of steps"], rows)


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * statistics.mean(known):.0f} %" if known else "-"


def verdict(found: Interval, figure: str) -> str:
    """Whether a difference of a figure is in favour: "ahead" or "behind" where the interval leaves 0 out."""
    better, worse = (found.below, found.above) if figure in FALLING else (found.above, found.below)
    return "ahead" if better else "behind" if worse else "level"


def findings(curves: Arms, causes: Mapping[str, Sequence[Causes]], name: str, at: Mapping[str, float]) -> str:
    """In sentences: where an arm of ThinkTwice is ahead of GRPO, and where not, what the curves say about why."""
    arm, grpo = curves[name], curves[GRPO]
    differences = {figure: difference(arm, grpo, GENERATIONS, at[GENERATIONS], figure) for figure in FIGURES}
    words = {"ahead": "ahead of `grpo` in", "behind": "behind `grpo` in", "level": "no difference shows in"}
    said = []
    for kind, beginning in words.items():
        those = [f for f, found in differences.items() if verdict(found, f) == kind]
        if those:
            listed = ", ".join(f"{f} ({differences[f].points(signed=True)})" for f in those)
            said.append(f"{beginning} {listed}")
    sentences = [f"- **`{name}`** at equal generations: {'; '.join(said)}."]
    if verdict(differences["solve"], "solve") != "ahead":
        sentences.append(_why_not_ahead(curves, causes, name, at))
    sentences.append(_saturation(arm, causes[name], at[GENERATIONS]))
    return " ".join(sentences)


def _why_not_ahead(curves: Arms, causes: Mapping[str, Sequence[Causes]], name: str, at: Mapping[str, float]) -> str:
    """Is it the number of solve updates?"""
    own, others = (statistics.mean(one.solve_updates for one in causes[arm]) for arm in (name, GRPO))
    found = difference(curves[name], curves[GRPO], SOLVE_UPDATES, at[SOLVE_UPDATES], "solve")
    conclusion = {
        "ahead": "each, with a refine update beside it, brought more than one of `grpo`'s; there are too few of them",
        "level": "their smaller number can account for it",
        "behind": "their smaller number does not account for all of it",
    }[verdict(found, "solve")]
    same = f"{at[SOLVE_UPDATES]:,.0f}"
    return (
        f"It is not ahead in solving: {own:,.0f} of its updates learned from solutions, {others:,.0f} of `grpo`'s. "
        f"After {same} of them each the difference is {found.points(signed=True)} points: {conclusion}."
    )


def _saturation(arm: Sequence[Curves], causes: Sequence[Causes], generations: float) -> str:
    """Does refining still learn when the run ends, and from as much as solving does?"""
    late = {
        figure: interval(
            [one.at(GENERATIONS, generations, figure) - one.at(GENERATIONS, generations / 2, figure) for one in arm]
        )
        for figure in ("solve", "after refinement")
    }
    solve, refine = (
        statistics.mean(signal[1] or 0.0 for signal in signals)
        for signals in ([one.solve_signal for one in causes], [one.refine_signal for one in causes])
    )
    conclusion = (
        "refining is the nearer to its ceiling, and more of its generations teach nothing"
        if refine < solve
        else "refining is no nearer to its ceiling than solving"
    )
    return (
        f"In the last fifth {100 * refine:.0f} % of the refine groups and {100 * solve:.0f} % of the solve groups had "
        f"a signal: {conclusion}. Over the second half accuracy after refinement changed by "
        f"{late['after refinement'].points(signed=True)} points, solve accuracy by {late['solve'].points(signed=True)}."
    )


def draw(arms: Arms, path: Path) -> None:
    """A chart of both accuracies over generations: a faint line for each run, a strong one for their mean."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    places = np.linspace(0, reached(arms, GENERATIONS), _EVALUATIONS + 1)
    titles = {"solve": "Solutions that are right", "after refinement": "Right after one refinement"}
    for axes, (which, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, arm in arms.items():
            colour, marker = _LOOKS[name]
            lines = [(places, np.array([one.at(GENERATIONS, place, which) for place in places])) for one in arm]
            mean = np.mean([values for _, values in lines], axis=0)
            draw_runs(axes, lines, (places, mean), colour=colour, label=name, marker=marker)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("of held-out answers")
        finish(axes, title, "generations")
        axes.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    figure.savefig(path, dpi=120)


def command_line(program: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """``seeds``, ``steps``, ``work`` and ``output`` of a comparison's command."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, MOST_SEEDS + 1),
        metavar="N",
        default=_SEEDS,
        help=f"of each arm, at most {MOST_SEEDS}; default {_SEEDS}",
    )
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"of a sequential run; default {_STEPS}")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "compare", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the document")
    return parser.parse_args(arguments)


def curves_of(arms: Mapping[str, Sequence[Run]]) -> Arms:
    """Of finished runs."""
    return {name: [Curves.of(run) for run in arm] for name, arm in arms.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = command_line("python -m bench.compare", __doc__, arguments)
    arms = runs(options.work, compared(options.steps), range(options.seeds))
    train(arms)
    curves = curves_of(arms)
    write_section(options.output / RESULTS, "compare", document(arms, curves))
    draw(curves, options.output / "results.png")
    print(f"written: {options.output / RESULTS} and its chart")


if __name__ == "__main__":
    main()
