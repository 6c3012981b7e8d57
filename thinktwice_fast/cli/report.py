"""The command ``thinktwice-fast report RUN [RUN ...] [EVALUATION ...]``."""

from dataclasses import dataclass, field
from pathlib import Path

from thinktwice_fast.cli.command import Command
from thinktwice_fast.errors import UserError

_DESCRIPTION = """Write one HTML file of runs and evaluations: curves, solutions beside their refinements, costs.

It needs nothing but a browser, and no network. Runs that differ in their seed alone are one curve with a band."""


@dataclass
class ReportOptions:
    """What to show, and where."""

    folders: list[str] = field(default_factory=list)
    """Folders of runs, and of evaluations by `thinktwice-fast eval`."""
    output: str | None = None
    """File to write; default: `report.html` in the folder, or of several here."""


def run(options: ReportOptions) -> None:
    """Write the page and print where it is.

    Raises:
        UserError: no folders, or one that holds nothing to show; a file that can't be written.
    """
    if not options.folders:
        raise UserError("no folder given: give those of runs or evaluations (thinktwice-fast report runs/tiny)")
    # Imported here because it takes a second.
    from thinktwice_fast.run.page.write import PAGE, write_page

    paths = [Path(folder).expanduser() for folder in options.folders]
    default = paths[0] / PAGE if len(paths) == 1 else Path(PAGE)
    output = Path(options.output).expanduser() if options.output is not None else default
    write_page(paths, output)
    print(output)


COMMAND = Command(
    help="show runs and evaluations in one HTML file",
    description=_DESCRIPTION,
    options=ReportOptions,
    run=run,
    positional="folders",
)
