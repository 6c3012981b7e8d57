"""What a teacher reads: a system message, four worked examples, then the question with the student's response."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from thinktwice_fast.algorithms.thinktuning.feedback import Feedback, tagged
from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.records import Message
from thinktwice_fast.tasks.prompts import ChatFormat


@dataclass(frozen=True)
class Shot:
    """One behaviour: how it is asked for by name, and a worked example."""

    behaviour: str  # a name for metrics: letters and underscores
    request: str  # asks for this behaviour, where each request names one
    question: str
    response: str
    opinion: str
    reason: str
    phrase: str


@dataclass(frozen=True)
class TeacherPrompt:
    """The text around a question and its response."""

    system: str
    answer_format: str  # repeated after each response
    shots: tuple[Shot, ...]

    def messages(self, question: str, response: str, behaviour: int | None = None) -> tuple[Message, ...]:
        """The chat that asks for feedback.

        Args:
            question: as the student was asked.
            response: the student's.
            behaviour: place of the shot whose behaviour is asked for; None leaves it to the teacher.
        """
        turns: list[Message] = [{"role": "system", "content": self.system}]
        for shot in self.shots:
            feedback = Feedback(shot.opinion, shot.reason, shot.phrase)
            turns.append({"role": "user", "content": self._asked(shot.question, shot.response)})
            turns.append({"role": "assistant", "content": tagged(feedback)})
        request = "" if behaviour is None else self.shots[behaviour].request
        turns.append({"role": "user", "content": self._asked(question, response, request)})
        return tuple(turns)

    def _asked(self, question: str, response: str, request: str = "") -> str:
        parts = (f"Question:\n{question}", f"Response:\n{response}", self.answer_format, request)
        return "\n\n".join(filter(None, parts))


def load_prompt(path: str) -> TeacherPrompt:
    """The prompt in a YAML file; "default" is the one shipped here (``assets/teacher.yaml``), a model for one's own.

    Raises:
        UserError: no such file, or something missing in it.
    """
    shipped = Path(str(resources.files("thinktwice_fast") / "assets" / "teacher.yaml"))
    file = shipped if path == "default" else Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--thinktuning.shots {path}: can't read it as YAML: {one_line(error)}") from error
    try:
        shots = tuple(Shot(**_texts(shot, Shot)) for shot in content["shots"])
        texts = _texts({**content, "shots": ""}, TeacherPrompt)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"--thinktuning.shots {path}: {one_line(error)}: write it as {shipped}") from error
    if not shots or not all(shot.behaviour.replace("_", "a").isalpha() for shot in shots):
        raise UserError(f"--thinktuning.shots {path}: give at least one shot, its behaviour in letters and underscores")
    return TeacherPrompt(texts["system"], texts["answer_format"], shots)


def teacher_ids(chat: ChatFormat, messages: Sequence[Message], limit: int) -> tuple[int, ...]:
    """Token ids of a teacher's chat, cut on the left to ``limit``.

    A template without system messages gets it in front of the first user message.
    """
    try:
        ids = chat.prompt_ids(messages)
    except UserError:
        system, first, *others = messages
        ids = chat.prompt_ids([{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others])
    return tuple(ids[-limit:])


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, less than any of them."""
    first, last = min(prompts), max(prompts)  # whatever these share, those between them in order share too
    differs = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: min(next(differs, len(first)), min(map(len, prompts)) - 1)]


def _texts(values: Any, kind: type) -> dict[str, str]:
    """The fields of ``kind`` out of ``values``, which has these and no others, all texts."""
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"expected the keys {', '.join(sorted(names))}")
    if wrong := [name for name in sorted(names) if not isinstance(values[name], str)]:
        raise ValueError(f"{wrong[0]} is no text")
    return {name: value.strip() for name, value in values.items()}
