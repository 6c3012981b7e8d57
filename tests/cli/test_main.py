"""The program `thinktwice-fast`: what every command has to offer."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

from tests.command import LIMIT, ROOT, environment
from thinktwice_fast.cli.main import COMMANDS, load_command, overview


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_says_of_itself(name: str) -> None:
    command = load_command(name)
    assert re.search(rf"^  {name} +{re.escape(command.help)}$", overview(), re.M)
    assert is_dataclass(command.options)
    own = {option.name for option in fields(command.options)}
    assert {*command.names.values(), command.positional} - {None} <= own


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--bogus"] for name in COMMANDS)], ids=" ".join)
def test_neither_help_nor_a_misspelt_option_waits_for_torch(arguments: list[str]) -> None:
    program = "import sys; from thinktwice_fast.cli.main import main; main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).startswith(("usage: ", "thinktwice-fast: error: "))
