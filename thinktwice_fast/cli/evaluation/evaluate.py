"""An evaluation from its options to its figures: which model draws what, and into which folder."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thinktwice_fast import launch, parallel
from thinktwice_fast.cli.evaluation.drawing import Amounts, Drawing, Policy, Times, check_prompts, seed_of
from thinktwice_fast.cli.evaluation.models import fingerprint, folder_name
from thinktwice_fast.cli.evaluation.modes import Mode, make_mode
from thinktwice_fast.cli.evaluation.options import EvalOptions
from thinktwice_fast.cli.evaluation.progress import Progress
from thinktwice_fast.cli.evaluation.replies import GradeBook, Replies, load_replies, mark
from thinktwice_fast.cli.evaluation.report import report
from thinktwice_fast.cli.evaluation.sets import ProblemSet, load_sets
from thinktwice_fast.cli.evaluation.store import NONE, Key, Store
from thinktwice_fast.cli.evaluation.summary import Cell
from thinktwice_fast.cli.inference import Inference
from thinktwice_fast.cli.options import ModelChoice
from thinktwice_fast.config import ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import pick_device
from thinktwice_fast.model.policy import context_length
from thinktwice_fast.records import Problem, Sampling
from thinktwice_fast.rollout.engine import blocks_for, bytes_per_block
from thinktwice_fast.run.build import check_answers
from thinktwice_fast.run.device_memory import device_bytes
from thinktwice_fast.run.figures import Solved
from thinktwice_fast.tasks.grading import Graders
from thinktwice_fast.tasks.prompts import instruction_text

_LONGEST_WAIT = 7 * 24 * 3600.0  # seconds that a process waits for others, whose share may take longer
_CACHE_SHARE = 0.5  # of the main memory that a KV cache on the CPU may take


@dataclass
class Evaluation:
    """What all models have in common."""

    options: EvalOptions
    sets: list[ProblemSet]
    graders: Graders
    progress: Progress
    times: Times
    solve: Sampling
    refine: Sampling
    cells: list[Cell] = field(default_factory=list)  # what was found, by solver, refiner and set

    def folder(self, model: str, problems: ProblemSet, solver: str | None = None) -> Path:
        """Of a model's responses to a set; with ``solver``, of its refinements of that one's solutions."""
        folder = Path(self.options.output) / folder_name(model) / problems.name
        return folder if solver is None else folder / f"of-{folder_name(solver)}"

    def store(self, model: str, problems: ProblemSet, solver: str | None = None) -> Store:
        """Of the same."""
        return Store(self.folder(model, problems, solver), parallel.rank())

    def share(self, problems: ProblemSet) -> dict[int, Problem]:
        """This process's part of a set, by number."""
        numbers = range(parallel.rank(), len(problems.problems), parallel.world_size())
        return {number: problems.problems[number] for number in numbers}

    def wanted(self, problems: ProblemSet) -> Callable[[Key], bool]:
        """Which responses of a set are this process's."""
        share, options = self.share(problems), self.options
        samples, refinements = options.samples or 0, options.refine_samples or 0
        return lambda key: key.problem in share and key.sample < samples and key.refinement < refinements


def evaluate(options: EvalOptions, began: float) -> None:
    """Draw, grade and report; see ``cli.eval``. ``began`` is when the command did, on ``time.perf_counter``.

    Raises:
        UserError: on every process, when anything fails on any.
    """
    with ExitStack() as resources:
        device = pick_device(ModelOptions(device=options.device), launch.env_local_rank())
        parallel.start(device, _LONGEST_WAIT)
        resources.push(parallel.end)
        sets = load_sets(options)
        rewards = [problems.reward for problems in sets]
        graders = Graders(
            options.reward, rewards, options.reward_timeout, options.reward_workers, parallel.look_for_failure
        )
        resources.enter_context(graders)
        for problems in sets:
            check_answers(graders, problems.name, problems.problems)
        progress = resources.enter_context(Progress(shown=parallel.rank() == 0))
        evaluation = Evaluation(options, sets, graders, progress, Times(began=began), *samplings(options))
        for problems in sets:
            for note in problems.notes:
                progress.message(note)
        _check_folders(evaluation)
        _plan_progress(evaluation)
        evaluation.times.start_up = time.perf_counter() - began
        for model in options.model:
            _evaluate_model(evaluation, model, None)
        if options.cross:
            for model in reversed(options.model):
                _evaluate_model(evaluation, model, [other for other in options.model if other != model])
        progress.close()
        if parallel.rank() == 0:
            report(evaluation.cells, evaluation.sets, options, evaluation.times, evaluation.folder)


def samplings(options: EvalOptions) -> tuple[Sampling, Sampling]:
    """How solutions and what follows them are drawn."""
    assert options.temperature is not None and options.refine_temperature is not None
    assert options.refine_top_p is not None and options.refine_max_tokens is not None
    return (
        Sampling(options.temperature, options.top_p, options.top_k, options.min_p, options.max_tokens),
        Sampling(
            options.refine_temperature, options.refine_top_p, options.refine_top_k,
            max_tokens=options.refine_max_tokens,
        ),
    )  # fmt: skip


def _check_folders(evaluation: Evaluation) -> None:
    """Refuse what was drawn by other settings, before anything is loaded."""
    error = None
    if parallel.rank() == 0:
        try:
            for model in evaluation.options.model:
                settings = _settings(evaluation, model)
                for problems in evaluation.sets:
                    evaluation.store(model, problems).agree(settings)
        except UserError as caught:
            error = caught
    parallel.agree(error)


def _settings(evaluation: Evaluation, model: str) -> dict[str, Any]:
    """All that responses are drawn by, but for the prompts, which solutions carry a mark of."""
    options = evaluation.options
    return {
        "model": model,
        "weights": fingerprint(model),
        "mode": options.mode,
        "seed": options.seed,
        "dtype": options.dtype,
        "sampling": asdict(evaluation.solve),
        "refine_sampling": asdict(evaluation.refine),
        "refine_instruction": instruction_text(options.refine_instruction),
        "chat_template_args": options.chat_template_args,
    }


def _plan_progress(evaluation: Evaluation) -> None:
    options = evaluation.options
    samples, refinements = options.samples or 0, options.refine_samples or 0
    cells = len(options.model) * (len(options.model) if options.cross else 1)
    of_problem = samples * (len(options.model) + cells * refinements)
    evaluation.progress.total = of_problem * sum(len(evaluation.share(problems)) for problems in evaluation.sets)


def _evaluate_model(evaluation: Evaluation, model: str, solvers: Sequence[str] | None) -> None:
    """Have a model solve and refine every set, or refine the solutions of others."""
    began = time.perf_counter()
    options = evaluation.options
    gc.collect()  # the model before, where it hangs in circles
    inference = Inference(
        ModelChoice(
            model,
            options.chat_template,
            options.chat_template_args,
            options.strip_default_system,
            options.device,
            options.dtype,
        )
    )
    instruction = inference.refine_instruction(options.refine_instruction)
    chat, stop_ids = inference.chat, inference.stop_ids
    context = context_length(inference.model)
    mode = make_mode(options.mode, chat, stop_ids, instruction, evaluation.solve, evaluation.refine, context)
    longest = _longest(evaluation, inference, mode)
    blocks = options.max_sequences * blocks_for(longest)
    if inference.model.device.type == "cpu":
        memory = device_bytes(inference.model.device, launch.env_local_world_size())
        blocks = min(blocks, max(blocks_for(longest), int(_CACHE_SHARE * memory) // bytes_per_block(inference.model)))
    policy = Policy(inference.engine(options.max_sequences, longest, blocks), chat, stop_ids, longest)
    for note in chat.notes:
        evaluation.progress.message(f"{model}: {note}")
    gc.freeze()  # what is there now stays meanwhile: no collection looks through it
    evaluation.times.start_up += time.perf_counter() - began
    try:
        for problems in evaluation.sets:
            if solvers is None:
                _solve_set(evaluation, policy, mode, model, problems)
            for solver in solvers or ():
                _refine_set(evaluation, policy, mode, model, solver, problems)
    finally:
        gc.unfreeze()


def _longest(evaluation: Evaluation, inference: Inference, mode: Mode) -> int:
    asked = [problem.messages for problems in evaluation.sets for problem in evaluation.share(problems).values()]
    lengths = [len(inference.chat.prompt_ids(messages)) for messages in asked] or [1]
    messages = asked[0] if asked else ({"role": "user", "content": ""},)
    needed = mode.longest(max(lengths), messages)
    context = context_length(inference.model)
    return needed if context is None else min(needed, context)


def _solve_set(evaluation: Evaluation, policy: Policy, mode: Mode, model: str, problems: ProblemSet) -> None:
    store, replies = evaluation.store(model, problems), Replies()

    def work() -> None:
        nonlocal replies
        share = evaluation.share(problems)
        note = check_prompts(policy, share, problems.name)
        if note:
            evaluation.progress.message(note)
        prompts = {number: mark(policy.chat.prompt_ids(problem.messages)) for number, problem in share.items()}
        replies = load_replies(store, evaluation.wanted(problems), problems.reward, prompts.__getitem__)
        _draw(evaluation, policy, mode, problems, store, replies, None)

    _together(work)
    evaluation.cells.append(Cell(model, model, problems.name, _gathered(evaluation, problems, replies, replies)))


def _refine_set(
    evaluation: Evaluation, policy: Policy, mode: Mode, model: str, solver: str, problems: ProblemSet
) -> None:
    wanted, store = evaluation.wanted(problems), evaluation.store(model, problems, solver)
    solutions = replies = Replies()

    def work() -> None:
        nonlocal solutions, replies
        bases = evaluation.store(solver, problems)
        solutions = load_replies(bases, lambda key: key.refinement == NONE and wanted(key), problems.reward)
        replies = load_replies(store, wanted, problems.reward)
        _draw(evaluation, policy, mode, problems, store, replies, solutions.texts)

    _together(work)
    found = _gathered(evaluation, problems, solutions, replies)
    evaluation.cells.append(Cell(solver, model, problems.name, found))


def _draw(
    evaluation: Evaluation,
    policy: Policy,
    mode: Mode,
    problems: ProblemSet,
    store: Store,
    replies: Replies,
    bases: Mapping[Key, str] | None,
) -> None:
    options, progress = evaluation.options, evaluation.progress
    progress.skip(len(replies.by_key))
    seed = seed_of(options.seed, problems.name)
    amounts = Amounts(options.samples or 0, options.refine_samples or 0, evaluation.solve, seed)
    book = GradeBook(evaluation.graders, store, replies, problems.reward)
    share = evaluation.share(problems)
    drawing = Drawing(policy, mode, amounts, share, store, replies, book, problems.reward, progress.advance)
    try:
        drawing.run(evaluation.times, bases)
    finally:
        store.close()


def _together(work: Callable[[], None]) -> None:
    """Work of every process for itself, which ends everywhere when it fails anywhere."""
    error: UserError | parallel.OtherFailed | None = None
    try:
        work()
    except (UserError, parallel.OtherFailed) as caught:
        error = caught
    parallel.agree(error)


def _gathered(
    evaluation: Evaluation, problems: ProblemSet, solutions: Replies, refinements: Replies
) -> list[list[Solved]]:
    """What all processes found, by problem. Collective."""
    samples, refined = evaluation.options.samples or 0, evaluation.options.refine_samples or 0
    both = Replies(solutions.by_key | refinements.by_key)
    own = [(number, both.solved(number, samples, refined)) for number in evaluation.share(problems)]
    return [solved for _, solved in sorted(parallel.gather_flat(own), key=lambda pair: pair[0])]
