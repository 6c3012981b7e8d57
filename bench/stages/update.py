"""One row of an update again and again, first under the profiler: what its first use costs, and its kernels.

``python -m bench.stages.update WORK [--cpu]``. The third update has other lengths than the first two: what it takes
beyond the fourth is paid for every new shape, what only the first takes is paid once.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.core import hardware
from bench.core.measure import seconds_of
from bench.models import LARGE, TOY
from bench.stages.kernels import profiled
from bench.stages.notes import Line, Notes, result
from bench.step.cases import flop_of
from bench.update import UpdateBatch, Updated, made_rollouts, update_batch, update_case

# A group of one row: the longest responses, and somewhat shorter ones.
_ON_GPU = update_case(LARGE, 1, 8, 512, 1024, "bf16"), update_case(LARGE, 1, 8, 480, 900, "bf16")
_ON_CPU = update_case(TOY, 1, 4, 18, 12), update_case(TOY, 1, 4, 16, 9)
_SAME = 1e-3  # how far apart the results of one update may be, relatively
_MFU = 0.45


def main(work: Path, cpu: bool) -> int:
    device = torch.device("cpu") if cpu else torch.device("cuda", 0)
    notes, updater = Notes(work), Updated()
    case, other = _ON_CPU if cpu else _ON_GPU
    long = update_batch(case, device)
    short = replace(long, rollouts=made_rollouts(other.shape, long.theirs.config.vocab_size))
    found: list[torch.Tensor] = []

    def update(batch: UpdateBatch) -> None:
        outputs = updater(batch)
        found.append(torch.stack([outputs["loss"], outputs["grad_norm"]]))

    for name, batch in (("first", long), ("again", long), ("of other lengths", short), ("of those again", short)):
        run = profiled(partial(update, batch), device)
        notes.tell(f"update row, {name}: {run.seconds:.2f} s under the profiler", run.table)
        notes.add(Line(f"update row, {name}", f"{run.seconds:.2f} s, {run.launches:,} launches"))
    seconds = seconds_of(partial(update, long), device)
    notes.add(_share_of_peak(long, seconds))
    differences = torch.stack([found[1], found[4]]) / found[0] - 1
    off = float(differences.abs().max())  # NaN where any is
    right = result("update row: loss and gradient norm", f"off by {off:.1e}", f"<= {_SAME:g}", off <= _SAME)
    notes.add(right)
    return 0 if right.met else 1


def _share_of_peak(batch: UpdateBatch, seconds: float) -> Line:
    """Of the products that nothing can save, with each prompt once."""
    workload = batch.workload
    lengths = f"{workload.prompt_tokens} + {workload.samples} x {workload.new_tokens} tokens"
    name = f"update row, {lengths}, without the profiler"
    peak = hardware.peak_flop()
    if peak is None:
        return Line(name, f"{seconds:.3f} s", f">= {_MFU:.0%} MFU")
    share = flop_of(workload, batch.theirs.config, workload.prompt_tokens).update / seconds / peak
    return Line(name, f"{seconds:.3f} s, {share:.1%} MFU", f">= {_MFU:.0%} MFU", share >= _MFU)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--cpu" in sys.argv))
