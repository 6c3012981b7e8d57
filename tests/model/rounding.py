"""Tolerances from the errors that float32 makes anyway."""

from collections.abc import Iterable

import torch

# Another order of sums makes other errors of the same size; the largest of several is some times the largest of others.
_ROOM = 8.0


def assert_as_exact(
    got: Iterable[torch.Tensor],  # float32
    peer: Iterable[torch.Tensor],  # float32, the same by other means
    exact: Iterable[torch.Tensor],  # float64
) -> None:
    """``got`` is, tensor by tensor, about as close to the float64 result as the float32 ``peer`` is."""
    for mine, other, truth in zip(got, peer, exact, strict=True):
        assert mine.dtype == other.dtype == torch.float32 and truth.dtype == torch.float64
        ulp = float(truth.abs().max()) * torch.finfo(torch.float32).eps
        allowed = _ROOM * max(float((other - truth).abs().max()), ulp)
        worst = float((mine - truth).abs().max())
        assert worst <= allowed, f"off by {worst:.3g}, where float32 costs {allowed / _ROOM:.3g}"
