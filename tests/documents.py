"""Reading the project's documents."""


def table_below(text: str, heading: str) -> dict[str, list[str]]:
    """Cells by the first of their row, of the first table after a line that ends with ``heading``."""
    table = text[text.index(heading) :].split("\n\n")[1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in table]
    return {row[0]: row[1:] for row in rows if len(row) > 1}
