"""Three whole runs of the default job: does it learn what the README says? ``python -m bench.learning``.

About six minutes; status 1 if it does not.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench import ROOT
from thinktwice_fast.run.metrics_file import read_metrics

SOLVE_POINTS, REFINE_POINTS, SECONDS = 25, 15, 300  # at least, at least, at most
_SEEDS = (0, 1, 2)


def train(seed: int, output: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [sys.executable, *launcher, str(ROOT / "thinktwice_fast" / "train.py")]
    log, environment = output.with_suffix(".log"), os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    with log.open("w") as file:
        options = ["--seed", str(seed), "--output", str(output)]
        subprocess.run([*command, *options], cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)


def learned(seed: int, output: Path) -> bool:
    """Whether a run's accuracies on held-out problems rose as they should; prints how far."""
    records = read_metrics(output / "metrics.jsonl")
    first, *_, last = [record for record in records if record["phase"] == "eval"]
    seconds = [record["elapsed_seconds"] for record in records if "elapsed_seconds" in record][-1]
    names = [f"eval/held_out/{name}_accuracy" for name in ("solve", "refine")]
    solve, refine = (100 * (last[name] - first[name]) for name in names)
    print(f"seed {seed}: solve {solve:+.1f} points, refine {refine:+.1f}, {seconds:.0f} s", flush=True)
    return solve >= SOLVE_POINTS and refine >= REFINE_POINTS and seconds < SECONDS


def main(folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcomes = []
    for seed in _SEEDS:
        output = folder / f"seed-{seed}"
        train(seed, output)
        outcomes.append(learned(seed, output))
    return int(not all(outcomes))


if __name__ == "__main__":
    sys.exit(main(ROOT / "build" / "learning"))
