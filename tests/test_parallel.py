"""How the processes of a run part."""

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from thinktwice_fast import parallel


@pytest.mark.parametrize(
    ("fails", "processes", "backends", "end"),
    [
        (False, 2, "cpu:gloo,cuda:nccl", "destroyed"),
        (True, 2, "cpu:gloo,cuda:nccl", "aborted"),
        (True, 1, "cpu:gloo,cuda:nccl", "destroyed"),
        (True, 2, "cpu:gloo,cuda:gloo", "destroyed"),
    ],
)
def test_a_process_that_fails_alone_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, fails: bool, processes: int, backends: str, end: str
) -> None:
    ends: list[str] = []
    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("destroyed"))
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda: ends.append("aborted"))

    def run() -> None:
        with ExitStack() as resources:
            resources.push(parallel.end)
            if fails:
                raise torch.OutOfMemoryError

    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            run()
    else:
        run()
    assert ends == [end]


def test_the_backends_of_a_group_are_told() -> None:
    parallel.start(torch.device("cpu"), 60.0)
    assert dist.get_backend_config() == "cpu:gloo,cuda:gloo"
    parallel.end(None)
    assert not dist.is_initialized()
