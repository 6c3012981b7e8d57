"""Floating-point operations of a forward pass, from a model's configuration and its weights' shapes.

The products alone: what surrounds them is bound by memory. A backward pass takes twice a forward pass.
"""

from collections import Counter
from dataclasses import dataclass

from thinktwice_fast.model.policy import Model, attention_heads, decoder_layers


@dataclass(frozen=True)
class Flops:
    """What each part of a forward pass takes."""

    token: int  # through the decoder layers' weights
    target: int  # through the head, which makes logits where a token is predicted
    key: dict[int, int]  # for every key that a query sees, summed over the layers of each window; 0 = sees all

    @classmethod
    def of(cls, model: Model) -> "Flops":
        """Of a decoder; its experts, where it has several, all count."""
        config = model.config.get_text_config()
        matrices = (p for layer in decoder_layers(model) for p in layer.parameters() if p.dim() > 1)
        heads, _, head_dim = attention_heads(model)
        layers = Counter(windows(config))
        return cls(
            token=2 * sum(matrix.numel() for matrix in matrices),
            target=2 * config.hidden_size * config.vocab_size,
            key={window: 4 * heads * head_dim * count for window, count in layers.items()},
        )

    def segment(self, tokens: int, before: int, targets: int) -> int:
        """Of ``tokens`` tokens that see each other causally and ``before`` earlier ones, ``targets`` of them
        predicting."""
        attention = sum(cost * _keys_seen(tokens, before, window) for window, cost in self.key.items())
        return tokens * self.token + targets * self.target + attention


def windows(config: object) -> list[int]:
    """Of each layer, positions that a query sees; 0 = all."""
    layers: int = getattr(config, "num_hidden_layers")  # noqa: B009 (transformers' configs declare no attributes)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window: int = getattr(config, "sliding_window", None) or 0
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _keys_seen(tokens: int, before: int, window: int) -> int:
    """By all queries together; the query at position p sees the last ``window`` of p + 1 positions, 0 = all."""
    unlimited = tokens if not window else min(max(window - before, 0), tokens)
    return unlimited * before + unlimited * (unlimited + 1) // 2 + (tokens - unlimited) * window
