"""The drop-ins for verl against plain torch on whole logits in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from thinktwice_kernels.integrations.verl import FusedLinearForPPO, linear_cross_entropy

H, V, TAU = 12, 37, 1.5


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(len(shape))
    hidden = torch.randn(*shape, H, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=rng).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, shape, generator=rng)


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden.double() @ weight.double().T / TAU, -1)
    return log_p.gather(-1, labels[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def assert_gradients_match(ours: Tensor, exact: Tensor, leaves: list[Tensor], tolerance: float = 1e-5) -> None:
    mine = torch.autograd.grad(ours, leaves)
    for found, expected in zip(mine, torch.autograd.grad(exact, leaves), strict=True):
        assert found.dtype == expected.dtype
        assert expected.norm() > 0
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5)])
def test_one_flat_row_of_tokens(shape: tuple[int, ...]) -> None:
    hidden, weight, labels = make_inputs(shape)
    logps, entropy = linear_cross_entropy(hidden, weight, labels, TAU)
    expected = [values.flatten() for values in formula(hidden, weight, labels)]
    torch.testing.assert_close(logps, expected[0].float())
    torch.testing.assert_close(entropy, expected[1].float())
    factor = torch.linspace(-1, 1, labels.numel())
    assert_gradients_match(
        (logps * factor).sum() + (entropy * factor**2).sum(),
        (expected[0] * factor).sum() + (expected[1] * factor**2).sum(),
        [hidden, weight],
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_leave_the_entropies(reduction: str) -> None:
    hidden, weight, labels = make_inputs((2, 4))
    logps, entropy = linear_cross_entropy(hidden, weight, labels, TAU, reduction)
    exact, exact_entropy = formula(hidden, weight, labels)
    expected = exact.sum() if reduction == "sum" else exact.mean()
    torch.testing.assert_close(logps, expected.float())
    torch.testing.assert_close(entropy, exact_entropy.flatten().float())
    assert_gradients_match(logps, expected, [hidden, weight])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (0, 4)])
def test_the_padded_class(shape: tuple[int, ...]) -> None:
    hidden, weight, labels = make_inputs(shape)
    logps, entropy = FusedLinearForPPO(chunk_size=2)(hidden, weight, labels.int(), temperature=TAU)
    assert logps.shape == entropy.shape == shape
    exact, exact_entropy = formula(hidden, weight, labels)
    torch.testing.assert_close(logps, exact.float())
    torch.testing.assert_close(entropy, exact_entropy.float())
    if labels.numel():
        assert_gradients_match(
            logps.square().sum() + entropy.sum(), exact.square().sum() + exact_entropy.sum(), [hidden]
        )


def test_bfloat16_results_are_not_rounded() -> None:
    hidden, weight, labels = make_inputs((3, 5), torch.bfloat16)
    logps, entropy = FusedLinearForPPO()(hidden, weight, labels, TAU)
    exact, exact_entropy = formula(hidden, weight, labels)
    assert logps.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logps, exact.float())
    torch.testing.assert_close(entropy, exact_entropy.float())
    assert_gradients_match(logps.sum(), exact.sum(), [hidden, weight], tolerance=4e-3)


def test_a_slice_of_the_hidden_states() -> None:
    hidden, weight, labels = make_inputs((3, 5))
    logps, _ = FusedLinearForPPO()(hidden[:, :-1], weight, labels[:, 1:], TAU)
    torch.testing.assert_close(logps, formula(hidden[:, :-1], weight, labels[:, 1:])[0].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "max"}, "choose one of none, sum, mean"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"pass \[..., H\] and \[...\] alike"),
        ({"temperature": 0.0}, "pass a positive number"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    hidden, weight, labels = make_inputs((3, 5))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels} | changes)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_vocabulary_split_over_processes_is_refused(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make_inputs((3, 5))
    group: Any = object()
    monkeypatch.setattr(dist, "get_world_size", lambda given: processes if given is group else 8)
    if processes == 1:
        logps, _ = linear_cross_entropy(hidden, weight, labels, TAU, "none", group)
        assert logps.shape == (15,)
        return
    with pytest.raises(ValueError, match="gather the weight"):
        linear_cross_entropy(hidden, weight, labels, TAU, "none", group)
