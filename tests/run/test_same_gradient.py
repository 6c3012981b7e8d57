"""The real command's gradient does not depend on how the work is laid out."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.command import train
from thinktwice_fast.run.shards import ReadTensors, shard_chunks

COMMON = (
    *(
        "--problems_per_step",
        "8",
        "--samples_per_problem",
        "4",
        "--update.warmup_steps",
        "0",
        "--update.grad_clip",
        "0",
    ),
    *("--run.steps", "1", "--eval.sets", "{}"),
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one row": (1, ()),
    "every response with its own prompt": (1, ("--update.shared_prefix", "false")),
    "many micro-batches": (1, ("--update.microbatch_tokens", "150")),
    "two processes": (2, ()),
    "two processes, many micro-batches, own prompts": (
        2,
        ("--update.microbatch_tokens", "200", "--update.shared_prefix", "false"),
    ),
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("layouts")

    def gradient(name: str) -> torch.Tensor:
        processes, options = LAYOUTS[name]
        output = folder / name.replace(" ", "-")
        done = train(*COMMON, *options, "--output", output, processes=processes)
        assert done.returncode == 0, done.stderr
        return of_first_step(output)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LAYOUTS, pool.map(gradient, LAYOUTS), strict=True))


def of_first_step(output: Path) -> torch.Tensor:
    """AdamW's first moment after one step, which is that step's gradient but for a factor."""
    state = ReadTensors(shard_chunks(output / "checkpoints" / "step-000001" / "optimizer"))
    return torch.cat([state[name].flatten() for name in sorted(state) if name.endswith("/exp_avg")])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one row"])
def test_layout(name: str, gradients: dict[str, torch.Tensor]) -> None:
    plain = gradients["one row"]
    assert plain.norm() > 0
    assert (gradients[name] - plain).norm() < 1e-5 * plain.norm()
