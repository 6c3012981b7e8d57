"""From the command line and YAML files to a checked ``Config``."""

from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.config import Config, LossOptions
from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.run.parsing import make_parser, parse

CONFIG_FILE = "config.yaml"  # in a run's folder: its options as resolved
PROGRAM = "train.py"
_DESCRIPTION = """Train a language model by ThinkTwice: solve, update, refine, update.

Options come from their defaults (the "tiny" recipe), then from the algorithm's published loss, then from --config
files, then from the command line."""
_DRY_RUN = "Check everything, print the plan of a step and the memory it will take, and stop; writes nothing."
_DRY_RUN_GPU = (
    "With --dry-run: plan as on GPUs of so many gigabytes (10^9 bytes), which need not be here. Default: what is here."
)
_GIGABYTE = 10**9
_MOST_GIGABYTES = 1_000_000


@dataclass(frozen=True)
class DryRun:
    """A plan is wanted, no run."""

    gpu_bytes: int | None  # of memory of each GPU that is taken to be here; None = as it is


def parse_config(arguments: list[str], program: str = PROGRAM, description: str = _DESCRIPTION) -> Config:
    """The options that ``arguments`` and the ``--config`` files among them give; ``--help`` prints and exits.

    Args:
        arguments: of the command line.
        program: whose it is, for messages.
        description: of it, for ``--help``.

    Raises:
        UserError: an unknown option, a value of the wrong type, a config file that is missing or malformed.
    """
    return Config(**_parsed(_parser(program, description), arguments))


def parse_command(arguments: list[str]) -> tuple[Config, DryRun | None]:
    """As ``parse_config``, and whether only a plan is wanted (``--dry-run``, which no file can set)."""
    values = _parsed(_parser(PROGRAM, _DESCRIPTION, plans=True), arguments)
    asked, gigabytes = values.pop("dry_run"), values.pop("dry_run_gpu")
    config = Config(**values)
    if gigabytes is None:
        return config, DryRun(None) if asked else None
    if not asked:
        raise UserError("--dry-run-gpu would be ignored without --dry-run: give both, or none")
    if config.model.device == "cpu":
        raise UserError("--dry-run-gpu would be ignored with --model.device cpu: leave one out")
    if not 0 < gigabytes <= _MOST_GIGABYTES:
        raise UserError(f"--dry-run-gpu {gigabytes:g}: must be above 0 and at most {_MOST_GIGABYTES} (gigabytes)")
    return config, DryRun(int(gigabytes * _GIGABYTE))


@cache
def _parser(program: str, description: str, *, plans: bool = False) -> ArgumentParser:
    """Of training's options, and with ``plans`` of a dry run's. Kept, for to read all help texts takes a while."""
    parser = make_parser(program, description)
    if plans:
        parser.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
        parser.add_argument("--dry-run-gpu", type=float, default=None, metavar="GIGABYTES", help=_DRY_RUN_GPU)
    parser.add_argument("--config", action="config", help="YAML file of options; may be given several times.")
    parser.add_class_arguments(Config, nested_key=None, as_positional=False)
    return parser


def _parsed(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The values of a parser's options, with an algorithm's own defaults."""
    parser = deepcopy(parser)  # it is kept, and gets other defaults here
    _check_files(arguments)
    values = parse(parser, arguments)
    if published := published_loss(values["algorithm"]):
        parser.set_defaults({f"loss.{name}": value for name, value in published.items()})
        values = parse(parser, arguments)
    values.pop("config")
    return values


def default_config(algorithm: str) -> Config:
    """The defaults of a run by an algorithm of this name."""
    return Config(loss=replace(LossOptions(), **published_loss(algorithm)))


def published_loss(algorithm: str) -> dict[str, Any]:
    """The `LossOptions` of an algorithm's preset; empty where they are those of `Config()`, or it has none."""
    preset = METHODS[algorithm].preset
    if preset is None or algorithm == Config.algorithm:
        return {}
    # Imported here because it takes seconds.
    from thinktwice_kernels import PRESETS
    from thinktwice_kernels import LossOptions as Published

    values = {option.name: option.default for option in fields(Published)}
    values |= PRESETS[preset]["grpo_loss"] | PRESETS[preset]["group_advantages"]
    return {option.name: values[option.name] for option in fields(LossOptions)}


def to_yaml(config: Config) -> str:
    """Every option with its value, as a file that ``--config`` takes."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def to_plain(config: Config) -> dict[str, Any]:
    """Every option with its value, in types that YAML and JSON have."""
    return _plain(asdict(config))


def from_yaml(path: Path) -> Config:
    """The options of a file that ``to_yaml`` wrote."""
    return parse_config(["--config", str(path)])


_CONFIGS = Path(__file__).parents[2] / "configs"


def _check_files(arguments: list[str]) -> None:
    """Refuse what jsonargparse would not name the file of, or would fail at."""
    for flag, value in zip(arguments, [*arguments, ""][1:], strict=True):
        name = value if flag == "--config" else flag.removeprefix("--config=") if "--config=" in flag else None
        if name is not None and not Path(name).is_file():
            raise UserError(f"--config {name}: no such file: the ready ones are in {_CONFIGS}/")
        if name is not None:
            _check_sections(name)


def _check_sections(name: str) -> None:
    try:
        with Path(name).open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--config {name}: not readable as YAML ({one_line(error)}): mend the file") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {name}: holds no options: write them as in configs/tiny.yaml")
    for option in sorted({"dry_run", "dry_run_gpu"} & content.keys()):
        flag = "--" + option.replace("_", "-")
        raise UserError(f"--config {name}: {option} is no option of a run: give {flag} on the command line")
    if isinstance(content.get("profile"), int):  # YAML reads 3:5 as a number to the base of 60
        raise UserError(f'--config {name}: profile: write the steps in quotation marks, as in "3:5"')
    sections = (field.name for field in fields(Config) if is_dataclass(field.default_factory))
    for section in sections:
        if not isinstance(content.get(section, {}), dict):
            raise UserError(f"--config {name}: {section} is a section: write its options below it, indented")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
