"""What an entry of the registry is: an op, its cases, its contenders, and what its results are held against."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from bench.core.contender import Contender, Outputs
from bench.core.targets import Target

Size = Literal["toy", "cpu", "gpu"]  # toy: for the tests
SIZES: tuple[Size, ...] = ("toy", "cpu", "gpu")
Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(Protocol):
    """What the inputs of a case are made from."""

    @property
    def tokens(self) -> int: ...

    def named(self, precision: str) -> str:
        """The case's name in every table."""


S = TypeVar("S", bound=Shape, covariant=True)


@dataclass(frozen=True)
class Case(Generic[S]):
    """One measurement."""

    shape: S
    precision: Precision = "fp32"
    only_targets: bool = False  # leaves out the contenders that no target names, where a round takes long
    left_out: tuple[str, ...] = ()  # contenders that would take minutes a round
    memory: bool = True  # peak memory is measured too
    counts: bool = True  # towards the targets
    rounds: int = 0  # of the timing at most, where one takes minutes; 0: as the setting says
    seconds: float = 0.0  # for the rounds, where their noise asks for many; 0: as the setting says

    @property
    def name(self) -> str:
        return self.shape.named(self.precision)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.precision]


@dataclass(frozen=True)
class Ceiling:
    """The fastest that the machine can do such work: `prepare` makes the buffers and gives what to time."""

    name: str
    prepare: Callable[[Any], Callable[[], Any]]
    work: Callable[[Any], float]  # what it does in a case, in the unit of the op's work


@dataclass(frozen=True)
class Op:
    name: str
    cases: Mapping[Size, Sequence[Case[Any]]]  # the most important first: a time limit cuts off the end
    inputs: Callable[[Any, torch.device], Any]  # of a case
    contenders: Mapping[str, Contender]
    truth: Callable[[Any], Outputs] = lambda batch: {}  # what the results are held against
    # Instead, where there is no one truth, as for what is drawn at random: errors by name, and how large each may be.
    judge: Callable[[Any, Contender], dict[str, float]] | None = None
    limits: Callable[[torch.dtype], Mapping[str, float]] = lambda dtype: {}
    # Instead of calls in a process of their own, where contenders have one: bytes at the peak of the timed calls.
    memory: Callable[[Any, Contender], int] | None = None
    details: Callable[[Any, Contender], dict[str, float]] | None = None  # of the timed calls, to be shown by name
    work: Callable[[Any], float] | None = None  # FLOP, bytes or tokens of one call of a case
    unit: Literal["TFLOP/s", "GB/s", "tokens/s", ""] = ""
    ceiling: Ceiling | None = None
    short: bool = False  # calls of microseconds, timed many at a time
    targets: Mapping[str, Sequence[Target]] = field(default_factory=dict)  # by the kind of device: "cpu", "cuda"
    module: str = "bench.registry"  # that has it in its list OPS
