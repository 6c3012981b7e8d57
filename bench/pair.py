"""One ThinkTwice pair by the real command, with random weights of a shape: ``python -m bench.pair SHAPE WORK``.

Ends with the seconds of both steps; status 1 if a step is missing, or rollout and training disagree.
"""

import shutil
import sys
from pathlib import Path
from unittest import mock

_MISMATCH = 0.1  # nats; bfloat16 in rollout and training
_OPTIONS = (
    *("--model.random_init", "true", "--problems_per_step", "4", "--samples_per_problem", "4", "--run.steps", "2"),
    *("--rollout.max_response_tokens", "64", "--thinktwice.refine_instruction", "recheck", "--eval.sets", "{}"),
    # Random weights solve nothing: this term gives every sample a gradient.
    *("--loss.entropy_coef", "0.001", "--update.learning_rate", "1e-6"),
    # What would be written takes longer than the steps, or more forward passes (transcripts).
    *("--run.save", "false", "--run.transcripts_every", "0", "--track", "none"),
)


def main(shape: str, work: Path) -> int:
    # Imported here because grader processes import this file again.
    from bench import ROOT
    from bench.models import untrained_folder
    from bench.stages.notes import Line, Notes, result
    from thinktwice_fast import train
    from thinktwice_fast.run.metrics_file import read_metrics

    model, output = untrained_folder(shape, work / "pair-model"), work / "pair-run"
    shutil.rmtree(output, ignore_errors=True)
    command = [str(ROOT / "thinktwice_fast" / "train.py"), "--model.path", str(model), *_OPTIONS]
    # In this process, which has imported everything already.
    with mock.patch.object(sys, "argv", [*command, "--output", str(output)]):
        status = train.main()
    if status:
        return status
    records = [r for r in read_metrics(output / "metrics.jsonl") if r["phase"] in ("solve", "refine")]
    worst = max(record[f"{record['phase']}/mismatch"] for record in records)
    seconds = ", ".join(f"{record['phase']} {record[record['phase'] + '/seconds_step']:.1f} s" for record in records)
    right = [record["phase"] for record in records] == ["solve", "refine"] and worst < _MISMATCH
    notes = Notes(work)
    notes.add(Line(f"pair, {shape}", seconds))
    notes.add(result("pair: log-probabilities of rollout and training", f"{worst:.1e} apart", f"< {_MISMATCH}", right))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
