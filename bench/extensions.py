"""Builds the C++ extensions of a tree in place, for the Python that runs this: ``python -m bench.extensions``."""

import subprocess
import sys
from pathlib import Path

from bench import ROOT


def build(tree: Path) -> None:
    """Build what has changed. In older versions one setup.py was for both packages."""
    for folder in (tree / "kernels", tree):
        if (folder / "setup.py").exists():
            subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, check=True)


if __name__ == "__main__":
    build(ROOT)
