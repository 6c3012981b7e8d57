"""Rollouts without an engine, an updater whose step is the plain gradient, and the formula it must follow.

Letters: S sequences, N response tokens, V vocabulary.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tests.kernels.formulas import released_weight
from tests.small_models import VOCABULARY, own_model
from thinktwice_fast import parallel
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.model.lora import Adapters, add_adapters, is_adapter
from thinktwice_fast.model.policy import Policy, named_weights
from thinktwice_fast.model.sharding import frozen_copy, pair_models
from thinktwice_fast.records import Rollout
from thinktwice_fast.thinktuning_options import ThinkTuningOptions
from thinktwice_fast.update.updater import Updater

TEMPERATURE = 0.8


def rollouts(count: int, seed: int = 0, longest: int = 24) -> list[Rollout]:
    """Random ones of mixed lengths; every fourth has advantage 0."""
    numbers = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [numbers.randrange(VOCABULARY) for _ in range(length)]

    made = []
    for number in range(count):
        response = ids(numbers.randint(1, longest))
        advantage = 0.0 if number % 4 == 3 else numbers.choice([-1.0, -0.25, 0.5, 0.75])
        logps = [-numbers.uniform(4.0, 8.0) for _ in response]
        made.append(
            Rollout(
                number // 4,
                number,
                tuple(ids(numbers.randint(1, 20))),
                response,
                logps,
                [1.0] * len(response),
                advantage=advantage,
            )
        )
    return made


def config(**options: Any) -> Config:
    """Options by dotted name, with ``__`` for the dot."""
    made = Config()
    made.rollout.temperature = TEMPERATURE
    made.update.grad_clip = 0.0
    for name, value in options.items():
        owner, _, field = name.rpartition("__")
        assert hasattr(getattr(made, owner), field)
        setattr(getattr(made, owner), field, value)
    return made


def updater(
    made: Config,
    family: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    learning_rate: float = 1.0,
    prepare: Callable[[Any], None] = lambda model: None,
    adapt: Callable[[Any], Adapters] | None = None,
    model: Any = None,
) -> Any:
    """With plain gradient descent, so that weights before - weights after = learning rate * gradient.

    ``model`` is that of the family unless it is given. ``prepare`` gets it before it is sharded; ``adapt`` as in
    ``pair_models``.
    """
    model = own_model(family) if model is None else model
    prepare(model)
    shards = made.update.shard_processes
    reference = frozen_copy(own_model(family, seed=5), dtype, shards) if made.loss.beta else None
    models = pair_models(model, dtype, adapt, shards)
    models.sync()  # `adapt` may give adapters that are not 0 to begin with
    optimizer = torch.optim.SGD(models.masters.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Updater(models, reference, optimizer, schedule, made)


def adapt(model: Any, rank: int = 4, targets: tuple[str, ...] = ()) -> Adapters:
    """Give a model adapters that change what it computes, as after some training."""
    adapters = add_adapters(model, ModelOptions(lora_rank=rank, lora_alpha=6.0, lora_targets=targets), seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapters


def weights(model: Any) -> torch.Tensor:
    """All parameters in the order of transformers' names, as one float32 vector. Collective where they are sharded."""
    if isinstance(model, Policy):
        model = model.model
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    if not any(is_adapter(name) for name in whole):
        whole = named_weights(model, whole)
    return torch.cat([whole[name].detach().float().flatten() for name in sorted(whole)])


def gradients(model: Any) -> torch.Tensor:
    """Of all parameters, as ``weights`` has these; the model is of no use after that."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return weights(model)


def share(minibatches: Sequence[list[Rollout]]) -> list[list[Rollout]]:
    """This process's part of each: neighbouring stretches, as ``minibatch_slots`` gives them."""
    world, rank = parallel.world_size(), parallel.rank()
    return [part[rank * len(part) // world : (rank + 1) * len(part) // world] for part in minibatches]


def padded_logps(model: Any, batch: list[Rollout]) -> torch.Tensor:  # [N]
    """Log-probabilities of the response tokens by transformers' forward pass over a right-padded batch."""
    whole = [torch.tensor([*r.prompt, *r.response]) for r in batch]
    ids = pad_sequence(whole, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in whole], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits / TEMPERATURE
    table = logits.log_softmax(-1)
    return torch.cat(
        [
            table[row, len(r.prompt) - 1 + torch.arange(len(r.response)), torch.tensor(r.response)]
            for row, r in enumerate(batch)
        ]
    )


def formula(
    logps: torch.Tensor,  # [N]
    old_logps: torch.Tensor,  # [N]
    batch: list[Rollout],
    ref_logps: torch.Tensor | None = None,  # [N]
    beta: float = 0.0,
) -> torch.Tensor:
    """Token mean of `surrogate` + beta * k3, written out."""
    loss = surrogate(logps, old_logps, batch)
    if ref_logps is not None:
        difference = ref_logps - logps
        loss = loss + beta * (difference.exp() - difference - 1)
    return loss.mean()


def advantages_of(batch: list[Rollout]) -> torch.Tensor:  # [N]
    """Of each token."""
    return torch.tensor([rollout.advantage for rollout in batch for _ in rollout.response])


def surrogate(
    logps: torch.Tensor,  # [N]
    old_logps: torch.Tensor,  # [N]
    batch: list[Rollout],
) -> torch.Tensor:  # [N]
    """The clipped surrogate of each token: 0.2 below, 0.28 above, dual clip 3."""
    advantages = advantages_of(batch)
    ratio = (logps - old_logps).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    return torch.where(advantages < 0, torch.minimum(loss, -3.0 * advantages), loss)


def guide(batch: list[Rollout]) -> None:
    """A teacher wrote the second half of every third response."""
    for rollout in batch[::3]:
        half = len(rollout.response) // 2
        rollout.guide = [place >= half for place in range(len(rollout.response))]
        rollout.logps[half:] = [0.0] * (len(rollout.response) - half)


def shaped_formula(
    logps: torch.Tensor,  # [N]
    old_logps: torch.Tensor,  # [N]
    batch: list[Rollout],
    options: ThinkTuningOptions,
) -> torch.Tensor:  # [N]
    """`surrogate`, and ThinkTuning's shaping where a teacher wrote."""
    whole = options.released_code_compat
    flags = [whole or flag for r in batch for flag in (r.guide or [False] * len(r.response))]
    flags = [flag and bool(r.guide) for flag, r in zip(flags, (r for r in batch for _ in r.response), strict=True)]
    guided, advantages, p = torch.tensor(flags), advantages_of(batch), logps.detach().exp()
    gamma = (options.shaping_coefficient * advantages).clamp(-options.shaping_clamp, options.shaping_clamp)
    weight = p / (p + gamma)
    if options.released_code_compat:
        weight = torch.tensor([released_weight(own, options.shaping_clamp) for own in p.tolist()])
    ordinary = surrogate(logps, old_logps, batch)
    masked = (advantages < 0) & (p < options.shaping_min_probability)
    instead = ordinary if options.guide_fallback == "clip" else torch.zeros_like(ordinary)
    shaped = torch.where(masked, instead, -advantages * weight * (logps - logps.detach()).exp())
    return torch.where(guided, shaped, ordinary)


def change(made: Any, minibatches: list[list[Rollout]]) -> tuple[torch.Tensor, dict[str, float]]:
    """What ``policy_update`` adds to the weights, and its metrics."""
    before = weights(made.models.masters)
    metrics = made.policy_update(minibatches)
    return weights(made.models.masters) - before, metrics


def descend(
    model: Any,
    minibatches: list[list[Rollout]],
    learning_rate: float,
    loss_of: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """What plain gradient descent adds to the weights; ``loss_of`` gets [N] and the number of the mini-batch."""
    before = weights(model)
    for number, minibatch in enumerate(minibatches):
        model.zero_grad()
        loss_of(padded_logps(model, minibatch), number).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad
    return weights(model) - before


def assert_same_step(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Two weight changes are equal but for float32 rounding.

    Sums of some hundred terms through a few layers lose about 1e-6 of the norm; one token too many or too few in a
    normaliser would change 1e-2 of it.
    """
    assert expected.norm() > 0
    assert (got - expected).norm() <= 3e-5 * expected.norm()
