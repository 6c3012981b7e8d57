"""The ops beside FSDP2: two processes with a sharded weight get the gradients of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.kernels import sharded_head
from tests.update.worlds import one_process, run_in_two
from thinktwice_kernels import linear_grpo_loss, linear_logprobs

_ = one_process  # the fixture


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_in_two("tests.kernels.sharded_head", Path(tmp_path_factory.mktemp("two")))


@pytest.mark.parametrize("loss_of", [sharded_head.fused, sharded_head.in_two_steps])
def test_gradients_of_a_sharded_head(loss_of: Any, two: Any) -> None:
    one = sharded_head.gradients(loss_of, 0, 1)
    for a, b in zip(two[loss_of.__name__], one, strict=True):
        assert b.norm() > 1e-3
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("one_process")
def test_a_sharded_weight_itself_is_refused() -> None:
    weight = distribute_tensor(torch.zeros(5, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="call this inside the forward of the module that FSDP2 wraps"):
        linear_logprobs(torch.zeros(2, 3), weight, targets)
    with pytest.raises(ValueError, match="call this inside the forward of the module that FSDP2 wraps"):
        linear_grpo_loss(torch.zeros(2, 3), weight, targets, torch.ones(1), torch.tensor([0, 2]))
