"""The algorithms that ``algorithm`` names, and what the rest of a run has to know of each.

To add one: a file beside this whose ``build`` makes it of `Parts`, its line here, and its name among those of
``algorithm`` in ``config.py`` (with a section there, if it has options of its own).
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinktwice_fast.algorithms.parts import Parts
    from thinktwice_fast.algorithms.step import Algorithm


@dataclass(frozen=True)
class Method:
    """What is known of an algorithm before it is built, and without importing torch."""

    module: str  # of this folder, with its ``build``
    phases: tuple[str, ...]  # that its steps have
    preset: str | None = None  # of `thinktwice_kernels.PRESETS`: its published loss; None = it has no policy loss
    section: str | None = None  # of `Config`: its own options

    @property
    def samples(self) -> bool:
        """Whether it learns from what the policy writes."""
        return "solve" in self.phases

    def build(self, parts: "Parts") -> "Algorithm":
        """The algorithm, ready for its first step."""
        algorithm: Algorithm = import_module(f"thinktwice_fast.algorithms.{self.module}").build(parts)
        return algorithm


METHODS: dict[str, Method] = {
    "thinktwice": Method("thinktwice", ("solve", "refine"), "thinktwice", "thinktwice"),
    "grpo": Method("grpo", ("solve",), "grpo"),
    "dr_grpo": Method("grpo", ("solve",), "dr_grpo"),
    "dapo": Method("dapo", ("solve",), "dapo", "dapo"),
    "star": Method("star", ("solve", "sft"), section="star"),
    "thinktuning": Method("thinktuning.algorithm", ("solve",), "thinktuning", "thinktuning"),
    "sft": Method("sft", ("sft",), section="sft"),
}
"""By the names of ``algorithm``."""
