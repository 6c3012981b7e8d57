"""What a command beside training says of itself, and how its options are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from thinktwice_fast.bounds import check_bounds

PROGRAM = "thinktwice-fast"


@dataclass(frozen=True)
class Command:
    """A command: its module, named as it is, has one of these as ``COMMAND``.

    The modules of all commands are imported for ``thinktwice-fast --help``: what takes long to import (torch,
    transformers) is imported by ``run``, after it has checked what can be checked without.
    """

    help: str  # one line of the list of commands
    description: str
    options: type  # a dataclass; the text under a field is its help; what is true or false is a flag
    run: Callable[[Any], None]  # takes an instance of it; UserError for what the user can mend
    positional: str | None = None  # the option, a list of texts, that stands there without its name
    names: Mapping[str, str] = field(default_factory=dict)  # of options that have another key in training, by that key

    def option_names(self) -> Mapping[str, str] | None:
        """What errors call its options (see ``UserError.line``): all of them, by their key in training."""
        return {option.name: option.name for option in fields(self.options)} | dict(self.names)

    def parse(self, name: str, arguments: list[str]) -> Any:
        """The options on a command line; ``--help`` prints and exits.

        Raises:
            UserError: an unknown option, or a value of the wrong type or out of its bounds.
        """
        # Imported here because it takes a while, and the list of commands needs none of it.
        from thinktwice_fast.run.parsing import field_helps, make_parser, parse

        parser, helps = make_parser(f"{PROGRAM} {name}", self.description), field_helps(self.options)
        flags = [option.name for option in fields(self.options) if option.type is bool]
        if self.positional is not None:
            parser.add_argument(self.positional, nargs="*", type=str, help=helps[self.positional])
        apart = {*flags} | ({self.positional} if self.positional else set())
        parser.add_class_arguments(self.options, nested_key=None, as_positional=False, skip=apart)
        for flag in flags:
            parser.add_argument(f"--{flag}", action="store_true", help=helps[flag])
        options = self.options(**parse(parser, arguments))
        check_bounds(options)
        return options
