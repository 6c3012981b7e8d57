"""The teacher that the options name: checked and planned for before the policy is there, then put together."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from thinktwice_fast.algorithms.thinktuning.endpoint import EndpointTeacher
from thinktwice_fast.algorithms.thinktuning.function import FunctionTeacher
from thinktwice_fast.algorithms.thinktuning.guided import guided_count
from thinktwice_fast.algorithms.thinktuning.options import CHECKPOINT, teacher_kind
from thinktwice_fast.algorithms.thinktuning.prompt import TeacherPrompt, load_prompt, shared_prefix, teacher_ids
from thinktwice_fast.algorithms.thinktuning.teacher import ModelTeacher, SampledModel, Teacher
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import LoadedModel, load_model, outline_model
from thinktwice_fast.model.policy import Model, attention_heads, context_length
from thinktwice_fast.model.sharding import cast_parameters
from thinktwice_fast.rollout.engine import BLOCK_SIZE, Engine, blocks_for
from thinktwice_fast.run.memory import SecondModel
from thinktwice_fast.run.workload import TeacherLoad
from thinktwice_fast.tasks.prompts import ChatFormat

T = TypeVar("T")
_REQUESTS_AT_ONCE = 16  # at a time, where a teacher can't use the policy's KV cache


@dataclass(frozen=True)
class TeacherPlan:
    """What is known of a teacher before the policy has its weights."""

    kind: str  # see `teacher_kind`
    ready: Teacher | None = None  # one that is no model here
    load: TeacherLoad | None = None  # of one that is
    second: SecondModel | None = None  # what that one takes beside the policy
    prompt: TeacherPrompt | None = None

    @property
    def in_cache(self) -> TeacherLoad | None:
        """What is asked in the policy's KV cache."""
        return None if self.second is not None and self.second.cache_blocks else self.load


def plan_teacher(
    config: Config, policy: LoadedModel, chat: ChatFormat, longest_prompt: int, world: int, stack: ExitStack
) -> TeacherPlan:
    """Check all of a teacher that can be checked now; one that is no model here is ready then.

    Args:
        config: of the run.
        policy: may be on the meta device.
        chat: the policy's.
        longest_prompt: tokens of the longest question's.
        world: number of processes.
        stack: ends a function's process.

    Raises:
        UserError: no such model, server or function, or prompts beyond the model's context.
    """
    options, kind = config.thinktuning, teacher_kind(config.thinktuning.teacher)
    if kind == "function":
        assert options.teacher is not None
        return TeacherPlan(kind, stack.enter_context(FunctionTeacher(options.teacher, options.teacher_timeout)))
    prompt = load_prompt(options.shots)
    if kind == "endpoint":
        endpoint = EndpointTeacher(prompt, options)
        endpoint.check()
        return TeacherPlan(kind, endpoint)
    model = policy
    if kind == "checkpoint":
        model = _as_teacher(partial(outline_model, _model_options(config)))
        chat = ChatFormat(model.tokenizer)
    load = _teacher_load(config, prompt, chat, longest_prompt, world)
    _check_room(config, model, load)
    second = None
    if kind == "checkpoint":
        own = 0 if _cache_shape(model.model) == _cache_shape(policy.model) else load.blocks(_REQUESTS_AT_ONCE)
        second = SecondModel(model.model, copied=True, cache_blocks=own)
    elif kind == "frozen":
        second = SecondModel(model.model, copied=not _reference_serves(config, world), cache_blocks=0)
    return TeacherPlan(kind, load=load, second=second, prompt=prompt)


def make_teacher(
    plan: TeacherPlan, config: Config, live: Callable[[], SampledModel], reference: Model | None, dtype: torch.dtype
) -> Teacher:
    """The teacher that was planned.

    Args:
        plan: see `plan_teacher`.
        config: of the run.
        live: gives the policy as it is.
        reference: whole initial weights, where a KL term keeps them.
        dtype: compute type.

    Raises:
        UserError: a checkpoint that can't be loaded.
    """
    if plan.ready is not None:
        return plan.ready
    assert plan.prompt is not None and plan.load is not None
    policy, load, prompt = live(), plan.load, plan.prompt
    # Engine and cache have room for what was planned. A response may take more tokens than the policy drew: bytes that
    # are no text are encoded otherwise, and another tokenizer has tokens of its own.
    asked = replace(config.thinktuning, teacher_prompt_tokens=load.prompt_tokens)

    def unchanging(model: Model, chat: ChatFormat, stop_ids: frozenset[int]) -> SampledModel:
        """A model that does not change."""
        assert plan.second is not None
        own = plan.second.cache_blocks
        options = replace(config.rollout, exact=False, cache_tokens=own * BLOCK_SIZE)
        still = cast_parameters(model, dtype).requires_grad_(False)
        shared = None if own else policy.engine.cache
        return SampledModel(Engine(still, stop_ids, options, load.tokens, cache=shared), chat, stop_ids, version=0)

    def loaded(options: ModelOptions) -> LoadedModel:
        return load_model(options, config.seed, policy.engine.model.device)

    def initial() -> SampledModel:
        policy.engine.lend_memory()  # to be loaded in the type that it was saved in may take more than it will
        model = reference or loaded(replace(config.model, activation_checkpointing=False)).model
        return unchanging(model, policy.chat, policy.stop_ids)

    if plan.kind == "checkpoint":
        other = _as_teacher(partial(loaded, _model_options(config)))
        checkpoint = unchanging(other.model, ChatFormat(other.tokenizer), other.stop_ids)
        return ModelTeacher(lambda: checkpoint, prompt, asked)
    return ModelTeacher(_Frozen(live, initial) if plan.kind == "frozen" else live, prompt, asked)


class _Frozen:
    """The initial policy: the live one until it moves, from then on weights of its own, made when first needed.

    After a resume the policy has moved, and what is read is the same model again.
    """

    def __init__(self, live: Callable[[], SampledModel], initial: Callable[[], SampledModel]):
        self._live = live
        self._initial = initial
        self._sampled: SampledModel | None = None

    def __call__(self) -> SampledModel:
        if self._sampled is not None:
            return self._sampled
        live = self._live()
        if live.version == 0:
            return live
        self._sampled = self._initial()
        return self._sampled


def _reference_serves(config: Config, world: int) -> bool:
    """Whether a KL term's reference is whole on each process, so that it can be sampled from."""
    return config.loss.beta > 0 and world == 1


def _model_options(config: Config) -> ModelOptions:
    path = (config.thinktuning.teacher or "").removeprefix(CHECKPOINT)
    return ModelOptions(path, device=config.model.device, compute_dtype=config.model.compute_dtype)


def _as_teacher(load: Callable[[], T]) -> T:
    """What ``load`` gives, its complaints under the option that they are about."""
    try:
        return load()
    except UserError as error:
        raise UserError(error.line({"model.path": "thinktuning.teacher"})) from error


def _cache_shape(model: Model) -> tuple[int, int, int]:
    _, heads, head_dim = attention_heads(model)
    return model.config.get_text_config().num_hidden_layers, heads, head_dim


def _teacher_load(
    config: Config, prompt: TeacherPrompt, chat: ChatFormat, longest_prompt: int, world: int
) -> TeacherLoad:
    options, groups = config.thinktuning, config.problems_per_step // world
    one, other = (teacher_ids(chat, prompt.messages(text, text, None), sys.maxsize) for text in ("0", "1"))
    request = max(len(chat.encode(shot.request)) for shot in prompt.shots) if options.one_behaviour else 0
    longest = len(one) + longest_prompt + config.rollout.max_response_tokens + request
    whole = longest <= options.teacher_prompt_tokens  # else some are cut, and begin elsewhere
    return TeacherLoad(
        groups * guided_count(config.samples_per_problem, options.fraction),
        min(longest, options.teacher_prompt_tokens),
        len(shared_prefix([one, other])) if whole else 0,
        options.teacher_answer_tokens,
    )


def _check_room(config: Config, loaded: LoadedModel, load: TeacherLoad) -> None:
    asks = f"prompts of up to {load.prompt_tokens} tokens and answers of {load.answer_tokens}"
    context = context_length(loaded.model)
    if context is not None and load.tokens > context:
        raise UserError(
            f"--thinktuning.teacher {config.thinktuning.teacher}: {asks} are longer than the model's context of "
            f"{context}: lower --thinktuning.teacher_prompt_tokens or --thinktuning.teacher_answer_tokens"
        )
    cache_tokens = config.rollout.cache_tokens
    if 0 < blocks_for(cache_tokens) < blocks_for(load.tokens):
        raise UserError(
            f"--rollout.cache_tokens {cache_tokens}: a teacher's {asks} do not fit it: give at least {load.tokens}, "
            "or 0"
        )
