"""`token_logprobs` with the entropy, from logits: forward alone, and with backward."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import truth
from bench.inputs import LogitsBatch, logits_batch
from bench.measure import OURS, PLAIN, Ceiling, Contender, Op, Outputs
from bench.peers import compiled, needs
from bench.replay import CLOCK, Measured
from bench.shapes import Case, logits_cases
from thinktwice_kernels import token_logprobs

Call = Callable[[LogitsBatch], tuple[Tensor, Tensor]]


def ours(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
    return token_logprobs(batch.logits, batch.targets, return_entropy=True)


def plain(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
    return _plain(batch.logits, batch.targets)


def plain_compiled(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
    return compiled(_plain)(batch.logits, batch.targets)


def _plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def trl(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
    """One kernel on CUDA; elsewhere its two functions."""
    if batch.logits.is_cuda:
        module = importlib.import_module("trl.kernels.logprob_entropy")
        return module.selective_log_softmax_and_entropy(batch.logits, batch.targets)
    module = importlib.import_module("trl.trainer.utils")
    return module.selective_log_softmax(batch.logits, batch.targets), module.entropy_from_logits(batch.logits)


def forward(call: Call, batch: LogitsBatch) -> Outputs:
    with torch.no_grad():
        logps, entropy = call(batch)
    return {"logps": logps, "entropy": entropy}


def forward_and_backward(call: Call, batch: LogitsBatch) -> Outputs:
    logps, entropy = call(batch)
    incoming = (batch.d_logps.to(logps.dtype), batch.d_entropy.to(entropy.dtype))
    (d_logits,) = torch.autograd.grad((logps, entropy), batch.logits, incoming)
    return {"logps": logps.detach(), "entropy": entropy.detach(), "d_logits": d_logits}


def contenders(direction: Callable[[Call, LogitsBatch], Outputs]) -> dict[str, Contender]:
    return {
        OURS: Contender(partial(direction, ours)),
        PLAIN: Contender(partial(direction, plain)),
        "torch.compile": Contender(partial(direction, plain_compiled), compiled=True),
        "trl": Contender(partial(direction, trl), needs("trl")),
    }


def one_pass(case: Case) -> float:
    """Bytes of the logits."""
    return case.tokens * case.vocabulary * float(case.dtype.itemsize)


def _prepare_copy(batch: LogitsBatch) -> Callable[[], Any]:
    source = batch.logits.detach()
    return partial(torch.empty_like(source).copy_, source)


COPY = Ceiling("copy of the logits", _prepare_copy, lambda case: 2 * one_pass(case))
OPS = [
    Op(
        name="token_logprobs forward",
        module=__name__,
        cases=logits_cases,
        inputs=logits_batch,
        truth=partial(truth.token_logprobs, gradient=False),
        contenders=contenders(forward),
        work=one_pass,
        unit="GB/s",
        ceiling=COPY,
    ),
    Op(
        name="token_logprobs",
        module=__name__,
        cases=logits_cases,
        inputs=logits_batch,
        truth=partial(truth.token_logprobs, gradient=True),
        contenders=contenders(forward_and_backward),
        work=lambda case: 3 * one_pass(case),  # read, read again, gradient written
        unit="GB/s",
        ceiling=COPY,
    ),
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_token_logprobs(benchmark: Any, measured: Measured) -> None:
    measured.replay(benchmark)
