"""Running the real command as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "thinktwice_fast" / "train.py"
DATA = ROOT.parent / "shared" / "data"
LIMIT = 300  # seconds that any command may take


def environment(gpus: str = "", threads: int = 1) -> dict[str, str]:
    """No GPU but those named, no hub, and as many threads as said, so that results do not depend on the machine."""
    # A pytest that a test starts is no worker of the one that runs the test.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return own | {
        "CUDA_VISIBLE_DEVICES": gpus,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


def train(
    *arguments: str | Path, processes: int = 0, cwd: Path = ROOT, gpus: str = "", threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """``python train.py ...``, or with ``processes`` under torchrun."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*start, str(TRAIN), *map(str, arguments)],
        env=environment(gpus, threads),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
