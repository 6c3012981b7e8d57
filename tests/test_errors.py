"""Errors are data: one line for training, another for a command with other names and fewer options."""

import pickle

import pytest

from thinktwice_fast.errors import Option, UserError

PATH, INIT = Option("model.path", "./nowhere"), Option("model.random_init", "true")
ERROR = UserError((PATH, ": no weights"), "add them", ("start anew with ", INIT))


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (None, "--model.path ./nowhere: no weights: add them, or start anew with --model.random_init true"),
        ({"model.path": "model"}, "--model ./nowhere: no weights: add them"),
        ({"model.path": "model", "model.random_init": "fresh"},
         "--model ./nowhere: no weights: add them, or start anew with --fresh true"),
    ],
    ids=["training", "a command without it", "a command with it"],
)  # fmt: skip
def test_every_command_shows_its_own_names(names: dict[str, str] | None, line: str) -> None:
    assert ERROR.line(names) == line
    assert pickle.loads(pickle.dumps(ERROR)).line(names) == line  # as grader processes send it
    assert ERROR.within("process 3").line(names) == f"process 3: {line}"


def test_a_text_may_say_it_all() -> None:
    assert str(UserError("--seed -1: must be at least 0")) == "--seed -1: must be at least 0"
    assert UserError("broken", ("use ", Option("reward"))).line({}) == "broken"
