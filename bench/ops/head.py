"""What the two linear ops share: peers' log-probabilities, the truth of the gradients, and the products as a ceiling.

Each peer is called as its own trainer calls it, and gives log-probabilities [T] from a `LinearBatch`.

Letters: T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.contender import PLAIN, Contender, Outputs, from_project, needs
from bench.core.op import Ceiling
from bench.ops.inputs import LinearBatch, RowsCase, row_slices
from thinktwice_kernels import reference


def torch_logps(batch: LinearBatch) -> Tensor:
    """Whole logits, rounded to the type of the inputs."""
    return -F.cross_entropy((batch.hidden @ batch.weight.t()).float(), batch.targets, reduction="none")


def liger_scaled_logps(batch: LinearBatch) -> Tensor:
    function = from_project("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    return -function.apply(batch.hidden, batch.weight, batch.targets)


def trl_logps(batch: LinearBatch) -> Tensor:
    function = from_project("trl.kernels", "ChunkedLogProbFunction")
    columns = from_project("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    return function.apply(batch.hidden, batch.weight, None, batch.targets, 1.0, columns, None, 1.0, ("log_probs",))[0]


def cce_logps(batch: LinearBatch, filter_eps: str | None = "high") -> Tensor:
    cross_entropy = from_project("cut_cross_entropy", "linear_cross_entropy")
    options = {"impl": "cce" if batch.hidden.is_cuda else "torch_compile", "filter_eps": filter_eps}
    return -cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none", **options)


def verl_logps(batch: LinearBatch) -> Tensor:
    cross_entropy = from_project("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return cross_entropy(batch.hidden, batch.weight, batch.targets, 1.0, "none")[0]


PEERS: Mapping[str, Contender] = {
    PLAIN: Contender(torch_logps),
    "liger scaled CE": Contender(liger_scaled_logps, needs("liger_kernel")),
    "trl chunked": Contender(trl_logps, needs("trl")),
    "cce": Contender(cce_logps, needs("cut_cross_entropy"), compiled=True),
    "cce without filter": Contender(partial(cce_logps, filter_eps=None), needs("cut_cross_entropy", "cuda")),
    "verl": Contender(verl_logps, needs("verl", "cuda")),
}


def gradients(result: Tensor, batch: LinearBatch, incoming: Tensor | None = None) -> dict[str, Tensor]:
    d_hidden, d_weight = torch.autograd.grad(result, (batch.hidden, batch.weight), incoming)
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def true_logps(batch: LinearBatch) -> Tensor:
    """By the reference in float64, as all that is true here, some rows of logits at a time."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach().double()
    parts = []
    for rows in row_slices(hidden, weight.shape[0]):
        logps = reference.linear_logprobs(hidden[rows].double(), weight, batch.targets[rows])
        assert isinstance(logps, Tensor)
        parts.append(logps)
    return torch.cat(parts)


def true_gradients(
    batch: LinearBatch,
    d_logps: Tensor,  # [T]
) -> Outputs:
    hidden, weight = batch.hidden.detach(), batch.weight.detach().double()
    d_hidden, d_weight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(weight)
    for rows in row_slices(hidden, weight.shape[0]):
        piece = hidden[rows].double()
        logits = (piece @ weight.t()).requires_grad_()
        logps = reference.token_logprobs(logits, batch.targets[rows])
        (d_logits,) = torch.autograd.grad(logps, logits, d_logps[rows])
        d_hidden[rows] = d_logits @ weight
        d_weight.addmm_(d_logits.t(), piece)
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def flop(case: RowsCase) -> float:
    """6TVH: logits, gradient of the hidden states, gradient of the weight."""
    return 6.0 * case.shape.tokens * case.shape.vocabulary * case.shape.hidden


def _prepare(batch: LinearBatch) -> Callable[[], None]:
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.matmul(hidden, weight.t(), out=logits)
        torch.matmul(logits, weight, out=d_hidden)
        torch.matmul(logits.t(), hidden, out=d_weight)

    return products


PRODUCTS = Ceiling("torch.matmul, three products", _prepare, flop)
