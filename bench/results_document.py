"""docs/results.md, of which several commands write a section each and leave the others as they are."""

import re
from pathlib import Path

RESULTS = "results.md"
SECTIONS = ("compare", "remedies", "real")
"""In the order of the document, by their commands."""

_HEAD = """\
# Results

Every figure, table and sentence below is written by the command that its section names, from the metrics of the runs
that it made; none is typed by hand."""
_SECTION = re.compile(r"<!-- (\w+): begin -->\n(.*?)\n<!-- \1: end -->", re.DOTALL)


def write_section(document: Path, name: str, text: str) -> None:
    """Put ``text`` in the place of the section ``name``, one of `SECTIONS`; the document need not exist yet."""
    assert name in SECTIONS
    found = dict(_SECTION.findall(document.read_text())) if document.exists() else {}
    found[name] = text.strip()
    parts = [f"<!-- {one}: begin -->\n{found[one]}\n<!-- {one}: end -->" for one in SECTIONS if one in found]
    document.write_text("\n\n".join([_HEAD, *parts]) + "\n")
