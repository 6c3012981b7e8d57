"""How much of the logits exists at a time.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch

# Bytes of logits and of their gradient. A GPU wants matrix products of thousands of rows; a CPU wants some hundreds,
# because each product also reads or writes the whole weight once.
DEFAULT_BUDGET = {"cpu": 256 << 20, "cuda": 4 << 30}


def rows_per_tile(vocabulary: int, bytes_per_logit: int, device: torch.device, budget: int | None = None) -> int:
    """How many rows of logits fit into the budget (None: the device's default); at least one."""
    if budget is None:
        budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])
    return max(1, budget // max(1, vocabulary * bytes_per_logit))


def tiles(start: int, stop: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` that cover start to stop, as equal as they can be."""
    pieces = -(-(stop - start) // rows)
    for piece in range(pieces):
        yield slice(
            start + (stop - start) * piece // pieces,
            start + (stop - start) * (piece + 1) // pieces,
        )
