"""The README's generated tables, and the command that rewrites or checks them."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from thinktwice_fast.bounds import bounded
from thinktwice_fast.config import Config
from thinktwice_fast.run.metrics import METRICS
from thinktwice_fast.run.tables import main, metrics_table, options_table

README = "# Title\n\n<!-- options -->\n<!-- /options -->\n\nprose\n\n<!-- metrics -->\nstale\n<!-- /metrics -->\nend\n"


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


def test_rewrite_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(README)
    assert main([str(path), "--check"]) == 1
    error = capsys.readouterr().err
    assert "out of date" in error and error.count("\n") == 1
    assert path.read_text() == README

    assert main([str(path)]) == 0
    text = path.read_text()
    assert options_table(Config) in text and metrics_table() in text
    assert "stale" not in text and text.startswith("# Title\n") and text.endswith("<!-- /metrics -->\nend\n")
    assert "\n\nprose\n\n" in text
    assert main([str(path), "--check"]) == 0
    assert main([str(path)]) == 0
    assert path.read_text() == text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- options -->", ""),
        ("<!-- /metrics -->", ""),
        ("prose", "<!-- options -->"),
        ("<!-- metrics -->\nstale\n<!-- /metrics -->", "<!-- /metrics -->\n<!-- metrics -->"),
    ],
)
def test_bad_markers_are_one_line_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    path = tmp_path / "README.md"
    text = README.replace(old, new)
    path.write_text(text)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "<!--" in error
    assert path.read_text() == text


def test_the_real_command_names_a_missing_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thinktwice_fast.run.tables", str(tmp_path / "absent.md"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "absent.md" in done.stderr and done.stderr.count("\n") == 1
