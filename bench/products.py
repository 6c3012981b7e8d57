"""The ceiling of the linear ops: torch's own products of the same three shapes, and nothing else.

Letters: T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable

import torch

from bench.inputs import LinearBatch
from bench.measure import Ceiling
from bench.shapes import Case


def flop(case: Case) -> float:
    """6TVH: logits, gradient of the hidden states, gradient of the weight."""
    return 6.0 * case.tokens * case.vocabulary * case.hidden


def _prepare(batch: LinearBatch) -> Callable[[], None]:
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.matmul(hidden, weight.t(), out=logits)
        torch.matmul(logits, weight, out=d_hidden)
        torch.matmul(logits.t(), hidden, out=d_weight)

    return products


MATMUL = Ceiling("torch.matmul, three products", _prepare, flop)
