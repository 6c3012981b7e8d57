"""The documents: generated tables of options and metrics, links that lead somewhere, options that exist."""

import dataclasses
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest

from docs.tables import main, metrics_table, options_table
from tests.command import ROOT
from tests.documents import table_below
from thinktwice_fast.bounds import bounded
from thinktwice_fast.config import Config
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.metrics import METRICS
from thinktwice_fast.run.options import parse_command


def option_names(owner: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(owner)
    names = []
    for field in dataclasses.fields(owner):
        kind = hints[field.name]
        name = prefix + field.name
        names += option_names(kind, name + ".") if dataclasses.is_dataclass(kind) else [name]
    return names


def test_every_option_has_one_row_of_four_filled_cells() -> None:
    rows = [line for line in options_table(Config).splitlines() if line.startswith("| `--")]
    cells = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]
    assert sorted(row[0] for row in cells) == sorted(f"`--{name}`" for name in option_names(Config))
    assert all(len(row) == 4 and all(row) for row in cells)


@dataclasses.dataclass
class Inner:
    """The inner part."""

    rate: float = bounded(5e-5, least=0, below=1)
    """How fast; 0 | 1 are
    the ends."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Two numbers."""
    sets: dict[str, str] = dataclasses.field(default_factory=lambda: {"a": "b"})
    """Named sources."""


@dataclasses.dataclass
class Outer:
    """The outer part."""

    kind: typing.Literal["one", "two"] = "one"
    """Which."""
    note: str | None = None
    """A note."""
    empty: str = ""
    """Nothing."""
    flag: bool = False
    """Whether."""
    some: tuple[float, ...] = (0.0,)
    """Several."""
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_options_as_they_are_typed_on_the_command_line() -> None:
    assert options_table(Outer) == "\n".join(
        [
            "The outer part.",
            "",
            "| Option | Type | Default | Meaning |",
            "| --- | --- | --- | --- |",
            "| `--kind` | `one`, `two` | `one` | Which. |",
            "| `--note` | str or null | `null` | A note. |",
            '| `--empty` | str | `""` | Nothing. |',
            "| `--flag` | bool | `false` | Whether. |",
            "| `--some` | list of float | `[0.0]` | Several. |",
            "",
            "### inner",
            "",
            "The inner part.",
            "",
            "| Option | Type | Default | Meaning |",
            "| --- | --- | --- | --- |",
            "| `--inner.rate` | float, from 0 to below 1 | `5e-05` | How fast; 0 \\| 1 are the ends. |",
            "| `--inner.betas` | [float, float] | `[0.9, 0.99]` | Two numbers. |",
            '| `--inner.sets` | {str: str} | `{"a": "b"}` | Named sources. |',
        ]
    )


def test_every_metric_has_one_row() -> None:
    table = metrics_table()
    for metric in METRICS:
        assert table.count(f"| `{metric.name}`") == 1
        assert metric.definition in table
    assert "| `{phase}/tokens_per_second` \\* | solve, refine, pair | tokens/s |" in table
    assert "| `{phase}/reward` | solve, refine | reward |" in table


def test_write_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--folder", str(tmp_path)]
    assert main([*there, "--check"]) == 1 and not any(tmp_path.iterdir())
    assert main(there) == 0 and main([*there, "--check"]) == 0
    options, metrics = (tmp_path / "options.md").read_text(), (tmp_path / "metrics.md").read_text()
    assert options_table(Config) in options and metrics_table() in metrics
    assert "## thinktwice-fast solve\n" in options and "\n| `problems` | list of str | " in options
    (tmp_path / "metrics.md").write_text(metrics.replace("reward", "rewards"))
    capsys.readouterr()
    assert main([*there, "--check"]) == 1
    assert capsys.readouterr().err == "out of date: metrics.md: run python -m docs.tables\n"
    assert main(there) == 0 and (tmp_path / "metrics.md").read_text() == metrics


WRITTEN = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")})


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(path: Path) -> set[str]:
    """What a heading is linked to by: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_options_in_the_text_exist(name: str) -> None:
    named = set(re.findall(r"--([a-z_]+\.[a-z_]+)\b", (ROOT / name).read_text()))
    assert named and named <= set(option_names(Config))


def commands(path: Path) -> list[str]:
    """What comes behind ``train.py`` in a text, or in the comments of a configuration."""
    lines = re.sub(r"\\\n[# ]*", "", path.read_text())
    found = re.findall(r"train\.py ((?:--config|--algorithm) [^`\n]*)", lines)
    return [command for command in found if "..." not in command]


@pytest.mark.parametrize(
    "path", sorted({*WRITTEN, *(ROOT / "configs").rglob("*.yaml")}), ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_in_the_text_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(path):
        check_config(parse_command(shlex.split(command))[0], 2)


def test_the_readme_says_what_the_results_say() -> None:
    """Each percentage below its two pictures of results, in this order."""
    readme = (ROOT / "README.md").read_text().splitlines()
    (pictures,) = (number for number, line in enumerate(readme) if "](docs/results.png)" in line)
    assert "](docs/results_real.png)" in readme[pictures]
    results = (ROOT / "docs" / "results.md").read_text()
    methods = table_below(results, "### At 51,200 generations")
    stages = table_below(results, "and a greedy refinement of each solution, in percent:")
    solved, refined = ({name: cells[column].split()[0] for name, cells in methods.items()} for column in (0, 1))
    before, after = stages["after the warm-up"], stages["after ThinkTwice"]
    assert re.findall(r"\d+\.\d(?= %)", readme[pictures + 2]) == [
        *(refined["thinktwice"], refined["grpo"], solved["grpo"], solved["thinktwice"]),
        *(before[0], after[0], before[2], after[2]),
    ]
