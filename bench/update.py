"""Updates of one set of rollouts, with what makes them fast on and off; all of them compute the same gradient."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bench.core.contender import OURS, Contender, Outputs
from bench.core.measure import errors_of
from bench.core.op import Case, Op, Precision, Size
from bench.core.targets import Target, time_share
from bench.models import DEFAULT, LARGE, MEDIUM, TOY, Judged, Workload, model_of, set_options, true_loss
from thinktwice_fast import parallel
from thinktwice_fast.config import Config
from thinktwice_fast.launch import keep_freed_memory
from thinktwice_fast.model.agreement import as_transformers
from thinktwice_fast.model.loading import checkpoint_layers
from thinktwice_fast.model.policy import named_weights
from thinktwice_fast.model.sharding import ModelPair, cast_parameters, pair_models
from thinktwice_fast.records import Rollout
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import Updater

_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class UpdateWorkload(Workload):
    without_signal: int = 0  # groups whose samples all have one reward
    checkpointing: bool = False

    def named(self, precision: str) -> str:
        silent = f", {self.without_signal} without signal" if self.without_signal else ""
        lengths = f"{self.prompt_tokens} + {self.new_tokens} tokens, {self.shared:.2f} of them with shared prompts"
        return (
            f"{self.model}, {self.prompts} x {self.samples} samples of {lengths}{silent}, T={self.tokens} {precision}"
        )

    @property
    def shared(self) -> float:
        """Share of the tokens that is left where a group's prompt is computed once."""
        whole = self.samples * (self.prompt_tokens + self.new_tokens - 1)
        return (self.prompt_tokens + self.samples * (self.new_tokens - 1)) / whole


UpdateCase = Case[UpdateWorkload]


@dataclass(frozen=True)
class UpdateBatch:
    """Rollouts, and a model that updates of learning rate 0 leave as it is."""

    workload: UpdateWorkload
    theirs: PreTrainedModel  # float32, as transformers runs it
    models: ModelPair  # the same weights as the trainer has them
    rollouts: tuple[Rollout, ...]
    kept: dict[object, Updater] = field(default_factory=dict)

    def with_signal(self) -> tuple[Rollout, ...]:
        """The rollouts, those without advantage with one."""
        return tuple(replace(rollout, advantage=rollout.advantage or 0.5) for rollout in self.rollouts)


def update_case(
    model: str, prompts: int, samples: int, prompt: int, new: int, precision: Precision = "fp32", **options: Any
) -> UpdateCase:
    own = {name: options.pop(name) for name in ("without_signal", "checkpointing") if name in options}
    workload = UpdateWorkload(model, prompts, samples, new, prompt, **own)
    return Case(workload, precision, memory=precision == "bf16", **options)


def update_batch(case: UpdateCase, device: torch.device) -> UpdateBatch:
    if not dist.is_initialized():
        parallel.start(device, _TIMEOUT)
    if device.type == "cpu":
        keep_freed_memory()  # as every run does
    workload = case.shape
    ours = cast_parameters(model_of(workload.model, case.dtype, device), torch.float32)
    theirs = as_transformers(ours, "sdpa")
    if workload.checkpointing:
        checkpoint_layers(ours)
    rollouts = made_rollouts(workload, theirs.config.vocab_size)
    return UpdateBatch(workload, theirs, pair_models(ours, case.dtype), rollouts)


def made_rollouts(workload: UpdateWorkload, vocabulary: int) -> tuple[Rollout, ...]:
    """Of random tokens."""
    numbers = random.Random(0)

    def ids(count: int) -> list[int]:
        return [numbers.randrange(vocabulary) for _ in range(count)]

    made = []
    for group in range(workload.prompts):
        prompt = tuple(ids(workload.prompt_tokens))
        for sample in range(workload.samples):
            advantage = 0.0 if group < workload.without_signal else numbers.uniform(-1.0, 1.0)
            response, logps = ids(workload.new_tokens), [-5.0] * workload.new_tokens
            number = group * workload.samples + sample
            made.append(Rollout(group, number, prompt, response, logps, logps, advantage=advantage))
    return tuple(made)


@dataclass(frozen=True)
class Updated:
    """A contender: the updater with these options of the configuration, by dotted name."""

    options: tuple[tuple[str, Any], ...] = ()
    all_with_signal: bool = False

    def __call__(self, batch: UpdateBatch) -> Outputs:
        metrics = self.updater(batch).policy_update([list(self.rollouts(batch))])
        return {name: torch.tensor(metrics[name], dtype=torch.float64) for name in ("loss", "grad_norm")}

    def rollouts(self, batch: UpdateBatch) -> tuple[Rollout, ...]:
        return batch.with_signal() if self.all_with_signal else batch.rollouts

    def updater(self, batch: UpdateBatch) -> Updater:
        """One for each batch, with an optimizer of its own."""
        if self not in batch.kept:
            config = Config()
            config.update.learning_rate = config.update.grad_clip = 0.0
            set_options(config, dict(self.options))
            optimizer, schedule = build_optimizer(batch.models.masters, config.update, total_steps=1)
            batch.kept[self] = Updater(batch.models, None, optimizer, schedule, config)
        return batch.kept[self]


def judge(batch: UpdateBatch, contender: Contender) -> dict[str, float]:
    """Relative errors of loss, gradient norm and gradient against plain torch over transformers' forward pass."""
    updated = contender.run
    assert isinstance(updated, Updated)
    optimizer = updated.updater(batch).optimizer
    gradients: list[Tensor] = []

    def note(*arguments: Any) -> None:
        model = batch.models.masters.model
        whole = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(_flat(named_weights(model, whole)))

    handle = optimizer.register_step_pre_hook(note)
    try:
        found = updated(batch)
    finally:
        handle.remove()
    return errors_of({**found, "gradient": gradients[0]}, _truth(batch, updated.rollouts(batch)))


def limits(dtype: torch.dtype) -> Mapping[str, float]:
    if dtype == torch.float32:
        # The norm is torch's, of millions of squares added up in float32.
        return {"loss": 1e-5, "grad_norm": 1e-4, "gradient": 1e-5}
    return {"loss": 0.05, "grad_norm": 0.05, "gradient": 0.05}


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """By transformers' names."""
    return torch.cat([gradients[name].detach().flatten().cpu() for name in sorted(gradients)])


def _truth(batch: UpdateBatch, rollouts: Sequence[Rollout]) -> Outputs:
    """A prompt's samples at a time."""
    groups = [
        [Judged(rollout.prompt, rollout.response, rollout.advantage) for rollout in members]
        for _, members in groupby(rollouts, key=lambda rollout: rollout.group)
    ]
    loss = true_loss(batch.theirs, groups)
    gradient = _flat({name: p.grad for name, p in batch.theirs.named_parameters() if p.grad is not None}).double()
    batch.theirs.zero_grad()
    return {"loss": torch.tensor(loss).double(), "grad_norm": gradient.norm(), "gradient": gradient}


Cases = Mapping[Size, Sequence[UpdateCase]]
# A refine step's prompts: half as long again as the responses.
_PREFIX: Cases = {
    "toy": [update_case(TOY, 2, 4, 18, 12)],
    "cpu": [
        # Responses as the default job's refine steps have them on average, and the longest that it allows.
        update_case(DEFAULT, 32, 8, 48, 32, rounds=31, seconds=60.0),
        update_case(DEFAULT, 16, 8, 96, 64, rounds=31, seconds=60.0),
        update_case(MEDIUM, 1, 8, 96, 64),
    ],
    "gpu": [update_case(LARGE, 4, 8, 1536, 1024, "bf16", checkpointing=True)],
}
_SIGNAL: Cases = {
    "toy": [update_case(TOY, 2, 4, 18, 12, without_signal=1)],
    "cpu": [update_case(DEFAULT, 32, 8, 11, 32, without_signal=16)],
    "gpu": [update_case(LARGE, 4, 8, 512, 1024, "bf16", without_signal=2, checkpointing=True)],
}
_HEAD: Cases = {
    "toy": _PREFIX["toy"],
    "cpu": [update_case(MEDIUM, 1, 8, 96, 64)],
    "gpu": [update_case(LARGE, 4, 8, 512, 1024, "bf16", checkpointing=True)],
}


def _op(name: str, cases: Cases, without: str, otherwise: Updated, **rest: Any) -> Op:
    contenders = {OURS: Contender(Updated()), without: Contender(otherwise)}
    return Op(name=name, cases=cases, inputs=update_batch, judge=judge, limits=limits, contenders=contenders, **rest)


_WITHOUT = "without shared prefix"
# 0.48 of the operations are left there. The default model's case of 96 + 64 tokens has no target: 0.496 of its
# operations are left. At the 100 M shape response tokens alone see the head, a quarter of the weights.
_TARGET = Target(
    "share of the time without, the default job's refinements", time_share(_WITHOUT), 0.5, at_most=True,
    only=f"{DEFAULT}, 32 x 8",
)  # fmt: skip
OPS = [
    _op(
        "update, shared prefix",
        _PREFIX,
        _WITHOUT,
        Updated((("update.shared_prefix", False),)),
        targets={"cpu": [_TARGET]},
    ),
    _op("update, skipping", _SIGNAL, "all groups with signal", Updated(all_with_signal=True)),
    _op(
        "update, fused head",
        _HEAD,
        "log-probabilities, then the loss",
        Updated((("update.old_logps", "rollout"),)),
    ),
]
