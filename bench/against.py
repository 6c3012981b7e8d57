"""This version against another, in turn: ``python -m bench.against REF [CASE ...]`` (``make bench-against REF=...``).

The other version is checked out and built in ``build/against``. Whole runs go through the real command, and ops through
their public functions, so that versions that have little else in common can be compared. A figure is the median of
the pairs' own ratios, new to old; status 1 if one is above 1.05.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ROOT, extensions
from bench.core.process import LineProcess
from bench.core.report import table
from bench.core.stats import median_ratio, quantile
from bench.models import MEDIUM, SMALL, untrained_folder

WORK = ROOT / "build" / "against"
MOST = 1.05
_CALLS = """
import json, sys, time, torch
import thinktwice_kernels as ops
torch.manual_seed(0)
{setup}
for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range({times}):
        gradient, *_ = torch.autograd.grad({result}, {inputs})
    seconds = (time.perf_counter() - start) / {times}
    print(json.dumps({{"s": seconds, "norm": float(gradient.norm())}}), flush=True)
"""


@dataclass(frozen=True)
class Calls:
    """A case of a public function, forward and backward.

    Args:
        setup: statements before the first call.
        result: of a call, an expression; a number.
        inputs: whose gradients it takes, an expression; that of the first is compared.
        times: calls of one of a pair.
    """

    setup: str
    result: str
    inputs: str
    times: int = 1

    def program(self) -> str:
        """Python that makes the calls for each line it reads, and answers with the seconds of one."""
        return _CALLS.format(setup=self.setup, result=self.result, inputs=self.inputs, times=self.times)


@dataclass(frozen=True)
class Run:
    """A case of the real command; each of its steps is one of a pair.

    Args:
        options: of the command.
        figures: name by name, the metric of a step.
        pairs: of steps.
        steps: of one run.
        shape: of random weights; None: the shipped model.
    """

    options: Mapping[str, str]
    figures: Mapping[str, Callable[[Mapping[str, Any]], float]]
    pairs: int
    steps: int
    shape: str | None = None


def _of_phase(metric: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda record: record[f"{record['phase']}/{metric}"]


_STEP = {"step, s": _of_phase("seconds_step"), "peak memory, bytes": lambda record: record["peak_memory_bytes"]}
_LITTLE = {"loss.entropy_coef": "0.001", "thinktwice.refine_instruction": "recheck"}  # a gradient for random weights
CASES: dict[str, Run] = {
    "default job": Run(  # in one mini-batch, whatever a revision's default
        {"update.minibatch_sequences": "0"},
        {**_STEP, "rollout, s": _of_phase("seconds_rollout"), "update, s": _of_phase("seconds_update")}, 31, 8,
    ),
    "100 M shape": Run(
        _LITTLE | {"problems_per_step": "2", "samples_per_problem": "8", "rollout.max_response_tokens": "32"},
        _STEP, 7, 2, MEDIUM,
    ),
    "0.6B shape": Run(
        _LITTLE | {"problems_per_step": "1", "samples_per_problem": "8", "rollout.max_response_tokens": "16"},
        {"rollout, s": _of_phase("seconds_rollout")}, 7, 2, SMALL,
    ),
}  # fmt: skip
CALLS: dict[str, Calls] = {
    "loss head": Calls(
        """
hidden, weight = torch.randn(2048, 256).requires_grad_(), (torch.randn(32_000, 256) / 16).requires_grad_()
targets, old = torch.randint(32_000, (2048,)), torch.randn(2048) / 50 - 10
advantages, cu_seqlens = torch.randn(32), torch.arange(33, dtype=torch.int32) * 64
""",
        "ops.linear_grpo_loss(hidden, weight, targets, advantages, cu_seqlens, old_logps=old)[0]",
        "(weight, hidden)",
    ),
    "dispatch": Calls(  # of a token with eight logits, whose arithmetic takes no time
        "logits, targets = torch.randn(1, 8).requires_grad_(), torch.tensor([3])",
        "ops.token_logprobs(logits, targets)",
        "(logits,)",
        times=1000,
    ),
}
PAIRS_OF_CALLS = 31


def build(ref: str) -> Path:
    """The tree of another version, built."""
    name = subprocess.run(
        ["git", "rev-parse", ref], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    tree = WORK / name
    if not tree.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), name], cwd=ROOT, check=True)
    extensions.build(tree)
    return tree


def compare(case: str, trees: Sequence[Path]) -> list[tuple[str, list[float], list[float]]]:
    """Figures of the old and the new tree, each with one value a pair."""
    if case in CALLS:
        return _compare_calls(case, trees)
    run = CASES[case]
    records: list[list[dict[str, Any]]] = [[], []]
    for number in range(-(-run.pairs // run.steps)):
        # Whichever goes second has a warmer machine.
        for which in ((0, 1), (1, 0))[number % 2]:
            records[which] += _steps(trees[which], run)
    old, new = records
    return [(f"{case}: {name}", [of(r) for r in old], [of(r) for r in new]) for name, of in run.figures.items()]


def _steps(tree: Path, run: Run) -> list[dict[str, Any]]:
    output = WORK / "run"
    shutil.rmtree(output, ignore_errors=True)
    options = {"eval.sets": "{}", "run.steps": str(run.steps), "run.checkpoint_every": "0", "output": str(output)}
    if run.shape:
        folder = untrained_folder(run.shape, WORK / "models" / run.shape.replace(" ", "-"))
        options |= {"model.path": str(folder), "model.random_init": "true", "model.compute_dtype": "float32"}
    command = [sys.executable, str(tree / "thinktwice_fast" / "train.py")]
    for name, value in (options | dict(run.options)).items():
        command += [f"--{name}", value]
    done = subprocess.run(command, cwd=tree, env=_environment(tree), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr.strip().splitlines()[-1]}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("phase") in ("solve", "refine")]


def _compare_calls(case: str, trees: Sequence[Path]) -> list[tuple[str, list[float], list[float]]]:
    processes = [
        LineProcess(
            str(tree), [sys.executable, "-c", CALLS[case].program()], WORK / f"calls-{n}.log", _environment(tree)
        )
        for n, tree in enumerate(trees)
    ]
    for process in processes:
        process.ask({})  # the first call is not timed
    seconds: list[list[float]] = [[], []]
    for number in range(PAIRS_OF_CALLS):
        answers = {which: processes[which].ask({}) for which in ((0, 1), (1, 0))[number % 2]}
        if abs(answers[0]["norm"] / answers[1]["norm"] - 1) > 1e-4:
            raise RuntimeError(f"the gradients of {case} differ: {answers}")
        for which, answer in answers.items():
            seconds[which].append(answer["s"])
    old, new = seconds
    return [(f"{case}, s", old, new)]


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "HF_HUB_OFFLINE": "1"}


def main(ref: str, cases: Sequence[str]) -> int:
    """Print a table; status 2 for a case that there is not."""
    unknown = sorted({*cases} - {*CASES, *CALLS})
    if unknown:
        print(f"no case {', '.join(unknown)}: there are {', '.join((*CALLS, *CASES))}", file=sys.stderr)
        return 2
    trees = (build(ref), ROOT)
    rows, worse = [("figure", "old", "new", "new / old", "of the pairs 20 % to 80 %", "pairs")], False
    for case in cases or (*CALLS, *CASES):
        for name, old, new in compare(case, trees):
            ratios = [b / a for a, b in zip(old, new, strict=True)]
            middle = median_ratio(new, old)
            worse |= middle > MOST
            low, high = quantile(ratios, 0.2), quantile(ratios, 0.8)
            row = (name, f"{quantile(old, 0.5):.4g}", f"{quantile(new, 0.5):.4g}", f"{middle:.3f}")
            rows.append((*row, f"{low:.3f} to {high:.3f}", str(len(ratios))))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
    print(table(rows))
    return int(worse)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("name a version to compare with: make bench-against REF=main~1")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
