"""The short ways of an eager call: past torch.library to the op's code, past Triton's binder to the compiled kernel."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.dispatched import Dispatched
from tests.kernels.test_custom_ops import OPS, op_calls
from thinktwice_kernels import advantages, launch, linear_loss, logprobs, loss, token_logprobs
from thinktwice_kernels.triton.scale import scale_in_triton

CALLED = {
    op: getattr(module, f"_{op}")
    for module, op in (
        (logprobs, "token_logprobs"),
        (logprobs, "linear_logprobs"),
        (advantages, "group_advantages"),
        (loss, "grpo_loss"),
        (linear_loss, "linear_grpo_loss"),
    )
}


def gradients_of(outputs: Any, inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x.requires_grad]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return ()
    probes = [torch.linspace(-1, 2, x.numel()).view(x.shape) for x in outputs]
    return torch.autograd.grad(outputs, leaves, probes, allow_unused=True)


@pytest.mark.parametrize("op, arguments", op_calls())
def test_an_eager_call_gives_what_the_op_gives(
    op: Any, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = op(*arguments)
    want_gradients = gradients_of(want, arguments)
    short = CALLED[str(op).rpartition(".")[2]]
    with monkeypatch.context() as patch:
        patch.setattr(short, "library", None)
        got = short(*arguments)
        got_gradients = gradients_of(got, arguments)
    for a, b in zip(
        [got] if isinstance(got, Tensor) else got, [want] if isinstance(want, Tensor) else want, strict=True
    ):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    for a, b in zip(got_gradients, want_gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_whoever_looks_at_operations_sees_the_op() -> None:
    logits, targets = torch.zeros(3, 5), torch.zeros(3).long()
    with Dispatched() as seen:
        token_logprobs(logits, targets)
    assert "thinktwice_kernels.token_logprobs.default" in [name for name, _ in seen.calls]
    assert token_logprobs(logits.to("meta"), targets.to("meta")).shape == (3,)
    with FakeTensorMode() as mode:
        fake = token_logprobs(mode.from_tensor(logits), mode.from_tensor(targets))
    assert fake.shape == (3,) and type(fake) is not Tensor
    mapped = torch.func.functionalize(lambda x: OPS.token_logprobs(x, targets, 1.0, None, False, False)[0])(logits)
    assert torch.equal(mapped, torch.func.functionalize(lambda x: token_logprobs(x, targets))(logits))


def test_logits_that_became_their_gradient_are_not_taken_for_logits_again() -> None:
    logits = torch.zeros(3, 5, requires_grad=True) * 1
    logps = token_logprobs(logits, torch.zeros(3).long(), inplace_backward=True).sum()
    logps.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.backward()


class NoGpu:
    """A driver that compiles for one architecture and runs nothing: `launched` gets grid, stream and arguments."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 77  # of no machine: nothing else is ever compiled for it in this process

    def get_current_stream(self, device: int) -> int:
        return 5

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *given: self.launched.append((*given[:4], *map(address, given[9:])))


def address(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[NoGpu]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "_compiled", {})
    before, fake = driver._active, NoGpu()
    driver.set_active(fake)
    yield fake
    driver._active = before


def test_a_second_launch_passes_the_same_without_the_binder(gpu: NoGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    run = JITFunction.run

    def counted(*arguments: Any, **options: Any) -> Any:
        bound.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(JITFunction, "run", counted)

    def launched(size: int, dtype: torch.dtype = torch.float32, start: int = 0, device: int = -1) -> int:
        """How often the binder was asked in a launch and its repetition."""
        bound.clear()
        numbers = torch.empty(start + size, dtype=dtype)[start:]
        with launch.recording() as launches:
            scale_in_triton(numbers, torch.ones(()), numbers)
        for _ in range(2):
            launch.launch_on(device, launches[0], (3, 2))
        first, again = gpu.launched[-2:]
        assert first == again and first[:4] == (3, 2, 1, 5)
        assert numbers.data_ptr() in first and size in first
        return len(bound)

    assert launched(32) == 1
    assert launched(64) == 0  # of a kind that is known
    for other in ({"size": 33}, {"size": 32, "dtype": torch.float64}, {"size": 32, "start": 1}):
        assert launched(**other) == 1 and launched(**other) == 0
    assert launched(32, device=77) == 2  # memory that is not the device's: Triton may refuse it
