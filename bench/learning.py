"""Three whole runs of the default job: does it learn what the README says? ``python -m bench.learning``.

About six minutes; status 1 if it does not.
"""

import shutil
import sys
from pathlib import Path

from bench import ROOT
from bench.runs import Run, train_all

SOLVE_POINTS, REFINE_POINTS, SECONDS = 25, 15, 300  # at least, at least, at most
_SEEDS = (0, 1, 2)


def learned(seed: int, run: Run) -> bool:
    """Whether a run's accuracies on held-out problems rose as they should; prints how far."""
    records = run.records()
    first, *_, last = [record for record in records if record["phase"] == "eval"]
    seconds = [record["elapsed_seconds"] for record in records if "elapsed_seconds" in record][-1]
    names = [f"eval/held_out/{name}_accuracy" for name in ("solve", "refine")]
    solve, refine = (100 * (last[name] - first[name]) for name in names)
    print(f"seed {seed}: solve {solve:+.1f} points, refine {refine:+.1f}, {seconds:.0f} s", flush=True)
    return solve >= SOLVE_POINTS and refine >= REFINE_POINTS and seconds < SECONDS


def main(folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    runs = {seed: Run(folder / f"seed-{seed}", {"seed": seed}, threads=2) for seed in _SEEDS}
    train_all(list(runs.values()), side_by_side=1)
    outcomes = [learned(seed, run) for seed, run in runs.items()]
    return int(not all(outcomes))


if __name__ == "__main__":
    sys.exit(main(ROOT / "build" / "learning"))
