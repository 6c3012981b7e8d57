"""Puts a run together: problems, model, engine, grader, optimizer, algorithm."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from thinktwice_fast import launch, parallel
from thinktwice_fast.algorithms.parts import ExampleStream, Parts
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.star import with_hint
from thinktwice_fast.algorithms.step import Algorithm
from thinktwice_fast.algorithms.thinktuning.teacher import SampledModel
from thinktwice_fast.config import ARITHMETIC, Config, optimizer_steps_per_step
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.arena import Arena, why_no_arena
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.loading import SHIPPED, LoadedModel, load_model, pick_device, pick_dtype
from thinktwice_fast.model.lora import add_adapters, check_library
from thinktwice_fast.model.policy import context_length
from thinktwice_fast.model.sharding import frozen_copy, pair_models, shards_weights, warm_up
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.run.device_memory import device_bytes, held_bytes
from thinktwice_fast.run.memory import SecondModel, predict
from thinktwice_fast.run.teacher import TeacherPlan, make_teacher, plan_teacher
from thinktwice_fast.run.workload import Evaluated, TeacherLoad, heaviest_load, phases
from thinktwice_fast.tasks.arithmetic import RECHECK, warm_start_example
from thinktwice_fast.tasks.evaluation_sets import evaluation_sets
from thinktwice_fast.tasks.grading import Graders
from thinktwice_fast.tasks.prompts import ChatFormat, instruction_text
from thinktwice_fast.tasks.source import Source
from thinktwice_fast.tasks.sources import load_source
from thinktwice_fast.tasks.stream import ProblemStream
from thinktwice_fast.update.optimizer import build_optimizer, check_optimizer
from thinktwice_fast.update.updater import Updater

_ENDLESS_SAMPLE = 64  # problems of an endless source that its longest prompt is judged by


@dataclass(frozen=True)
class Run:
    """Everything a run works with."""

    config: Config
    loaded: LoadedModel
    sampler: Sampler
    updater: Updater
    algorithm: Algorithm
    evaluation_sets: Mapping[str, Sequence[Problem]]
    notes: list[str]  # for the user: problems dropped, say
    predicted_bytes: int  # of memory at the peak, of each process


@dataclass(frozen=True)
class Prepared:
    """What is known, and found right, before anything trains."""

    device: torch.device
    dtype: torch.dtype  # to compute in
    loaded: LoadedModel
    chat: ChatFormat
    grader: Graders
    instruction: str  # to refine
    stream: ProblemStream
    usable: int | None  # problems; None = endless
    longest_prompts: dict[str, int]  # tokens, by phase
    evaluation_sets: Mapping[str, Sequence[Problem]]
    evaluated: Evaluated
    teacher: TeacherPlan | None
    notes: list[str]
    held_bytes: int  # before the model was loaded
    lends: bool  # updates have the KV cache's memory

    @property
    def teacher_load(self) -> TeacherLoad | None:
        """What is asked of a teacher in the policy's KV cache."""
        return self.teacher.in_cache if self.teacher is not None else None

    @property
    def second(self) -> SecondModel | None:
        """A teacher's model beside the policy's."""
        return self.teacher.second if self.teacher is not None else None


def prepare(
    config: Config,
    resources: ExitStack,
    load: Callable[[torch.device], LoadedModel],
    device: torch.device | None = None,
) -> Prepared:
    """Read the problems, load the model, and check that they fit together.

    Args:
        config: of the run.
        resources: ends the graders.
        load: gives the model.
        device: to compute on, where that is not for ``config`` and this machine to say: it is not here, and taken to
            have all that it may.

    Raises:
        UserError: anything wrong with problems, reward or model.
    """
    check_library(config.model)
    train = load_source(config.data)
    entries = evaluation_sets(config)
    sets = {name: entry.load() for name, entry in entries.items()}
    others = [entry.reward for entry in entries.values() if entry.reward is not None]
    stop = parallel.look_for_failure
    grader = resources.enter_context(Graders(config.reward, others, config.reward_timeout, config.reward_workers, stop))
    pretended = device is not None
    device = device or pick_device(config.model, launch.env_local_rank())
    dtype = pick_dtype(config.model, device)
    sharded = shards_weights(launch.env_world_size(), dtype, lora=bool(config.model.lora_rank))
    check_optimizer(config.update, sharded=sharded)
    before = held_bytes(device)
    loaded = load(device)
    options = config.model
    chat = ChatFormat(
        loaded.tokenizer, options.chat_template_args, options.strip_default_system, config.rollout.max_prompt_tokens
    )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    _check_context(loaded, longest)

    instruction = refine_instruction(config)
    prompts = _PromptLimit(config, chat, instruction, loaded.stop_ids)
    notes = [*recipe_notes(config), *chat.notes, *(note for source in (train, *sets.values()) for note in source.notes)]
    method = METHODS[config.algorithm]
    usable = prompts.usable(train, config.data.source, notes, refined="refine" in method.phases, hint=_hint(config))
    longest_prompts = {phase: prompts.longest["refine" if phase == "refine" else "solve"] for phase in method.phases}
    _check_enough(config, usable)
    if method.samples:  # else it grades nothing that it learns from
        check_answers(grader, config.data.source, (train[i] for i in ((0,) if usable is None else usable)))
    stream = ProblemStream(train, usable, config.seed, config.data.shuffle)
    held_out, evaluated = {}, Evaluated()
    for name, source in sets.items():
        usable_here = prompts.usable(source, name, notes) or ()
        problems = [replace(source[i], reward=entries[name].reward) for i in usable_here]
        check_answers(grader, name, problems)
        held_out[name] = problems
        evaluated = Evaluated(
            max(evaluated.problems, len(problems)),
            config.eval.samples,
            max(evaluated.prompt_tokens, prompts.longest["refine"]),
        )
    no_arena = why_no_arena(device) if device.type == "cuda" and not pretended else None
    if no_arena is not None:
        notes.append(f"the KV cache keeps its memory while training, which could have it: {no_arena}")
    teacher = None
    if config.algorithm == "thinktuning":
        teacher = plan_teacher(config, loaded, chat, longest_prompts["solve"], launch.env_world_size(), resources)
    return Prepared(
        device, dtype, loaded, chat, grader, instruction, stream,
        None if usable is None else len(usable), longest_prompts, held_out, evaluated, teacher, notes, before,
        device.type == "cuda" and no_arena is None,
    )  # fmt: skip


def build_run(config: Config, resources: ExitStack) -> Run:
    """Load and connect all parts. Starts the process group; ``resources`` ends it and stops the graders.

    Raises:
        UserError: anything wrong with problems, reward or model.
    """

    def load(device: torch.device) -> LoadedModel:
        parallel.start(device, config.run.distributed_timeout)
        resources.push(parallel.end)
        return load_model(config.model, config.seed, device)

    ready = prepare(config, resources, load)
    if ready.device.type == "cpu":
        launch.keep_freed_memory()
    loaded, dtype, chat, stream = ready.loaded, ready.dtype, ready.chat, ready.stream
    world = parallel.world_size()
    planned = phases(config, Flops.of(loaded.model), ready.longest_prompts, world)
    heaviest = heaviest_load(config, planned, ready.longest_prompts, ready.evaluated, world, ready.teacher_load)
    room = device_bytes(ready.device, launch.env_local_world_size())
    predicted = predict(
        config, loaded.model, ready.device, dtype, heaviest, world, ready.held_bytes, room, ready.second,
        lends=ready.lends,
    )  # fmt: skip
    shards = config.update.shard_processes
    reference = frozen_copy(loaded.model, dtype, shards) if config.loss.beta else None
    adapt = partial(add_adapters, options=config.model, seed=config.seed) if config.model.lora_rank else None
    models = pair_models(loaded.model, dtype, adapt, shards)
    warm_up(models)  # before the KV cache takes what is left
    engine = Engine(
        models.rollout,
        loaded.stop_ids,
        config.rollout,
        max(config.rollout.max_prompt_tokens + config.rollout.max_response_tokens, heaviest.teacher_tokens),
        heaviest.needed_blocks,
        predicted.reserve,
        decode=partial(chat.response_text, stop_ids=loaded.stop_ids),
        memory=partial(Arena, ready.device) if ready.lends else None,
    )
    sampler = Sampler(engine, chat, ready.grader, ready.instruction, loaded.stop_ids)
    optimizer, schedule = build_optimizer(models.masters, config.update, optimizer_steps(config))
    updater = Updater(models, reference, optimizer, schedule, config, engine.lend_memory)
    teacher = None
    if ready.teacher is not None:
        whole = reference.model if reference is not None and world == 1 else None
        teacher = make_teacher(
            ready.teacher, config, lambda: SampledModel(engine, chat, loaded.stop_ids, updater.version), whole, dtype
        )
    algorithm = METHODS[config.algorithm].build(
        Parts(
            config,
            stream,
            sampler,
            updater,
            _examples(config, stream),
            loaded.tokenizer.eos_token_id,
            teacher,
        )
    )
    return Run(config, loaded, sampler, updater, algorithm, ready.evaluation_sets, ready.notes, predicted.peak)


class _PromptLimit:
    """Which problems can be asked and refined within ``rollout.max_prompt_tokens``.

    A refine prompt holds the question, the longest response and the instruction, so a question that will be refined
    may take what these leave.
    """

    def __init__(self, config: Config, chat: ChatFormat, instruction: str, stop_ids: frozenset[int]):
        self._limit = config.rollout.max_prompt_tokens
        self._response = config.rollout.max_response_tokens
        self._chat = chat
        self._instruction = instruction
        self._stop_ids = stop_ids
        self.longest: dict[str, int] = {}  # tokens, by phase, of the source asked about last

    def usable(
        self, source: Source, name: str, notes: list[str], *, refined: bool = True, hint: str | None = None
    ) -> list[int] | None:
        """Indices of the problems short enough, with a note of how many are not; None for an endless source.

        Args:
            refined: an answer will be refined.
            hint: comes after the question (see `with_hint`).

        Raises:
            UserError: none is short enough.
        """
        size = source.size
        beside = self._beside_question(source[0]) if refined else 0
        less = " less a response and the refine instruction" if refined else ""

        def length(index: int) -> int:
            problem = source[index]
            return len(self._chat.prompt_ids(problem.messages if hint is None else with_hint(problem, hint)))

        if size is None:
            self._require_room(name, length(0), beside)
            self._note_longest(map(length, range(_ENDLESS_SAMPLE)), beside)
            return None
        lengths = [length(index) for index in range(size)]
        room = self._limit - beside
        kept = [index for index, length in enumerate(lengths) if length <= room]
        if not kept:
            self._require_room(name, min(lengths), beside)
        self._note_longest((lengths[index] for index in kept), beside)
        if len(kept) < size:
            notes.append(
                f"{name}: dropped {size - len(kept)} of {size} problems whose prompt is longer than {room} tokens "
                f"(--rollout.max_prompt_tokens {self._limit}{less})"
            )
        return kept

    def _note_longest(self, lengths: Iterable[int], beside: int) -> None:
        longest = max(lengths)
        quoted = self._response if self._chat.thinks and beside else 0  # an answer stands there twice
        self.longest = {"solve": longest, "refine": min(self._limit, longest + beside + quoted)}

    def _beside_question(self, problem: Problem) -> int:
        prompt = self._chat.prompt_ids(problem.messages)
        refine = self._chat.refine(problem.messages, prompt, (), "", self._instruction, self._stop_ids)
        return len(refine.ids) - len(prompt) + self._response

    def _require_room(self, name: str, shortest: int, beside: int) -> None:
        needed = shortest + beside
        if needed > self._limit:
            refining = f", and with a response and the refine instruction {needed}" if beside else ""
            raise UserError(
                f"{name}: no problem is left: the shortest prompt takes {shortest} tokens{refining}: set "
                "--rollout.max_prompt_tokens to at least that"
            )


def refine_instruction(config: Config) -> str:
    """``thinktwice.refine_instruction``, read where it is a file; arithmetic and the shipped model default to their own
    word.

    Raises:
        UserError: a file that can't be read, or is empty.
    """
    instruction = instruction_text(config.thinktwice.refine_instruction)
    at_home = config.data.source.startswith(ARITHMETIC) or config.model.path == SHIPPED
    return RECHECK if instruction == "default" and at_home else instruction


def recipe_notes(config: Config) -> list[str]:
    """A word to those who took another model but not its recipe, which would set these two options."""
    tiny, length, rate = Config(), config.rollout.max_response_tokens, config.update.learning_rate
    if config.model.path == SHIPPED or (length, rate) != (tiny.rollout.max_response_tokens, tiny.update.learning_rate):
        return []
    return [
        f"the small recipe's values apply (--rollout.max_response_tokens {length}, --update.learning_rate {rate:g}, "
        "...), made for the shipped model: better start from a --config file in configs/"
    ]


def check_answers(grader: Graders, name: str, problems: Iterable[Problem]) -> None:
    """Raise UserError for the first problem whose gold answer its grader can't compare with; ``name`` is the set's."""
    for problem in problems:
        try:
            grader.check(problem)
        except UserError as error:
            raise error.within(name) from error


def _check_enough(config: Config, usable: Sequence[int] | None) -> None:
    if usable is not None and len(usable) < config.problems_per_step:
        raise UserError(
            f"{config.data.source}: {len(usable)} problems are fewer than --problems_per_step "
            f"{config.problems_per_step}: give more problems or lower it"
        )


def _check_context(loaded: LoadedModel, longest: int) -> None:
    context = context_length(loaded.model)
    if context is not None and longest > context:
        raise UserError(
            f"--rollout.max_prompt_tokens and --rollout.max_response_tokens add up to {longest}, more than the model's "
            f"context of {context}: lower one of them"
        )


def optimizer_steps(config: Config) -> int:
    """Of the whole run."""
    reinforced = METHODS[config.algorithm].preset is not None
    return config.run.steps * (optimizer_steps_per_step(config) if reinforced else 1)


def _hint(config: Config) -> str | None:
    return config.star.hint if config.star.rationalize else None


def _examples(config: Config, stream: ProblemStream) -> ExampleStream:
    if config.data.source.startswith(ARITHMETIC):
        options, variant = config.sft, config.data.source.removeprefix(ARITHMETIC)
        return lambda position: warm_start_example(
            variant, position, config.seed, options.refine_fraction, options.draft_error_rates
        )

    def example(position: int) -> tuple[Sequence[Message], str]:
        problem = stream[position]
        assert problem.target is not None, "check_config asks for --data.target_column"
        return problem.messages, problem.target

    return example
