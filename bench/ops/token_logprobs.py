"""`token_logprobs` with the entropy, from logits: forward alone, and with backward.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.core.ceilings import copy_of
from bench.core.contender import OURS, PLAIN, Contender, Outputs, compiled, from_project, needs
from bench.core.op import Ceiling, Op, Size
from bench.core.targets import Target, own
from bench.ops.inputs import TARGET_LOGIT, RowsCase, head_case, normals, row_slices
from thinktwice_kernels import reference, token_logprobs


@dataclass(frozen=True)
class LogitsBatch:
    logits: Tensor  # [T, V]
    targets: Tensor  # [T] int64
    d_logps: Tensor  # [T]
    d_entropy: Tensor  # [T]


Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits, targets -> log-probabilities, entropies


def logits_batch(case: RowsCase, device: torch.device) -> LogitsBatch:
    normal, generator = normals(device)
    tokens, vocabulary = case.shape.tokens, case.shape.vocabulary
    logits = normal(tokens, vocabulary)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    logits[torch.arange(tokens, device=device), targets] += TARGET_LOGIT
    return LogitsBatch(logits.to(case.dtype).requires_grad_(), targets, normal(tokens), normal(tokens))


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(logits, targets, return_entropy=True)


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def trl(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One kernel on CUDA; elsewhere its two functions."""
    if logits.is_cuda:
        return from_project("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")(logits, targets)
    logps, entropy = (from_project("trl.trainer.utils", f) for f in ("selective_log_softmax", "entropy_from_logits"))
    return logps(logits, targets), entropy(logits)


def forward(call: Call, batch: LogitsBatch) -> Outputs:
    with torch.no_grad():
        logps, entropy = call(batch.logits, batch.targets)
    return {"logps": logps, "entropy": entropy}


def forward_and_backward(call: Call, batch: LogitsBatch) -> Outputs:
    logps, entropy = call(batch.logits, batch.targets)
    incoming = (batch.d_logps.to(logps.dtype), batch.d_entropy.to(entropy.dtype))
    (d_logits,) = torch.autograd.grad((logps, entropy), batch.logits, incoming)
    return {"logps": logps.detach(), "entropy": entropy.detach(), "d_logits": d_logits}


def truth(batch: LogitsBatch) -> Outputs:
    """By the reference in float64, some rows at a time."""
    parts: dict[str, list[Tensor]] = {"logps": [], "entropy": [], "d_logits": []}
    for rows in row_slices(batch.logits, batch.logits.shape[1]):
        leaf = batch.logits.detach()[rows].double().requires_grad_()
        logps, entropy = reference.token_logprobs(leaf, batch.targets[rows], return_entropy=True)
        incoming = (batch.d_logps[rows].double(), batch.d_entropy[rows].double())
        (d_logits,) = torch.autograd.grad((logps, entropy), leaf, incoming)
        parts["logps"].append(logps.detach())
        parts["entropy"].append(entropy.detach())
        parts["d_logits"].append(d_logits.float())  # whose rounding is far below the error of what is compared with it
    return {name: torch.cat(values) for name, values in parts.items()}


def forward_truth(batch: LogitsBatch) -> Outputs:
    return {name: value for name, value in truth(batch).items() if name != "d_logits"}


def one_pass(case: RowsCase) -> float:
    """Bytes of the logits."""
    return case.shape.tokens * case.shape.vocabulary * float(case.dtype.itemsize)


CASES: dict[Size, list[RowsCase]] = {
    "toy": [head_case("toy", 64, only_targets=True, memory=False)],
    "cpu": [head_case("Qwen3 vocabulary", 512, memory=False)],
    "gpu": [head_case("Qwen3-4B", tokens) for tokens in (8192, 1024)],
}


def _op(
    name: str,
    direction: Callable[[Call, LogitsBatch], Outputs],
    held_against: Callable[[LogitsBatch], Outputs],
    passes: int,
    target: str,
) -> Op:
    return Op(
        name=name,
        cases=CASES,
        inputs=logits_batch,
        truth=held_against,
        contenders={
            OURS: Contender(partial(direction, ours)),
            PLAIN: Contender(partial(direction, plain)),
            "torch.compile": Contender(lambda batch: direction(compiled(plain), batch), compiled=True),
            "trl": Contender(partial(direction, trl), needs("trl")),
        },
        work=lambda case: passes * one_pass(case),
        unit="GB/s",
        ceiling=Ceiling("copy of the logits", lambda batch: copy_of(batch.logits), lambda case: 2 * one_pass(case)),
        targets={"cuda": [Target(target, own("of_ceiling"), 0.85)]},
    )


OPS = [
    _op("token_logprobs forward", forward, forward_truth, 1, "share of the copy bandwidth, forward"),
    # Read, read again, gradient written.
    _op("token_logprobs", forward_and_backward, truth, 3, "share of the copy bandwidth, with backward"),
]
