"""Makes two steps of the default job and prints the second's calls: ``python tests/profiled_step.py FUNCTION ...``.

FUNCTION: ``file:name``, the file as from the repository's root. A line of JSON for each first call under another:
``[caller, callee]``, where the caller is the nearest on the stack that was asked about, or null.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from thinktwice_fast.config import Config
from thinktwice_fast.run.build import build_run

ROOT = Path(__file__).parents[1]


def main(wanted: frozenset[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    seen: dict[tuple[str | None, str], None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (name := _name(frame)) in wanted:
            caller = next((above for above in map(_name, _above(frame)) if above in wanted and above != name), None)
            seen.setdefault((caller, name))

    with ExitStack() as resources:
        algorithm = build_run(Config(), resources).algorithm
        algorithm.step(1)
        sys.setprofile(note)
        algorithm.step(3)
        sys.setprofile(None)
    for call in seen:
        print(json.dumps(call))


def _above(frame: FrameType) -> Iterator[FrameType]:
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame


def _name(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    path = file.removeprefix(f"{ROOT}/") if file.startswith(str(ROOT)) else ""
    return f"{path}:{frame.f_code.co_qualname}"


if __name__ == "__main__":
    main(frozenset(sys.argv[1:]))
