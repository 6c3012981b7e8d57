"""Whether what a user can cause ends as a Python exception that names the row, and not as the end of the process.

``python -m bench.error_paths WORK [--cpu]`` runs every case in a process of its own; ``--case NAME`` is such a process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.stage_notes import Notes, result

_ROW, _SECONDS = 1, 40
# Arguments of ``csrc.sample`` for row 1 of three, and what the message has to say.
CASES: dict[str, tuple[dict[str, float], str]] = {
    "temperature": ({"temperature": -1.0}, r"temperature of row 1 is -1"),
    "top-k": ({"top_k": -2}, r"top_k of row 1 is -2"),
    "top-p": ({"top_p": 0.0}, r"top_p of row 1 is 0"),
    "NaN logits": ({"logits": float("nan")}, r"logits of row 1 \(sample 1, position 0\) hold NaN"),
    "infinite logits": ({"logits": float("inf")}, r"logits of row 1 \(sample 1, position 0\) hold NaN or \+inf"),
}


def sampled(device: torch.device, values: dict[str, float]) -> list[int]:
    """Greedy tokens of three rows, which are 0, 1 and 2, with these values in row 1."""
    from thinktwice_fast.model import csrc

    columns: dict[str, torch.Tensor] = {
        "temperature": torch.zeros(3),
        "top_k": torch.zeros(3, dtype=torch.int32),
        "top_p": torch.ones(3),
        "min_p": torch.zeros(3),
        "sample_ids": torch.arange(3),
        "positions": torch.zeros(3, dtype=torch.int64),
    }
    logits = torch.zeros(3, 1000)
    logits[range(3), range(3)] = 5.0
    for name, value in values.items():
        (logits if name == "logits" else columns[name])[_ROW] = value
    there: dict[str, Any] = {name: column.to(device) for name, column in columns.items()}
    return csrc.sample(logits.to(device), seed=0, **there).tokens.tolist()


def run_case(name: str, device: torch.device) -> str:
    """What is wrong with how the case ends, or "": it has to raise, and the next call has to be right."""
    values, message = CASES[name]
    try:
        sampled(device, values)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        if not re.search(message, line):
            return f"says {line!r}"
    else:
        return "raises nothing"
    tokens = sampled(device, {})
    return "" if tokens == [0, 1, 2] else f"the next call gives {tokens}"


def main(work: Path, device: str) -> int:
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    started = {
        name: subprocess.Popen(
            [python, "-m", "bench.error_paths", "--case", name, device],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in CASES
    }  # fmt: skip
    notes, outcomes = Notes(work), []
    for name, process in started.items():
        output, _ = process.communicate(timeout=_SECONDS)
        last = (output.strip().splitlines() or ["no output"])[-1]
        right = process.returncode == 0
        ended = f"ended by signal {-process.returncode}: " if process.returncode < 0 else ""
        notes.add(result(f"error: {name}", "raised" if right else ended + last[:100], "an exception", right))
        outcomes.append(right)
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    if sys.argv[1] == "--case":
        print(wrong := run_case(sys.argv[2], torch.device(sys.argv[3])))
        sys.exit(1 if wrong else 0)
    sys.exit(main(Path(sys.argv[1]), "cpu" if "--cpu" in sys.argv else "cuda"))
