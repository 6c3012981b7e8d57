"""Is a phrase learned that the policy never says by itself? ``python -m bench.unknown_behaviour``.

GRPO and ThinkTuning from one start, with one reward (examples/unknown_behaviour.py), one loss and as many generations.
The teacher is the frozen initial policy, which reads the phrase in its examples. Writes a table and a chart; what is
finished is not done again.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench import ROOT
from bench.algorithms import runs, spread, train
from bench.core.charts import draw_runs, finish
from bench.core.report import markdown
from bench.reflecting_model import VARIANT, write_examples, write_start
from bench.runs import Options, Run, train_all
from thinktwice_fast.algorithms.thinktuning.prompt import load_prompt
from thinktwice_fast.run.report import curve

_EXAMPLE = "examples/unknown_behaviour"
_SEEDS, _STEPS, _WARM_UP_STEPS = 3, 150, 250
_WARM_UP_BATCH = 64
_SOURCE = f"arithmetic:{VARIANT}"
_SETS = {"phrase": f"{_EXAMPLE}.py:phrase", "solved": "math"}  # by their rewards
_COLOURS = {"grpo": "#2f6fb7", "thinktuning": "#d9772b"}
_LOSS: Options = {  # ThinkTuning's, for both
    "loss.scale_rewards": "group",
    "loss.epsilon_high": 0.2,
    "loss.dual_clip": 3.0,
    "loss.beta": 0.0,
    "loss.loss_agg_mode": "token-mean",
}
_ABOUT = """\
# An unknown behaviour

Made by `make unknown-behaviour`, never by hand. A right answer is worth 1, and the phrase `===`, said exactly once, 0.5
more, right or wrong. The policy never says it; the examples that its teacher reads contain it. The teacher is the
frozen initial policy, which has learned to speak in tags and to take up whatever phrase its examples have
([bench/reflecting_model.py](../bench/reflecting_model.py)): this one is none of those it learned with. Both algorithms
start from that policy, and have the same reward, loss and number of generations.

Shares of 200 held-out problems, one answer each at temperature 1 and without a teacher; mean over {seeds} seeds (sample
standard deviation).

{table}

![Share of answers with the phrase, and share of right ones, over training](unknown_behaviour.png)
"""


def warm_start(folder: Path, steps: int) -> Run:
    """The run that makes the policy that both start from; writes what it reads."""
    start, examples = folder / "untrained", folder / "examples.jsonl"
    write_start(start)
    write_examples(examples, load_prompt(str(ROOT / f"{_EXAMPLE}.yaml")), steps * _WARM_UP_BATCH)
    options: Options = {
        "algorithm": "sft",
        "problems_per_step": _WARM_UP_BATCH,
        "model.path": str(start),
        "data.source": str(examples),
        "data.target_column": "target",
        "sft.refine_fraction": 0.0,
        "eval.sets": "{}",
        "rollout.max_prompt_tokens": 256,
        "update.learning_rate": 1e-3,
        "update.lr_schedule": "linear",
        "run.steps": steps,
        "run.checkpoint_every": 50,
    }
    return Run(folder / "start", options)


def arms(model: Path, steps: int, eval_every: int) -> dict[str, Options]:
    """Options of the two algorithms."""
    sets = ", ".join(f"{name}: {{source: '{_SOURCE}', reward: '{reward}'}}" for name, reward in _SETS.items())
    both: Options = {
        "model.path": str(model),
        "reward": f"{_EXAMPLE}.py:right_and_phrase",
        "data.source": _SOURCE,
        "eval.sets": f"{{{sets}}}",
        "eval.temperature": 1.0,
        "eval.limit": 200,
        "eval.every": eval_every,
        "rollout.max_response_tokens": 96,  # room for two reflections
        "run.steps": steps,
        "update.minibatch_sequences": 0,
        **_LOSS,
    }
    teacher: Options = {
        "thinktuning.teacher": "frozen",
        "thinktuning.shots": f"{_EXAMPLE}.yaml",
        "thinktuning.teacher_answer_tokens": 40,
        "thinktuning.fraction": 0.5,
        "thinktuning.min_fraction": 0.25,
        "thinktuning.decay_steps": steps * 4 // 5,
        "thinktuning.cutoff": 0.3,  # after two thirds of the run: what was found has to live on without a teacher
    }
    return {"grpo": {"algorithm": "grpo", **both}, "thinktuning": {"algorithm": "thinktuning", **both, **teacher}}


def document(found: Mapping[str, Sequence[Run]]) -> str:
    """The table, with its text."""
    head = ["algorithm", "generations", "teacher answers", "phrase, start", "phrase, end", "right, start", "right, end"]
    table = markdown(head, [_row(name, arm) for name, arm in found.items()])
    return _ABOUT.format(table=table, seeds=len(next(iter(found.values()))))


def _row(name: str, arm: Sequence[Run]) -> list[str]:
    last = [curve(run.records(), "generations")[1][-1] for run in arm]
    asked = [max(curve(run.records(), "solve/teacher_answers")[1], default=0.0) for run in arm]
    cells = [f"`{name}`", spread(last, 0), spread(asked, 0)]
    for which in _SETS:
        curves = [_shares(run, which) for run in arm]
        cells += [spread([100 * shares[place] for shares in curves]) + " %" for place in (0, -1)]
    return cells


def _shares(run: Run, which: str) -> list[float]:
    return curve(run.records(), f"eval/{which}/solve_accuracy")[1]


def draw(found: Mapping[str, Sequence[Run]], path: Path) -> None:
    """A chart of both shares over training: a faint line for each run, a strong one for their mean."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, which, title in zip(
        figure.subplots(1, 2), _SETS, ("Says the phrase exactly once", "Right answer"), strict=True
    ):
        for name, arm in found.items():
            steps = curve(arm[0].records(), f"eval/{which}/solve_accuracy")[0]
            shares = np.array([_shares(run, which) for run in arm])
            lines = [(steps, one) for one in shares]
            draw_runs(axes, lines, (steps, shares.mean(0)), colour=_COLOURS[name], label=name)
        axes.set_ylim(-0.02, 1.02)
        finish(axes, title, "step")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.unknown_behaviour", description=__doc__)
    parser.add_argument("--seeds", type=int, default=_SEEDS, help=f"of each algorithm; default {_SEEDS}")
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"of a run; default {_STEPS}")
    parser.add_argument("--warm-up-steps", type=int, default=_WARM_UP_STEPS, help=f"default {_WARM_UP_STEPS}")
    parser.add_argument("--eval-every", type=int, default=10, help="steps; default 10")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "unknown_behaviour", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of table and chart")
    options = parser.parse_args(arguments)
    start = warm_start(options.work, options.warm_up_steps)
    train_all([start])
    found = runs(options.work, arms(start.folder / "model", options.steps, options.eval_every), range(options.seeds))
    train(found)
    (options.output / "unknown_behaviour.md").write_text(document(found))
    draw(found, options.output / "unknown_behaviour.png")
    print(f"written: {options.output / 'unknown_behaviour.md'} and its chart")


if __name__ == "__main__":
    main()
