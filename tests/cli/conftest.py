"""Commands in the process of the tests."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thinktwice_fast.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["thinktwice-fast", *map(str, arguments)])
        return main.main(), *capsys.readouterr()

    return call
