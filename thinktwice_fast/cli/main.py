"""The program ``thinktwice-fast``: what there is beside training, a command in a module each.

To add one, write its module with a ``COMMAND`` (see ``command.py``) and name it in ``COMMANDS``. Several processes:
``torchrun --no-python thinktwice-fast NAME ...``.
"""

import importlib
import os
import sys

from thinktwice_fast.cli.command import PROGRAM, Command
from thinktwice_fast.errors import UserError
from thinktwice_fast.launch import refuse

COMMANDS = ("solve", "eval", "report", "doctor")
"""Their names, which are those of modules in this folder too."""


def main() -> int:
    """Run the command that the arguments name. Exit status 2 and one line on stderr for what the user can mend."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        asked = f"no command {name!r}" if name else "no command given"
        return refuse(PROGRAM, f"{asked}: there is {', '.join(COMMANDS)}: see {PROGRAM} --help")
    command = load_command(name)
    try:
        command.run(command.parse(name, arguments))
        sys.stdout.flush()
    except UserError as error:
        return refuse(PROGRAM, error.line(command.option_names()))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def load_command(name: str) -> Command:
    """What a module of this folder says of its command."""
    command = importlib.import_module(f"thinktwice_fast.cli.{name}").COMMAND
    assert isinstance(command, Command), name
    return command


def overview() -> str:
    """The text of ``--help``."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {load_command(name).help}" for name in COMMANDS)
    return "\n".join(
        (f"usage: {PROGRAM} COMMAND ...", "", *lines, "", f"{PROGRAM} COMMAND --help has a command's options.")
    )


if __name__ == "__main__":
    sys.exit(main())
