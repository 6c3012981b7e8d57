"""The user's own reward function, ``my_file.py:function`` with TRL's signature; runs inside a grader process.

The function is called as ``function(prompts=..., completions=..., **columns)``: per sample a list of messages each,
and every column of the problem repeated per sample. It returns one number per sample, or None to leave a sample out. It
may be ``async def``: all calls in a process are awaited, one after another, in one event loop.
Source of the signature: TRL's GRPOTrainer, "Using a custom reward function" (conversational data).
"""

import asyncio
import functools
import importlib.util
import inspect
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.records import Message, Problem

_PARAMETERS = "prompts, completions, **columns"
# TRL passes these by itself and takes none of them from the data set's columns.
_NOT_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")


@dataclass(frozen=True)
class Failure:
    """What went wrong in a user's function, as text that travels between processes."""

    what: str  # "raised ValueError: ..."
    sample: int | None = None  # the sample it is about, where the function's result tells


def split_reward(reward: str) -> tuple[Path, str]:
    """File and function of ``my_file.py:function``.

    Raises:
        UserError: not of that form, or no such file.
    """
    path, separator, function = reward.rpartition(":")
    if not separator or not path.endswith(".py") or not function.isidentifier():
        raise UserError(
            f"unknown reward {reward!r}; use math, math_strict, choice, yes_no, exact, or my_file.py:function"
        )
    if not Path(path).is_file():
        raise UserError(f"reward {reward}: no file {path}; give its path relative to the current folder")
    return Path(path).resolve(), function


def load_function(path: str, name: str) -> Failure | None:
    """Import the user's file into this process, once; a Failure tells why it cannot be used."""
    function = loaded(path, name, _PARAMETERS)
    return function if isinstance(function, Failure) else None


def keyword_arguments(problem: Problem, prompt: Sequence[Message], completions: Sequence[str]) -> dict[str, Any]:
    """The keywords of one call; a data set's own ``answer`` column goes before the gold answer taken from it."""
    columns = {"answer": problem.answer, **problem.columns}
    count = len(completions)
    return {
        "prompts": [[dict(message) for message in prompt] for _ in range(count)],
        "completions": [[{"role": "assistant", "content": text}] for text in completions],
        **{name: [value] * count for name, value in columns.items() if name not in _NOT_COLUMNS},
    }


def call_function(path: str, name: str, keywords: dict[str, Any], seconds: float) -> list[float | None] | Failure:
    """One call of the user's function, its result checked: a finite number or None for each sample.

    Where something is wrong and the result does not tell with which sample, the samples are tried alone.

    Args:
        path: of the file.
        name: of the function.
        keywords: see `keyword_arguments`.
        seconds: after so many, no other sample is tried alone.
    """
    function = loaded(path, name, _PARAMETERS)
    if isinstance(function, Failure):
        return function
    until = time.monotonic() + seconds
    outcome, count = _rewards(function, keywords), len(keywords["completions"])
    if not isinstance(outcome, Failure) or outcome.sample is not None:
        return outcome
    if count == 1:
        return replace(outcome, sample=0)
    for sample in range(count):
        if time.monotonic() > until:
            break
        alone = _rewards(function, {key: values[sample : sample + 1] for key, values in keywords.items()})
        if isinstance(alone, Failure):
            return replace(alone, sample=sample)
    return outcome


@functools.cache  # per process, so that the module's state survives
def loaded(path: str, name: str, parameters: str) -> Callable[..., Any] | Failure:
    """A function in a user's file, or why it cannot be used; ``parameters`` are those it has to take, for the text."""
    try:
        function = _import_function(path, name)
    except BaseException as error:  # whatever a user's module does at import, the trainer names it in one line
        return Failure(f"cannot be imported: {kind_and_text(error)}")
    if not callable(function):
        kind = "there is no such function in the file" if function is None else f"it is a {type(function).__name__}"
        return Failure(f"cannot be used: {kind}; define `def {name}({parameters})`")
    checked: Callable[..., Any] = function
    return checked


def _rewards(function: Callable[..., Any], keywords: dict[str, Any]) -> list[float | None] | Failure:
    try:
        result = function(**keywords)
        if inspect.isawaitable(result):
            result = _event_loop().run_until_complete(result)
        return _checked(result, len(keywords["completions"]))
    except BaseException as error:  # a user's function may raise anything, SystemExit included
        return Failure(f"raised {kind_and_text(error)}")


@functools.cache  # one for all calls, since what a user's function keeps open belongs to its loop
def _event_loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _import_function(path: str, name: str) -> Any:
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that the file may import its neighbours, as a script could
    module_name = f"user_file_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return vars(module).get(name)


def _checked(result: Any, count: int) -> list[float | None] | Failure:
    if isinstance(result, str) or not isinstance(result, Iterable):
        return Failure(f"returned a {type(result).__name__} instead of a list of floats")
    rewards = list(result)
    if len(rewards) != count:
        return Failure(f"returned {len(rewards)} rewards for {count} samples")
    for sample, reward in enumerate(rewards):
        if reward is None:
            continue
        if not isinstance(reward, numbers.Real):
            return Failure(f"returned a {type(reward).__name__} instead of a number or None", sample)
        if not math.isfinite(reward):
            return Failure(f"returned {float(reward)}", sample)
    return [None if reward is None else float(reward) for reward in rewards]


def kind_and_text(error: BaseException) -> str:
    """``ValueError: ...``, in one line."""
    kind, text = type(error).__name__, one_line(error)
    return kind if text == kind else f"{kind}: {text}"
