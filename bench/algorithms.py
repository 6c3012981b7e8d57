"""Every algorithm on the default task, so many seeds of each: ``python -m bench.algorithms`` (``make algorithms``).

Writes docs/algorithms.md. What is finished is not done again; seeds go across the algorithms, so that what there is
after fewer of them is complete as well.
"""

import argparse
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench import ROOT
from bench.core.report import markdown
from bench.runs import Options, Run, train_all

STEPS = 100
_REINFORCED: Options = {"run.steps": STEPS, "update.minibatch_sequences": 0}
ARMS: dict[str, Options] = {
    "thinktwice": {"algorithm": "thinktwice", **_REINFORCED},
    "thinktwice, joint": {
        "algorithm": "thinktwice",
        **_REINFORCED,
        "thinktwice.pairing": "joint",
        "run.steps": STEPS // 2,
    },
    "grpo": {"algorithm": "grpo", **_REINFORCED},
    "dr_grpo": {"algorithm": "dr_grpo", **_REINFORCED},
    "dapo": {"algorithm": "dapo", **_REINFORCED},
    "star": {"algorithm": "star", "run.steps": 120},  # two iterations: sampling 2 x 16, fine-tuning 40 + 48
    "thinktuning": {
        "algorithm": "thinktuning",
        "thinktuning.teacher": "examples/arithmetic_teacher.py:teach",
        **_REINFORCED,
    },
}
"""Name by name what an arm's runs have beside the defaults and a seed. About as many generations each, but for STaR."""

_EVALUATED = {"solve": "eval/held_out/solve_accuracy", "after refinement": "eval/held_out/refine_accuracy"}
_ABOUT = """\
# Algorithms on the default task

Made by `make algorithms`, never by hand: the shipped model, the default job's options and `--algorithm` alone, but for
what is named, and one optimizer step a phase (`--update.minibatch_sequences 0`), so that updates are counted alike.
Held-out accuracy in percent, greedy, 400 problems: mean over seeds (sample standard deviation), at the start and at the
end; `thinktuning` has the teacher of examples/arithmetic_teacher.py. Each run had one thread, and two went side by
side; seconds are the median, and those of a busy machine say little.
"""


def runs(folder: Path, arms: Mapping[str, Options], seeds: Iterable[int]) -> dict[str, list[Run]]:
    """Each arm's runs, in the order of the seeds."""
    seeds = tuple(seeds)
    return {
        name: [Run(folder / f"{_words(name)}-{seed}", {**options, "seed": seed}) for seed in seeds]
        for name, options in arms.items()
    }


def _words(name: str) -> str:
    return "-".join(re.findall(r"\w+", name))


def train(arms: Mapping[str, Sequence[Run]]) -> None:
    """Bring all to their end, the first seed of every arm before the second of any."""
    train_all([run for same_seed in zip(*arms.values(), strict=True) for run in same_seed])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several, the sample standard deviation."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({statistics.stdev(values):,.{digits}f})"


def document(arms: Mapping[str, Sequence[Run]]) -> str:
    """The table, with its text."""
    head = ["algorithm", "seeds", "steps", "generations"]
    head += [f"{name}, {when}" for name in _EVALUATED for when in ("start", "end")]
    return "\n".join([_ABOUT, markdown([*head, "seconds"], [_row(name, arm) for name, arm in arms.items()]), ""])


def _row(name: str, arm: Sequence[Run]) -> list[str]:
    records = [run.records() for run in arm]
    evaluations = [[record for record in one if record["phase"] == "eval"] for one in records]
    last = [{key: value for record in one for key, value in record.items()} for one in records]
    cells = [name, str(len(arm)), str(arm[0].options["run.steps"]), spread([one["generations"] for one in last], 0)]
    for metric in _EVALUATED.values():
        cells += [spread([100 * one[place][metric] for one in evaluations]) for place in (0, -1)]
    return [*cells, f"{statistics.median(one['elapsed_seconds'] for one in last):,.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.algorithms", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of each algorithm; default 3")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "algorithms.md", help="the document")
    options = parser.parse_args(arguments)
    arms = runs(ROOT / "build" / "algorithms", ARMS, range(options.seeds))
    train(arms)
    options.output.write_text(document(arms))
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
