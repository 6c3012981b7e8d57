"""One ThinkTwice pair by the real command, with random weights of a shape: ``python -m bench.pair SHAPE FOLDER``.

Ends with the seconds of both steps; status 1 if a step is missing, or rollout and training disagree.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from bench.memory import ROOT
from bench.rollout_cases import shape_config
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.model.loading import load_tokenizer
from thinktwice_fast.run.metrics import read_metrics

_MISMATCH = 0.1  # nats; bfloat16 in rollout and training
_OPTIONS = (
    *("--model.random_init", "true", "--problems_per_step", "4", "--samples_per_problem", "4", "--run.steps", "2"),
    *("--rollout.max_response_tokens", "64", "--thinktwice.refine_instruction", "recheck", "--eval.sets", "{}"),
    # Random weights solve nothing: this term gives every sample a gradient.
    *("--loss.entropy_coef", "0.001", "--update.learning_rate", "1e-6"),
)


def main(shape: str, folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = load_tokenizer(ModelOptions())
    tokenizer.save_pretrained(folder / "model")
    config = shape_config(shape)
    config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder / "model")
    train, model, run = ROOT / "thinktwice_fast" / "train.py", folder / "model", folder / "run"
    command = [sys.executable, str(train), "--model.path", str(model), *_OPTIONS, "--output", str(run)]
    status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if status:
        return status
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["phase"] in ("solve", "refine")]
    worst = max(record[f"{record['phase']}/mismatch"] for record in records)
    seconds = ", ".join(f"{record['phase']} {record[record['phase'] + '/seconds_step']:.1f} s" for record in records)
    right = [record["phase"] for record in records] == ["solve", "refine"] and worst < _MISMATCH
    print(f"{seconds}, mismatch {worst:.1e}: {'passed' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve()))
