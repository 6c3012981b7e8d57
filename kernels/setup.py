"""Builds the C++ extension (csrc/); everything else about the package stands in pyproject.toml."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from native_build import build

build("thinktwice_kernels", "csrc/loss", "csrc/layers")
