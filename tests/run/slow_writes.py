"""``train.py``, whose files take their time to reach the disk: a checkpoint over a second."""

import os
import runpy
import time
from typing import Any

from tests.command import TRAIN

sync = os.fsync


def slowly(fd: Any) -> None:
    time.sleep(0.1)
    sync(fd)


if __name__ == "__main__":
    os.fsync = slowly
    runpy.run_path(str(TRAIN), run_name="__main__")
