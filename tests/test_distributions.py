"""The ops and the trainer as distributions: built from sources that stand alone, and installed one after the other."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.command import ROOT, environment, quick_start
from tests.csrc.stable_abi import sources
from tests.kernels.test_docs import PROGRAMS

PROGRAM = PROGRAMS["Install"]
OPS, TRAINER = "thinktwice_kernels", "thinktwice_fast"
FOLDERS = {OPS: "kernels", TRAINER: "."}  # of each package's setup.py
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# Ninja would ask for object files; without it setuptools sees that the library is there and newer than its sources.
BUILD = """
import sys
from setuptools import build_meta
from torch.utils import cpp_extension
cpp_extension.is_ninja_available = lambda: False
getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2])
"""


class Built(NamedTuple):
    """A package's source distribution, unpacked, and the wheel built from it."""

    sources: Path
    wheel: Path


def run(*command: str | Path, cwd: Path) -> str:
    """Its output; it sees no package but those of its environment, and pip no place to find others."""
    own = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    own["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """The ``sdist`` or ``wheel`` of a folder; nothing is compiled."""
    script = folder / "build.py"
    script.write_text(BUILD)
    python, _ = quick_start()
    assert "building '" not in run(python, script, kind, folder / kind, cwd=source)
    (built,) = (folder / kind).iterdir()
    return built


def built(package: str, folder: Path, tree: Path) -> Built:
    """From a copy of the sources, with the library that lies among the true ones."""
    with tarfile.open(build("sdist", tree, folder)) as archive:
        archive.extractall(folder, filter="data")
        unpacked = folder / archive.getnames()[0]
    (library,) = (ROOT / FOLDERS[package] / package).glob("_csrc*.so")
    place = unpacked / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / package
    place.mkdir(parents=True)
    shutil.copyfile(library, place / library.name)
    return Built(unpacked, build("wheel", unpacked, folder))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """By package."""
    tree = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("*.so", "*.egg-info", "build", "__pycache__")
    for name in ("csrc", "kernels", TRAINER):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    return {name: built(name, tmp_path_factory.mktemp(name), tree / part) for name, part in FOLDERS.items()}


def needed(texts: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """Those of the requirements that hold here."""
    requirements = map(Requirement, texts)
    return [r for r in requirements if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def link_requirements(package: str, site: Path) -> None:
    """Link what a package needs, and what that needs, from this environment's site-packages into another's."""
    project = tomllib.loads((ROOT / FOLDERS[package] / "pyproject.toml").read_text())["project"]
    wanted, seen = needed(project["dependencies"]), set()
    for requirement in wanted:  # which grows
        one = (requirement.name, *requirement.extras)
        if requirement.name == "thinktwice-kernels" or one in seen:
            continue
        seen.add(one)
        found = importlib.metadata.distribution(requirement.name)
        for name in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(str(found.locate_file(name)))
        wanted += needed(found.requires or (), requirement.extras)


def test_source_distributions_hold_all_that_they_include(distributions: dict[str, Built]) -> None:
    for unpacked, _ in distributions.values():
        folders = (unpacked / "csrc", unpacked / "kernels" / "csrc")
        texts = [path.read_text() for path in sources(*folders)]
        wanted = {name for text in texts for name in re.findall(r'"([\w/]+\.(?:h|inc|cuh))"', text)}
        assert "common/tensor_utils.h" in wanted
        assert not [name for name in wanted if not any((folder / name).exists() for folder in folders)]


def test_each_runs_with_what_it_says_it_needs(distributions: dict[str, Built], tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    python, (site,) = home / "bin" / "python", home.glob("lib/python*/site-packages")
    install = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-compile")
    (tmp_path / "program.py").write_text(PROGRAM)

    link_requirements(OPS, site)
    run(*install, distributions[OPS].wheel, cwd=tmp_path)
    assert run(python, "program.py", cwd=tmp_path).startswith("loss ")
    find = "import importlib.util as u; print(u.find_spec('transformers'), u.find_spec('thinktwice_fast'))"
    assert run(python, "-c", find, cwd=tmp_path) == "None None\n"

    link_requirements(TRAINER, site)
    run(*install, distributions[TRAINER].wheel, cwd=tmp_path)
    answer = run(home / "bin" / "thinktwice-fast", "solve", "What is 3+4-2?", cwd=tmp_path)
    assert "--- refinement\n" in answer and "\\boxed{5}" in answer
    with zipfile.ZipFile(distributions[TRAINER].wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(OPS)]


def test_the_readme_of_the_ops_shows_the_first_program() -> None:
    assert PROGRAM in (ROOT / "kernels" / "README.md").read_text()


def test_the_oldest_versions_that_are_tested_are_the_lowest_allowed() -> None:
    """`make oldest`; trackers are not run by the tests."""
    allowed: dict[str, set[str]] = {}
    for folder in FOLDERS.values():
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
        lists = (project["project"]["dependencies"], *project["project"].get("optional-dependencies", {}).values())
        for line in (*project["build-system"]["requires"], *(line for lines in lists for line in lines)):
            lowest = {part.version for part in Requirement(line).specifier if part.operator == ">="}
            allowed.setdefault(Requirement(line).name, set()).update(lowest)
    pinned = {
        wanted.name: part.version
        for line in (ROOT / "requirements-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
        for wanted in [Requirement(line)]
        for part in wanted.specifier
        if part.operator == "=="
    }
    bounded = {name for name, lowest in allowed.items() if lowest} - {"trackio", "wandb", "thinktwice-kernels"}
    assert pinned.keys() == bounded
    for name in bounded:
        (bound,) = allowed[name]
        assert pinned[name] == bound or pinned[name].startswith(f"{bound}."), name
