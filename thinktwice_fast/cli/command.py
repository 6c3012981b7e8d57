"""What a command beside training says of itself, and how its options are read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_args, get_origin

from thinktwice_fast.bounds import check_bounds
from thinktwice_fast.errors import UserError

PROGRAM = "thinktwice-fast"


@dataclass(frozen=True)
class Command:
    """A command: its module, named as it is, has one of these as ``COMMAND``.

    The modules of all commands are imported for ``thinktwice-fast --help``: what takes long to import (torch,
    transformers) is imported by ``run``, after it has checked what can be checked without.
    """

    help: str  # one line of the list of commands
    description: str
    options: type  # a dataclass; the text under a field is its help; what is true or false is a flag, a tuple a list
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
        lists = {option.name: option for option in fields(self.options) if get_origin(option.type) is tuple}
        if self.positional is not None:
            parser.add_argument(self.positional, nargs="*", type=str, help=helps[self.positional])
        apart = {*flags, *lists} | ({self.positional} if self.positional else set())
        parser.add_class_arguments(self.options, nested_key=None, as_positional=False, skip=apart)
        for flag in flags:
            parser.add_argument(f"--{flag}", action="store_true", help=helps[flag])
        for listed, option in lists.items():
            default = [str(member) for member in cast(tuple[Any, ...], option.default)]
            parser.add_argument(f"--{listed}", nargs="+", type=str, help=helps[listed], default=default)
        values = parse(parser, arguments)
        for listed, option in lists.items():
            values[listed] = _members(listed, values[listed], get_args(option.type)[0])
        options = self.options(**values)
        check_bounds(options)
        return options


def _members(name: str, given: Iterable[Any], kind: type) -> tuple[Any, ...]:
    """Of a list that is written with spaces or commas between them."""
    members = []
    for text in (part for value in given for part in str(value).split(",") if part):
        try:
            members.append(kind(text))
        except ValueError as error:
            raise UserError(f"--{name} {text}: not of type {kind.__name__}: correct it") from error
    return tuple(members)
