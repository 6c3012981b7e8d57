"""Updates alone, of the same rollouts with each gain on and off: rollouts, updaters, and what their gradient has to be.

Letters: P prompts, G samples of each, N response tokens, V vocabulary.
"""

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

from bench.measure import Contender, Outputs, errors_of
from bench.rollout_cases import model_of
from bench.shapes import DEFAULT, LARGE, MEDIUM, Case, Size
from bench.step_cases import set_options
from thinktwice_fast import parallel
from thinktwice_fast.config import Config
from thinktwice_fast.model.agreement import as_transformers
from thinktwice_fast.model.loading import checkpoint_layers
from thinktwice_fast.model.policy import named_weights
from thinktwice_fast.model.sharding import ModelPair, cast_parameters, pair_models
from thinktwice_fast.records import Rollout
from thinktwice_fast.run.memory import keep_freed_memory
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import Updater
from thinktwice_kernels.reference import grpo_loss

_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class UpdateWorkload:
    model: str  # DEFAULT, or a shape that gets random weights
    prompts: int
    samples: int  # of each prompt
    prompt_tokens: int
    new_tokens: int
    without_signal: int = 0  # groups whose samples all have one reward
    checkpointing: bool = False

    @property
    def name(self) -> str:
        silent = f", {self.without_signal} without signal" if self.without_signal else ""
        lengths = f"{self.prompt_tokens} + {self.new_tokens} tokens, {self.shared:.2f} of them with shared prompts"
        return f"{self.model}, {self.prompts} x {self.samples} samples of {lengths}{silent},"

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def shared(self) -> float:
        """Share of the tokens that is left where a group's prompt is computed once."""
        whole = self.samples * (self.prompt_tokens + self.new_tokens - 1)
        return (self.prompt_tokens + self.samples * (self.new_tokens - 1)) / whole


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


def update_case(workload: UpdateWorkload, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """A case by the workload's name, under which ``workload_of`` finds it again."""
    _WORKLOADS[workload.name] = workload
    tokens = workload.sequences * workload.new_tokens
    return Case(workload.name, 0, 0, tokens, dtype, memory=dtype == torch.bfloat16, **options)


_WORKLOADS: dict[str, UpdateWorkload] = {}


def workload_of(case: Case) -> UpdateWorkload:
    return _WORKLOADS[case.head]


def update_batch(case: Case, device: torch.device) -> UpdateBatch:
    if not dist.is_initialized():
        parallel.start(device, _TIMEOUT)
    if device.type == "cpu":
        keep_freed_memory()  # as every run does
    workload = workload_of(case)
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
    tokens = sum(len(rollout.response) for rollout in rollouts)
    total = 0.0
    for _, members in groupby(rollouts, key=lambda rollout: rollout.group):
        group = list(members)
        ids = torch.tensor([[*r.prompt, *r.response] for r in group], device=batch.theirs.device)
        count = len(group[0].response)
        logits = batch.theirs(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=count).logits  # [G, n, V]
        logps = logits.log_softmax(2).gather(2, ids[:, -count:, None]).flatten()
        advantages = torch.tensor([rollout.advantage for rollout in group], device=ids.device)
        ends = torch.arange(len(group) + 1, dtype=torch.int32) * count
        loss, _ = grpo_loss(logps, advantages, ends, normalizer=tokens, epsilon_low=0.2, epsilon_high=0.28)
        loss.backward()
        total += float(loss.detach())
    gradient = _flat({name: p.grad for name, p in batch.theirs.named_parameters() if p.grad is not None})
    batch.theirs.zero_grad()
    loss_and_norm = {"loss": torch.tensor(total), "grad_norm": gradient.double().norm()}
    return {name: value.double() for name, value in {**loss_and_norm, "gradient": gradient}.items()}


def prefix_cases(size: Size) -> list[Case]:
    """A refine step's prompts: half as long again as the responses."""
    return _PREFIX[size]


def signal_cases(size: Size) -> list[Case]:
    return _SIGNAL[size]


def head_cases(size: Size) -> list[Case]:
    return _HEAD[size]


_BF16 = torch.bfloat16
_TOY = UpdateWorkload("toy", 2, 4, 18, 12)
_PREFIX: dict[Size, list[Case]] = {
    "toy": [update_case(_TOY)],
    "cpu": [
        # Responses as the default job's refine steps have them on average, and the longest that it allows.
        update_case(UpdateWorkload(DEFAULT, 32, 8, 48, 32), rounds=31, seconds=60.0),
        update_case(UpdateWorkload(DEFAULT, 16, 8, 96, 64), rounds=31, seconds=60.0),
        update_case(UpdateWorkload(MEDIUM, 1, 8, 96, 64)),
    ],
    "gpu": [update_case(UpdateWorkload(LARGE, 4, 8, 1536, 1024, checkpointing=True), _BF16)],
}
_SIGNAL: dict[Size, list[Case]] = {
    "toy": [update_case(replace(_TOY, without_signal=1))],
    "cpu": [update_case(UpdateWorkload(DEFAULT, 32, 8, 11, 32, without_signal=16))],
    "gpu": [update_case(UpdateWorkload(LARGE, 4, 8, 512, 1024, without_signal=2, checkpointing=True), _BF16)],
}
_HEAD: dict[Size, list[Case]] = {
    "toy": [update_case(_TOY)],
    "cpu": [update_case(UpdateWorkload(MEDIUM, 1, 8, 96, 64))],
    "gpu": [update_case(UpdateWorkload(LARGE, 4, 8, 512, 1024, checkpointing=True), _BF16)],
}
