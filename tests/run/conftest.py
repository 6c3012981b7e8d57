"""The commands of a module's table run two at a time beside its tests, which only wait for theirs."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.command import train
from tests.run.refusals import SMALL, Case, Finished


def run_case(case: Case, folder: Path, earlier: Future[Path]) -> Finished:
    if case.after_a_run:
        shutil.copytree(earlier.result(), folder / "run")
    prepared = case.options(folder)
    command = ("--output", folder / "run", *SMALL, "--run.steps", "1", *prepared)
    return train(*command, processes=case.processes, fresh=case.fresh)


def good_run(folder: Path) -> Path:
    done = train("--output", folder / "run", *SMALL, "--run.steps", "1")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Future[Finished]]]]:
    """Folder and command, under way, of each case that a selected test asks for."""
    own = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module
    ]
    cases: list[Any] = [item.callspec.params["case"] for item in own if "case" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        started = {}
        earlier: Future[Path] = Future()
        if any(case.after_a_run for case in cases):
            earlier = pool.submit(good_run, tmp_path_factory.mktemp("good"))
        for case in cases:
            folder = tmp_path_factory.mktemp(case.name.replace(" ", "-").replace("'", ""))
            started[case.name] = folder, pool.submit(run_case, case, folder, earlier)
        yield started
        pool.shutdown(cancel_futures=True)
