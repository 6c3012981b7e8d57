"""What test_two_processes.py runs in two processes."""

import sys
from pathlib import Path

import torch

from tests.algorithms.joint_world import joint_step
from tests.algorithms.stubs import first_steps
from tests.update.worlds import save
from thinktwice_fast import parallel

if __name__ == "__main__":
    parallel.start(torch.device("cpu"), 60.0)
    save({"steps": first_steps(), "joint": joint_step()}, Path(sys.argv[1]))
