"""ThinkTwice on a real instruct model, SmolLM2-135M-Instruct, on two CPU cores: ``python -m bench.real``.

``make real``. A short supervised warm-up on worked solutions and rechecks, then ThinkTwice on word problems that the
model half knows (examples/word_problems.py). Writes its section of docs/results.md, and docs/results_real.png; what is
finished is not done again, and a run that was stopped goes on.
"""

import argparse
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench import ROOT
from bench.core.charts import draw_runs, finish
from bench.core.report import markdown
from bench.instruct_model import missing, write_instruct_model
from bench.results_document import RESULTS, write_section
from bench.runs import Options, Run, train_all
from examples.word_problems import write
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.options import from_yaml
from thinktwice_fast.run.report import COLOURS, curve, smooth

MODEL, PROBLEMS = ROOT / "build" / "real" / "model", ROOT / "build" / "real" / "problems"
"""Where configs/smollm2-135m*.yaml read the model and its problems from."""

CHART = "results_real.png"
_WARM_UP, _TRAINING = "configs/smollm2-135m-warm-up.yaml", "configs/smollm2-135m.yaml"
_THREADS = 2  # of one run at a time
_WINDOW = 15  # steps of a phase, the first and the last so many
_PHASES = {"solve": "solutions", "refine": "refinements"}
EVALUATED = {
    "right": "solve_accuracy",
    "pass@8": "solve_pass@8",
    "right after refinement": "refine_accuracy",
    "fix-wrong": "fix_wrong",
    "damage-correct": "damage_correct",
}
_ABOUT = """\
## A real instruct model

`make real`: SmolLM2-135M-Instruct on generated word problems of one and two steps
([examples/word_problems.py](../examples/word_problems.py)), on two CPU cores: {warm_up_steps} steps of supervised
warm-up, then {steps} steps of ThinkTwice with {samples} samples each, {minutes:.0f} minutes in all. The options:

{options}

![Reward of every step, and held-out accuracy](results_real.png)

Mean reward of the first {window} and the last {window} steps of each phase, ± its standard error over steps:

{rewards}

Held-out problems ({problems}, whose calculations are never trained on), {answers} solutions of each at temperature
{temperature:g} and a greedy refinement of each solution, in percent:

{evaluations}

The whole of it on one GPU, {gpu_steps} steps of ThinkTwice, from a clean clone:

{commands}
"""


class Rise(NamedTuple):
    """Rewards of a phase's first steps and of its last ones: means, with standard errors over steps."""

    first: float
    first_error: float
    last: float
    last_error: float

    @classmethod
    def of(cls, rewards: Sequence[float]) -> "Rise":
        """Of the rewards of all steps of a phase, at least two."""
        count = _window(rewards)
        ends = (rewards[:count], rewards[-count:])
        first, last = ((statistics.mean(end), _standard_error(end)) for end in ends)
        return cls(*first, *last)

    @property
    def in_errors(self) -> float:
        """The difference in its standard errors."""
        error = math.hypot(self.first_error, self.last_error)
        difference = self.last - self.first
        if error:
            return difference / error
        return math.copysign(math.inf, difference) if difference else 0.0


def _window(rewards: Sequence[float]) -> int:
    """Steps that are first or last ones of a phase, of which a short one has fewer."""
    return min(_WINDOW, len(rewards) // 2)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def plan(folder: Path, warm_up: Options, training: Options) -> tuple[Run, Run]:
    """The two runs, of the configurations with fewer steps for two cores."""
    first = Run(folder / "warm-up", {"config": _WARM_UP, **warm_up}, _THREADS)
    own: Options = {"config": _TRAINING, "model.path": str(first.folder / "model")}
    return first, Run(folder / "thinktwice", {**own, **training}, _THREADS)


def document(warm_up: Run, run: Run) -> str:
    """The section: every table and sentence."""
    records, before = run.records(), warm_up.records()
    config, of_phase = from_yaml(ROOT / _TRAINING), {phase: curve(records, f"{phase}/reward")[1] for phase in _PHASES}
    rewards = []
    for phase, what in _PHASES.items():
        rise = Rise.of(of_phase[phase])
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in (rise[:2], rise[2:])]
        rewards.append([what, *cells, f"{rise.in_errors:+.1f}", "yes" if rise.in_errors >= 2 else "no"])
    stages = {
        "as it comes": _evaluations(before)[0],
        "after the warm-up": _evaluations(records)[0],
        "after ThinkTwice": _evaluations(records)[-1],
    }
    steps = [record for record in records if record["phase"] in _PHASES]
    return _ABOUT.format(
        warm_up_steps=max(record["step"] for record in before),
        steps=len(steps),
        samples=steps[-1]["generations"] // len(steps),
        minutes=(_seconds(before) + _seconds(records)) / 60,
        options="\n".join(_options_line(*one) for one in (("warm-up", warm_up), ("ThinkTwice", run))),
        window=max(_window(one) for one in of_phase.values()),
        rewards=markdown(["phase", "first", "last", "difference in standard errors", "above 2"], rewards),
        problems=run.options["eval.limit"],
        answers=config.eval.samples,
        temperature=config.eval.temperature,
        gpu_steps=config.run.steps,
        commands=commands(),
        evaluations=markdown(["model", *EVALUATED], [[name, *_percent(one)] for name, one in stages.items()]),
    )


def _options_line(what: str, run: Run) -> str:
    """Which configuration a run has, and what is given beside it."""
    given = " ".join(
        f"`--{name} {value}`" for name, value in run.options.items() if name not in ("config", "model.path")
    )
    file = run.options["config"]
    return f"- {what}: [{file}](../{file}) with {given}"


def commands() -> str:
    """A code block: how both configurations are run on one GPU, as the head of the second says."""
    head = (ROOT / _TRAINING).read_text().partition("\noutput:")[0]
    return "\n".join(["```", *re.findall(r"^#   (.*)", head, re.MULTILINE), "```"])


def _evaluations(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["phase"] == "eval"]


def _percent(evaluation: Record) -> list[str]:
    values = [evaluation.get(f"eval/held_out/{metric}") for metric in EVALUATED.values()]
    return ["-" if value is None else f"{100 * value:.1f}" for value in values]


def _seconds(records: Sequence[Record]) -> float:
    return max(curve(records, "elapsed_seconds")[1])


def draw(records: Sequence[Record], path: Path) -> None:
    """A chart: the reward of each phase, faint by step and strong as smoothed, and the held-out accuracies."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rewards, held_out = figure.subplots(1, 2)
    for phase, what in _PHASES.items():
        steps, values = curve(records, f"{phase}/reward")
        draw_runs(rewards, [(steps, values)], (steps, smooth(values)), colour=COLOURS[phase], label=what, marker="")
        line = curve(records, f"eval/held_out/{phase}_accuracy")
        draw_runs(held_out, [], line, colour=COLOURS[phase], label=what)
    for axes, title in ((rewards, "Reward in training"), (held_out, "Held-out problems: right")):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        finish(axes, title, "step")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__)
    parser.add_argument("--warm-up-steps", type=int, default=64, help="default 64")
    parser.add_argument("--steps", type=int, default=96, help="of ThinkTwice; default 96")
    parser.add_argument("--problems", type=int, default=64, help="held-out ones of an evaluation; default 64")
    parser.add_argument("--model", type=Path, default=MODEL, help="its folder; written where there is none")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "real", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the document")
    parser.add_argument("--prepare", action="store_true", help="write the model and the problems, and stop")
    options = parser.parse_args(arguments)
    write(PROBLEMS)
    if not (options.model / "tokenizer_config.json").exists():  # written last
        if reason := missing():
            parser.error(reason)
        write_instruct_model(options.model)
    if options.prepare:
        return
    sizes: Options = {"eval.limit": options.problems, "run.checkpoint_every": 10}
    warm_up, run = plan(
        options.work,
        {**sizes, "model.path": str(options.model), "run.steps": options.warm_up_steps},
        {**sizes, "run.steps": options.steps, "eval.every": 32},
    )
    for one in (warm_up, run):
        train_all([one], side_by_side=1)
    write_section(options.output / RESULTS, "real", document(warm_up, run))
    draw(run.records(), options.output / CHART)
    print(f"written: {options.output / RESULTS} and its chart")


if __name__ == "__main__":
    main()
