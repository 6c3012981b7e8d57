"""What ``thinktwice-fast eval`` can be told."""

from dataclasses import dataclass
from typing import Literal

from thinktwice_fast.bounds import bounded
from thinktwice_fast.cli.options import ModelUse
from thinktwice_fast.errors import UserError

_CROSS = {"samples": 1, "temperature": 0.0, "refine_samples": 4, "refine_temperature": 0.7, "refine_top_p": 0.9}
_USUAL = {"samples": 64, "temperature": 0.7, "refine_samples": 1, "refine_temperature": 0.0, "refine_top_p": 1.0}
_SHIPPED = "tiny"
_SHIPPED_SET, _SHIPPED_PROBLEMS = "arithmetic:tm5", 500


@dataclass
class Models:
    """Which models are evaluated."""

    model: tuple[str, ...] = (_SHIPPED,)
    """Models: folders in transformers format, hub names, or "tiny" for the small model shipped here. Several are
    compared with the first one, problem by problem."""


@dataclass
class EvalOptions(ModelUse, Models):
    """What is evaluated, and how."""

    sets: tuple[str, ...] = ()
    """Ready sets (aime, amc, math500, ...; the beginning of a name will do), jsonl, parquet or csv files, hub data
    sets, "arithmetic:tm5". The shipped model's default is 500 held-out problems of the last."""
    data_root: str | None = None
    """Folder to read ready sets from instead of the hub, as in training."""
    ready_sets: str | None = None
    """YAML file with more ready sets, as in training."""
    split: str = "test"
    """Split of hub data sets that are not ready."""
    subset: str | None = None
    """Configuration name of hub data sets that are not ready."""
    question_column: str | None = None
    """Column with the question, of sets that are not ready; default: `prompt`, else `question`, else `problem`."""
    answer_column: str | None = None
    """Column with the gold answer, of sets that are not ready; default: `reward_model.ground_truth`, else `answer`,
    else `solution`."""
    instruction: str = ""
    """Text appended to the questions of sets that are not ready (how to give the answer)."""
    limit: int = bounded(0, least=0)
    """Use only the first so many problems of each set; 0 = all."""
    output: str = "runs/eval"
    """Folder for responses, grades, `results.json` and the chart; one that holds some is gone on with."""
    mode: Literal["two_pass", "self_refine", "reflexion", "self_verify", "self_correct", "s1"] = "two_pass"
    """What follows a solution: "two_pass" = the refinement that ThinkTwice trains; the others refine by prompts alone.
    "s1" = thinking is kept up until `max_tokens` are spent, then the answer is asked for."""
    samples: int | None = bounded(None, least=1, most=16384)
    """Solutions per problem. Default: 64; with `cross` 1."""
    k: tuple[int, ...] = bounded((1, 2, 4), least=1)
    """Report pass@k for these, of solutions and of the refinements of a problem."""
    refine_samples: int | None = bounded(None, least=0, most=1024)
    """Refinements of each solution; 0 = none. Default: 1; with `cross` 4."""
    refine_instruction: str = "default"
    """The user message after a solution with `mode` "two_pass", or a .txt or .md file with it; "default" = the one that
    training takes by default."""
    temperature: float | None = bounded(None, least=0)
    """Softmax temperature of solutions; 0 = always the likeliest token. Default: 0.7; with `cross` 0."""
    top_p: float = bounded(0.8, above=0, most=1)
    """Nucleus of solutions; 1 = off."""
    top_k: int = bounded(20, least=0)
    """Solutions: sample among the k likeliest tokens; 0 = off."""
    min_p: float = bounded(0.0, least=0, most=1)
    """Solutions: drop tokens less likely than this times the likeliest; 0 = off."""
    max_tokens: int = bounded(3000, least=1)
    """Longest solution, in tokens; less where the model's context leaves less."""
    refine_temperature: float | None = bounded(None, least=0)
    """Softmax temperature of what follows a solution. Default: 0; with `cross` 0.7."""
    refine_top_p: float | None = bounded(None, above=0, most=1)
    """Nucleus of what follows a solution. Default: 1; with `cross` 0.9."""
    refine_top_k: int = bounded(0, least=0)
    """What follows a solution: sample among the k likeliest tokens; 0 = off."""
    refine_max_tokens: int | None = bounded(None, least=1)
    """Longest response to each message after a solution, in tokens; default: `max_tokens`."""
    cross: bool = False
    """Have every model refine every model's solutions too."""
    reward: str = "math"
    """Grader, as in training; ready sets have their own."""
    reward_timeout: float = bounded(10.0, above=0, most=1_000_000)
    """Seconds a grader may take for one answer."""
    reward_workers: int | None = bounded(None, least=1)
    """Grader processes, per process; default as in training."""
    seed: int = bounded(0, least=0)
    """Seed of the sampling."""
    max_sequences: int = bounded(256, least=1)
    """Most responses that decode at once, per process."""
    export: Literal["inspect"] | None = None
    """"inspect" = also write an Inspect log (.json) per model and set, for `inspect view`."""


def resolve(options: EvalOptions) -> None:
    """Fill in the defaults that depend on other options.

    Raises:
        UserError: options that contradict each other.
    """
    for name, value in (_CROSS if options.cross else _USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.refine_max_tokens = options.refine_max_tokens or options.max_tokens
    assert options.samples is not None and options.refine_samples is not None
    most = options.samples * max(1, options.refine_samples)
    over = [k for k in options.k if k > most]
    if over and options.k != EvalOptions.k:
        raise UserError(f"--k {over[0]}: more than --samples {most}: draw more samples, or leave it out")
    if not options.model:
        raise UserError("--model: give at least one")
    for name in ("model", "sets"):
        twice = next((value for value in getattr(options, name) if getattr(options, name).count(value) > 1), None)
        if twice is not None:
            raise UserError(f"--{name}: {twice} stands there twice: leave one out")
    if not options.sets:
        if options.model != (_SHIPPED,):
            raise UserError("give --sets: ready ones (aime amc math500 ...) or files")
        options.sets, options.limit = (_SHIPPED_SET,), options.limit or _SHIPPED_PROBLEMS
    if options.cross and len(options.model) < 2:
        raise UserError("--cross with one model: give several to --model, or leave it out")
    if options.cross and not options.refine_samples:
        raise UserError("--cross with --refine_samples 0: leave one of them out")
    if options.refine_instruction != "default" and (options.mode != "two_pass" or not options.refine_samples):
        raise UserError("--refine_instruction would be ignored unless --mode two_pass refines: leave it out")
    if options.mode != "two_pass" and not options.refine_samples:
        raise UserError(f"--refine_samples 0 leaves nothing of --mode {options.mode}: leave one of them out")
