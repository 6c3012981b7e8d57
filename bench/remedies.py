"""Two remedies for what ThinkTwice lacks, each with its predictions: ``python -m bench.remedies``.

``make compare-remedies``, after ``make compare``, whose runs it goes on from. The predictions below were written before
any of these runs. Writes its section of docs/results.md; what is finished is not done again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.algorithms import runs, train
from bench.compare import (
    GRPO,
    JOINT,
    SEQUENTIAL,
    causes_of,
    causes_table,
    command_line,
    compared,
    curves_of,
    differences_table,
    figures_table,
    options_table,
    verdict,
)
from bench.core.report import markdown
from bench.curves import GENERATIONS, Arms, difference, reached
from bench.results_document import RESULTS, write_section
from bench.runs import Options, Run

_MINI, _RARER, _CONTROL = "joint, 4 mini-batches", "a refine step to 2 solve steps", "grpo, 2 mini-batches"


@dataclass(frozen=True)
class Prediction:
    """A figure's difference from another arm's at equal generations, in points."""

    arm: str
    figure: str
    other: str
    least: float | None = None
    most: float | None = None

    def words(self) -> str:
        """What is predicted."""
        ends = {"at least": self.least, "at most": self.most}
        bounds = [f"{words} {end:+g}" if end else f"{words} 0" for words, end in ends.items() if end is not None]
        return f"{self.figure}, less that of `{self.other}`: {' and '.join(bounds)}"

    def came_true(self, points: float) -> bool:
        """Whether the difference was as predicted."""
        return (self.least is None or points >= self.least) and (self.most is None or points <= self.most)


@dataclass(frozen=True)
class Remedy:
    """A change of an arm that may help it."""

    of: str  # the arm that it changes
    options: Options  # what is changed
    why: str


REMEDIES = {
    _MINI: Remedy(
        JOINT,
        {"update.minibatch_sequences": 128},
        "A joint pair takes one optimizer step for 512 samples. Four, each on eight whole pairs of groups, are twice "
        "as many as sequential pairs take for the same samples. The control is GRPO with as many optimizer steps.",
    ),
    _RARER: Remedy(
        SEQUENTIAL,
        {"thinktwice.refine_every": 2},
        "Refining comes near its ceiling before solving does; with one refine step to two solve steps, two thirds of "
        "the generations are solutions instead of half.",
    ),
}
PREDICTIONS = (
    Prediction(_MINI, "solve", JOINT, least=3),
    Prediction(_MINI, "after refinement", JOINT, least=-0.5),
    Prediction(_MINI, "solve", _CONTROL, most=0),
    Prediction(_RARER, "solve", SEQUENTIAL, least=1),
    Prediction(_RARER, "after refinement", SEQUENTIAL, least=-1),
)
_ABOUT = """\
## Two remedies

`make compare-remedies` (seeds: {seeds}), after `make compare` and with its runs, start and evaluation. What is
predicted stands in [bench/remedies.py](../bench/remedies.py), where it was written before the runs.

{reasons}

{options}

Predicted differences in points, and what was found at {generations:,.0f} generations (mean and 95 % interval over
seeds, seed by seed):

{predictions}

Held-out figures at {generations:,.0f} generations, in percent:

{figures}

Less `grpo`, in points; **bold** where the interval leaves 0 out:

{differences}

What each learned from:

{causes}

{conclusions}
"""


def with_remedies(steps: int) -> dict[str, Options]:
    """Options of the arms that are changed, of the remedies, and of GRPO with a control of it."""
    arms = {name: options for name, options in compared(steps).items() if name in (SEQUENTIAL, JOINT, GRPO)}
    changed = {name: {**arms[remedy.of], **remedy.options} for name, remedy in REMEDIES.items()}
    return {**arms, **changed, _CONTROL: {**arms[GRPO], "update.minibatch_sequences": 128}}


def document(arms: Mapping[str, Sequence[Run]], curves: Arms) -> str:
    """The section: every table and sentence."""
    generations = reached(curves, GENERATIONS)
    return _ABOUT.format(
        seeds=len(curves[GRPO]),
        generations=generations,
        reasons="\n".join(f"- **{name}** (of `{remedy.of}`). {remedy.why}" for name, remedy in REMEDIES.items()),
        options=options_table({name: arm[0].options for name, arm in arms.items()}),
        predictions=_predictions_table(curves, generations),
        figures=figures_table(curves, generations),
        differences=differences_table(curves, GENERATIONS, generations),
        causes=causes_table(causes_of(arms, curves, generations)),
        conclusions="\n".join(_conclusion(curves, name, generations) for name in REMEDIES),
    )


def _predictions_table(curves: Arms, generations: float) -> str:
    rows = []
    for one in PREDICTIONS:
        found = difference(curves[one.arm], curves[one.other], GENERATIONS, generations, one.figure)
        came_true = "yes" if one.came_true(100 * found.mean) else "no"
        rows.append([one.arm, one.words(), found.points(signed=True), came_true])
    return markdown(["arm", "predicted", "found", "came true, by the mean"], rows)


def _conclusion(curves: Arms, name: str, generations: float) -> str:
    """Whether a remedy helped: ahead of what it changes in solving, and behind it in neither accuracy."""
    remedy = REMEDIES[name]
    found = {
        figure: difference(curves[name], curves[remedy.of], GENERATIONS, generations, figure)
        for figure in ("solve", "after refinement")
    }
    verdicts = {figure: verdict(one, figure) for figure, one in found.items()}
    option = " ".join(f"`--{key} {value}`" for key, value in remedy.options.items())
    if "behind" in verdicts.values():
        said = "it costs more than it brings"
        if "ahead" in verdicts.values():
            said = "it brings one and costs the other"
    else:
        said = "it helped" if "ahead" in verdicts.values() else "no difference shows"
    accuracies = ", ".join(f"{figure} {one.points(signed=True)}" for figure, one in found.items())
    return f"- {option} beside `{remedy.of}`: {said} ({accuracies} points)."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = command_line("python -m bench.remedies", __doc__, arguments)
    arms = runs(options.work, with_remedies(options.steps), range(options.seeds))
    train(arms)
    write_section(options.output / RESULTS, "remedies", document(arms, curves_of(arms)))
    print(f"written: {options.output / RESULTS}")


if __name__ == "__main__":
    main()
