"""A causal language model as the trainer sees it: one packed row in, head results out.

It is the trainer's own ``Transformer``, or, of an architecture that this does not know, transformers' module.

Letters: T tokens of the row, N rows of hidden state that go to the head, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import Attention, causal_attention
from thinktwice_fast.model.lora import Adapters
from thinktwice_fast.model.transformer import Product, Transformer, heads_of
from thinktwice_kernels import linear_logits

R = TypeVar("R")
Model = Transformer | PreTrainedModel
# hidden [N, H], head weight [V, H], head bias [V] or None -> anything
Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], R]


class Policy(nn.Module):
    """The model with its head opened, so that a fused loss can start from the hidden state.

    The head's result is computed inside ``forward``: that is where FSDP2 has the head's weight whole.
    """

    adapters: Adapters | None = None  # that the model has been given

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(
        self,
        input_ids: torch.Tensor,  # int64 [T]
        position_ids: torch.Tensor,  # int64 [T]
        attention: Attention,
        select: torch.Tensor,  # int64 [N], rows of the T whose hidden state the head gets
        head: Head[R],
        product: Product = linear,  # of the decoder's weights; a Transformer alone takes another
    ) -> R:
        """Run the decoder over the row and ``head`` over the selected hidden states; gives the head's result."""
        if isinstance(self.model, Transformer):
            hidden = self.model(input_ids, position_ids, attention, product)
            return head(_rows(hidden, select), self.model.head, None)
        assert product is linear, "transformers' modules multiply by themselves"
        hidden = self.model.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], attention=attention, use_cache=False
        ).last_hidden_state[0]
        output: Any = self.model.get_output_embeddings()
        return head(_rows(hidden, select), output.weight, output.bias)


def _rows(hidden: torch.Tensor, select: torch.Tensor) -> torch.Tensor:  # [T, H], [N] -> [N, H]
    # Some rows are taken several times. On the CPU the gradient of indexing adds them up element by element; on a GPU
    # that of index_select adds in any order.
    return hidden.index_select(0, select) if hidden.device.type == "cpu" else hidden[select]


def linear_head(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
) -> torch.Tensor:  # float32 [N, V]
    """Logits in float32, as the loss computes them: rounded to bfloat16 they would be another distribution."""
    return linear_logits(hidden, weight, bias)


def decoder_layers(model: Model) -> Iterator[nn.Module]:
    """The blocks that the model repeats: what is sharded, and what is recomputed, as one."""
    if isinstance(model, Transformer):
        return iter(model.layers)
    names = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def attention_heads(model: Model) -> tuple[int, int, int]:
    """Query heads, key-value heads and the size of each, by the model's config."""
    return heads_of(model.config.get_text_config())


def context_length(model: Model) -> int | None:
    """Tokens that a prompt and its response may have together, by the model's config; None where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def named_weights(model: Model, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` of the model under the names that transformers gives them."""
    return dict(iterate_named(model, weights.items()))


def iterate_named(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same one after another, with no need of them all at a time."""
    return model.split(weights) if isinstance(model, Transformer) else iter(weights)


@torch.no_grad()
def check_head_is_linear(model: PreTrainedModel) -> None:
    """Raise UserError for an architecture whose logits are more than ``hidden @ weight.T + bias``.

    Scaled or soft-capped logits (Cohere, Gemma 2) would train another distribution than the model's own.
    """
    ids = torch.arange(4, device=model.device) % model.config.get_text_config().vocab_size
    attention = causal_attention([4], model.device)
    whole = model(input_ids=ids[None], position_ids=torch.arange(4, device=model.device)[None], attention=attention)
    opened = Policy(model)(ids, torch.arange(4, device=model.device), attention, ids.new_tensor(range(4)), linear_head)
    if not torch.allclose(whole.logits[0].float(), opened.float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(model).__name__} transforms its logits after the output layer (scaling or a soft cap), "
            "which is not supported",
            "use another architecture",
        )
