"""What an algorithm is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.thinktuning.teacher import Teacher
from thinktwice_fast.config import Config
from thinktwice_fast.records import Message
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.updater import Updater

# position in the stream of examples -> the chat, and the response to learn
ExampleStream = Callable[[int], tuple[Sequence[Message], str]]


@dataclass(frozen=True)
class Parts:
    """The parts of a run that algorithms use; each takes those that it needs."""

    config: Config
    problems: ProblemStream
    sampler: Sampler
    updater: Updater
    examples: ExampleStream
    end_id: int  # token that ends a response
    teacher: Teacher | None = None  # of ThinkTuning
