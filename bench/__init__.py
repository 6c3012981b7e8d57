"""Ops, rollouts, updates and steps, each against its peers: what is measured stands in registry.py.

core/ measures, checks and reports; ops/, rollout/, update.py and step/ have the entries of the registry; stages/ has
the parts of gpu_check.sh. `make bench` runs all of it.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
