"""Guided tokens for every implementation of their loss: tables of weights, and the released code's formula at random.

Letters: T tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.formulas import released_weight

Options = dict[str, Any]
# batch, options -> the gradient [T] of its log-probabilities
Gradient = Callable[[dict[str, Any], Options], Tensor]
# p, A, w; where the token is masked, 0
TABLE = [
    (1e-4, 1.0, 0.285714),
    (1e-3, 1.0, 0.8),
    (0.02, 1.0, 0.987654),
    (0.5, 1.0, 0.9995002),
    (1e-4, -1.0, 0.0),
    (1e-3, -1.0, 0.0),
    (0.02, -1.0, 1.0126582),
    (0.5, -1.0, 1.0005003),
    (1e-3, 9.0, 0.5),  # gamma stops at 1e-3
]
RELEASED_TABLE = [
    (1e-4, 1.0, 1.0001),  # below |gamma|; without the guard -0.111
    (9.9e-4, 1.0, 1.0001),  # -99
    (2e-3, 9.0, 2.0),
    (0.5, 1.0, 1.002004),
    (0.5, -1.0, 1.002004),
    (1.0, 1.0, 1.001001),
    (1.002, 1.0, 0.9999),  # what rounding may give; without the guard 0.999
    (1e-4, -1.0, 0.0),
]


def check_tables(gradient: Gradient, highest: float = math.inf) -> None:
    """The gradient of each token is -A w; p is at most ``highest``."""
    for table, options in ((TABLE, {}), (RELEASED_TABLE, {"released_code_compat": True})):
        p, advantages, w = (torch.tensor(column) for column in zip(*table, strict=True))
        own = p <= highest
        batch = {
            "logps": p[own].double().log(),
            "advantages": advantages[own].double(),
            "cu_seqlens": torch.tensor([0, int(own.sum())]),
            "guide_mask": torch.ones(int(own.sum()), dtype=torch.bool),
        }
        got = gradient(batch, {**options, "normalizer": 1.0})
        torch.testing.assert_close(got, (-advantages * w)[own].double(), rtol=2e-6, atol=0)


def check_released_code(gradient: Gradient, exp: Callable[[Tensor], Tensor] = torch.exp, fused: bool = False) -> None:
    """10,000 tokens, guided, masked and ordinary: each one's gradient is that of the released code, in float64.

    A guided sequence and one that is not, since one guided token makes a sequence guided. ``exp`` is what the
    implementation takes for it, to the last bit: at p = |gamma| nothing else is the same. ``fused``: its
    log-probabilities are not these to the last bit.
    """
    rng = torch.Generator().manual_seed(0)
    count = 10_000

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng, dtype=torch.float64)

    logps = uniform(-14.0, 0.0)
    logps[:6] = torch.tensor([-800.0, -800.0, 0.0, 0.0, math.log(1e-4), math.log(9.9e-4)])  # p = 0 and 1 among them
    if fused:
        logps[2:4] = -1e-6  # where p is 1 the logits have no gradient to tell it by
    else:
        logps[6:8] = math.log(1e-3)
    # No log-probability has 1e-3 for its exponential to the last bit, so that |gamma| is what the nearest has.
    clamp = float(exp(torch.full((count,), math.log(1e-3), dtype=torch.float64))[6])
    advantages = torch.randn(count, generator=rng, dtype=torch.float64)
    advantages[0:8:2] = advantages[0:8:2].abs()
    advantages[1:8:2] = -advantages[1:8:2].abs()
    guided = count // 2
    batch = {
        "logps": logps,
        "advantages": advantages,
        "cu_seqlens": torch.tensor([0, guided, count]),
        "guide_mask": torch.arange(count) == 3,
        "old_logps": logps + uniform(-1.5, 1.5),
    }
    p, ratios = exp(logps).tolist(), (logps - batch["old_logps"]).exp().tolist()
    assert fused or p[6] == p[7] == clamp
    for fallback in ("mask", "clip"):
        options = {"released_code_compat": True, "guide_fallback": fallback, "shaping_clamp": clamp}
        got = gradient(batch, {**options, "dual_clip": 3.0, "normalizer": 1.0})
        weights = [released_weight(own, clamp) for own in p]
        tokens = zip(p, weights, advantages.tolist(), ratios, strict=True)
        want = [_released(*token, t < guided, fallback) for t, token in enumerate(tokens)]
        assert got.isfinite().all()
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-12)


def _released(p: float, weight: float, a: float, ratio: float, guided: bool, fallback: str) -> float:
    """The derivative of a token's loss with respect to its log-probability."""
    masked = a < 0 and p < 0.01
    if guided and not masked:
        return -a * weight
    if guided and fallback == "mask":
        return 0.0
    bound = (a > 0 and ratio > 1.2) or (a < 0 and (ratio < 0.8 or ratio > 3.0))
    return 0.0 if bound else -a * ratio


def check_unguided(loss_of: Callable[[dict[str, Any], Options], list[Tensor]], batch: dict[str, Any]) -> None:
    """A guide mask without a guided token changes no bit of what ``loss_of`` returns."""
    want = loss_of(batch, {"dual_clip": 3.0})
    empty = {**batch, "guide_mask": torch.zeros_like(batch["loss_mask"])}
    for more in ({}, {"guide_fallback": "clip"}, {"released_code_compat": True}):
        got = loss_of(empty, {"dual_clip": 3.0, **more})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
