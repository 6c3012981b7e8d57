"""Every op that is measured. A module of ops/, rollout/, step/ or update.py has one or more in its list OPS."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from bench import update
from bench.core.op import Op
from bench.core.targets import Outcome, outcome
from bench.ops import advantages, gate, grpo_loss, linear_logprobs, linear_loss, norm, rotary, token_logprobs
from bench.rollout import rollouts
from bench.step import steps

_HEAD = linear_loss, linear_logprobs, token_logprobs
_MODULES = *_HEAD, grpo_loss, advantages, norm, gate, rotary, rollouts, update, steps
OPS: list[Op] = list(chain.from_iterable(module.OPS for module in _MODULES))


def op_named(name: str) -> Op:
    return next(op for op in OPS if op.name == name)


def outcomes(document: Mapping[str, Any]) -> list[Outcome]:
    """Each target for the device of a run."""
    device, rows = document["device"], document["results"]
    return [outcome(op.name, target, rows) for op in OPS for target in op.targets.get(device, ())]
