"""Command lines whose options are the fields of dataclasses: training's and those of other commands."""

import argparse
import contextlib
import inspect
import io
from dataclasses import is_dataclass
from typing import Any

import docstring_parser  # what jsonargparse reads the same help texts with
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from thinktwice_fast.errors import UserError, one_line


def make_parser(program: str, description: str) -> ArgumentParser:
    """A parser that reads help texts from under the fields, and whose options have one name each."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(
        prog=program,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )


def parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The values of a parser's arguments, sections as their dataclasses; ``--help`` prints and exits.

    Raises:
        UserError: an unknown option, a value of the wrong type, a file of options that is malformed.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(f"{one_line(error)}: see {parser.prog} --help") from error
    return parser.instantiate(parsed).as_dict()


def field_helps(owner: type) -> dict[str, str]:
    """The text under each field of a dataclass, inherited ones among them."""
    kinds = [kind for kind in reversed(inspect.getmro(owner)) if is_dataclass(kind)]
    params = [param for kind in kinds for param in docstring_parser.parse_from_object(kind).params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass
