"""The model's own modules over the paged cache, as they stand."""

import torch
from torch.nn.functional import linear

from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.lists import int64, upload
from thinktwice_fast.model.paged import PagedKVCache, Plan
from thinktwice_fast.model.policy import Model, Policy, linear_head
from thinktwice_fast.model.products import PackedProducts
from thinktwice_fast.rollout.step import Runner


class ModuleRunner(Runner):
    """The model as it is, over the cache.

    Args:
        model: to be decoded with.
        cache: of its keys and values.
        exact: with exact products (``model/products.py``), those of the head among them.
    """

    def __init__(self, model: Model, cache: PagedKVCache, *, exact: bool = False):
        self._policy = Policy(model)
        self._cache = cache
        self._packed = PackedProducts() if exact else None
        self._product = self._packed or linear
        self._head = self._packed or linear_head
        self.exact = exact

    def refresh(self) -> None:
        if self._packed:
            self._packed.refresh()

    @torch.inference_mode()
    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:
        ids, rows = upload([int64(tokens), int64(last)], self._policy.device)
        return self._policy(
            ids,
            plan.positions,
            PagedAttention(self._cache, plan),
            rows,
            self._head,
            self._product,
        )
