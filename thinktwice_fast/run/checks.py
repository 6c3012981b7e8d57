"""What can be wrong with the options alone, found before anything is loaded.

Bounds of single options stand with them in ``config.py``, those of the loss in ``thinktwice_kernels/options.py``, with
its combinations; what takes the model or the device to see is checked where these are loaded.
"""

import errno
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from thinktwice_fast import launch
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.algorithms.thinktuning.options import check_teacher, unused_options
from thinktwice_fast.bounds import check_bounds
from thinktwice_fast.config import (
    ARITHMETIC,
    LOSS_BOUNDS,
    Config,
    overlong_buffer,
    samples_per_optimizer_step,
    samples_per_step,
)
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.best import rising_metrics
from thinktwice_fast.run.metrics import AVERAGE
from thinktwice_fast.run.options import default_config
from thinktwice_fast.run.tracking import tracker_names
from thinktwice_fast.tasks.evaluation_sets import FROM_EVAL, evaluation_sets, source_kind
from thinktwice_fast.tasks.graders import GRADERS
from thinktwice_fast.tasks.tables import check_file
from thinktwice_fast.update.objective import loss_arguments

RUN_FILES = ("metrics.jsonl", "checkpoints")  # there from the first record on

# whether; the options that would then be ignored; the circumstance in words
_Ignored = tuple[bool, tuple[str, ...], str]
_REFINE_INSTRUCTION = "thinktwice.refine_instruction"  # evaluations refine too, whatever trains


def check_config(config: Config, world_size: int) -> None:
    """Raise UserError for options that contradict each other, don't divide, or would be ignored."""
    check_bounds(config)
    _check_meanings(config)
    _check_division(config, world_size)
    _check_ignored(config)
    _check_loss(config)
    _check_cache(config)
    _check_profile(config)


def check_files(config: Config) -> None:
    """Raise UserError for a file of problems that is missing, empty or of a kind that is not read."""
    for source in (config.data.source, *(entry.data.source for entry in evaluation_sets(config).values())):
        if source_kind(source) == "file":
            check_file(Path(source).expanduser(), source)


def check_output(config: Config, *, write: bool = True) -> None:
    """Raise UserError when the output folder can't be used: it holds another run, or can't be written.

    Args:
        write: make the folder and try it out; False leaves no trace and asks for the permission alone.
    """
    output = Path(config.output)
    try:
        if write:
            _try_out(output)
        else:
            _ask_permission(output)
    except OSError as error:
        raise UserError(f"--output {output}: can't write there ({error.strerror}): choose another folder") from error
    holds_a_run = any((output / name).exists() for name in RUN_FILES)
    resumed_here = config.resume == "auto" or (
        config.resume is not None and Path(config.resume).resolve().is_relative_to(output.resolve())
    )
    if holds_a_run and not resumed_here:
        raise UserError(
            f"--output {output} holds another run: continue it with --resume auto, or give another --output"
        )


def _try_out(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if launch.env_rank() == 0:  # it alone will write, and two that probe would take each other's file away
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()


def _ask_permission(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _check_meanings(config: Config) -> None:
    """Values that are each in range but mean nothing, or nothing together."""
    if METHODS[config.algorithm].preset is not None and config.samples_per_problem < 2:
        raise UserError("--samples_per_problem must be at least 2: an advantage compares the samples of a group")
    if config.algorithm == "thinktuning":
        check_teacher(config)
    if not config.sft.draft_error_rates:
        raise UserError("--sft.draft_error_rates []: give at least one rate")
    for name, entry in evaluation_sets(config).items():
        if name == AVERAGE:
            raise UserError(f"--eval.sets: {AVERAGE!r} can't name a set, it names their mean: rename it")
        check_bounds(entry.data, f"{entry.section}.")
    if config.rollout.exact and config.model.lora_rank:
        raise UserError(
            "--rollout.exact and --model.lora_rank: rollouts read merged weights, whose products round otherwise than "
            "adapters beside them: leave one of the two out"
        )
    if "" in config.rollout.stop_strings:
        raise UserError("--rollout.stop_strings: an empty string would end every response at once: leave it out")
    tracker_names(config.track)
    warmup, decay = config.update.warmup_steps, config.update.lr_decay_steps
    if config.update.lr_schedule != "constant" and 0 < decay <= warmup:
        raise UserError(
            f"--update.lr_decay_steps {decay} ends before the warm-up does: give more than --update.warmup_steps "
            f"{warmup}, or 0 for the run's length"
        )
    _check_best(config)
    _check_own_options(config)
    from_table = config.algorithm == "sft" and not config.data.source.startswith(ARITHMETIC)
    if from_table and (config.data.target_column is None or config.sft.refine_fraction):
        raise UserError(
            f"--algorithm sft from {config.data.source}: set --data.target_column to the column of the responses to "
            "learn, and --sft.refine_fraction 0 (only arithmetic sources have drafts)"
        )


def _check_best(config: Config) -> None:
    sets, name = list(evaluation_sets(config)), config.run.keep_best
    known = rising_metrics(sets, config.eval.samples if config.eval.temperature else 1)
    if name is not None and sets and name not in known:
        raise UserError(
            f"--run.keep_best {name}: not what this run evaluates and is better for when higher: give one of "
            f"{', '.join(known)}"
        )


def _check_own_options(config: Config) -> None:
    """What algorithms' own options mean beside others."""
    buffer, response = config.dapo.overlong_buffer_tokens or 0, config.rollout.max_response_tokens
    if config.algorithm == "dapo" and buffer > response:
        raise UserError(
            f"--dapo.overlong_buffer_tokens {buffer}: must be at most --rollout.max_response_tokens {response}"
        )
    penalised = config.algorithm == "dapo" and overlong_buffer(config) and config.dapo.overlong_penalty
    if penalised and config.loss.scale_rewards == "mean":
        raise UserError(
            "--loss.scale_rewards mean and --dapo.overlong_penalty: rewards that a penalty brings below 0 have no mean "
            "to divide by: choose another scale, or --dapo.overlong_buffer_tokens 0"
        )
    if config.algorithm != "star":
        return
    star, batch = config.star, config.problems_per_step
    if star.problems_per_iteration % batch:
        raise UserError(
            f"--star.problems_per_iteration {star.problems_per_iteration}: take a multiple of --problems_per_step "
            f"{batch}, which is what a step samples"
        )
    if star.rationalize and "{answer}" not in star.hint:
        raise UserError(f"--star.hint {star.hint!r}: write {{answer}} where the gold answer is to stand")
    if config.update.lr_schedule != "constant" and not config.update.lr_decay_steps:
        raise UserError(
            f"--update.lr_schedule {config.update.lr_schedule} with --algorithm star, whose every iteration starts "
            "anew: give --update.lr_decay_steps"
        )


def _check_division(config: Config, world: int) -> None:
    problems, samples = config.problems_per_step, samples_per_step(config) // config.problems_per_step
    if problems < world:
        raise UserError(
            f"{world} processes but only {problems} problems a step: start fewer processes, or raise "
            "--problems_per_step"
        )
    if problems % world:
        raise UserError(
            f"--problems_per_step {problems} does not divide over {world} processes: take a multiple of {world}"
        )
    shards = config.update.shard_processes
    if shards and world % shards:
        raise UserError(
            f"--update.shard_processes {shards} does not divide {world} processes: take a divisor of {world}, or 0 for "
            "all of them"
        )
    minibatch = samples_per_optimizer_step(config)
    groups = "pairs of groups" if config.thinktwice.pairing == "joint" else "groups"
    if METHODS[config.algorithm].preset is not None:
        if minibatch % samples or problems % (minibatch // samples):
            raise UserError(
                f"--update.minibatch_sequences {minibatch} does not divide a phase of {problems} x {samples} samples "
                f"into whole {groups}: take a multiple of {samples} that divides {problems * samples}"
            )
        if minibatch // samples % world:
            raise UserError(
                f"--update.minibatch_sequences {minibatch} ({minibatch // samples} {groups}) does not divide over "
                f"{world} processes: take a multiple of {samples * world}, or 0 for the whole phase"
            )


def _check_ignored(config: Config) -> None:
    """An option that differs from its default and would change nothing is a misunderstanding."""
    default = default_config(config.algorithm)
    for condition, names, when in (*_ignored_in_training(config), *_ignored_in_evaluation(config)):
        for name in (inner for group in names if condition for inner in _inner(config, group)):
            # null is "off" or "as usual", and that is so anyway
            if _value(config, name) not in (None, _value(default, name)):
                raise UserError(
                    f"--{name} would be ignored {when}: leave it out (null or its default in place of a "
                    "--config file's), or change the other"
                )


def _ignored_in_training(config: Config) -> list[_Ignored]:
    name, kind = config.algorithm, source_kind(config.data.source)
    method, sft = METHODS[name], name == "sft"
    arithmetic = kind == "arithmetic"
    lacking = [bound for bound in LOSS_BOUNDS["clip"] if bound not in LOSS_BOUNDS[config.loss.policy_loss]]
    rewards = {config.reward} | {entry.reward for entry in evaluation_sets(config).values()} - {None}
    file_only = ("data.question_column", "data.context_column", "data.answer_column", "data.choices_column",
                 "data.wrong_columns", "data.choices_seed", "data.target_column", "data.instruction")  # fmt: skip
    sections = {other.section for other in METHODS.values() if other.section} | {"thinktuning"}
    return [
        *((True, _own_options(config, section), f"with --algorithm {name}")
          for section in sorted(sections - {method.section})),
        (method.preset is None, ("loss", "rollout.exact", "update.minibatch_sequences", "update.old_logps"),
         f"with --algorithm {name}"),
        (config.thinktwice.pairing == "joint", ("thinktwice.refine_every",), "with --thinktwice.pairing joint"),
        (sft, ("samples_per_problem", "rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.min_p"),
         "with --algorithm sft"),
        (sft and not evaluation_sets(config), ("reward", "reward_timeout", "reward_workers", "rollout.max_sequences",
               "rollout.max_batch_tokens", "rollout.cache_tokens", "rollout.decoder", "rollout.stop_strings"),
         "with --algorithm sft and no --eval.sets"),
        ("refine" not in method.phases and not evaluation_sets(config), (_REFINE_INSTRUCTION,),
         f"with --algorithm {name} and no --eval.sets"),
        (not sft, ("data.target_column",), "without --algorithm sft"),
        (overlong_buffer(config) == 0, ("dapo.overlong_penalty",), "with --dapo.overlong_buffer_tokens 0"),
        (not config.star.rationalize, ("star.hint",), "without --star.rationalize true"),
        (sft and not arithmetic, ("sft.draft_error_rates",), "unless --data.source is arithmetic"),
        (sft and arithmetic, ("data.limit", "data.shuffle"), "with --algorithm sft and an arithmetic --data.source"),
        (arithmetic, file_only, "with an arithmetic --data.source"),
        (arithmetic and not config.data.limit, ("data.shuffle",), "with an endless --data.source (no --data.limit)"),
        (kind != "hub", ("data.subset", "data.split"), "unless --data.source is a hub dataset"),
        *((True, (f"thinktuning.{name}",), when) for name, when in unused_options(config)),
        (config.model.lora_rank == 0, ("model.lora_alpha", "model.lora_targets"), "without --model.lora_rank"),
        (all(reward in GRADERS and GRADERS[reward].verify is None for reward in rewards),
         ("reward_timeout", "reward_workers"), f"with --reward {config.reward}"),
        (True, tuple(f"loss.{name}" for name in lacking), f"with --loss.policy_loss {config.loss.policy_loss}"),
        (config.loss.beta == 0, ("loss.kl_estimator",), "with --loss.beta 0"),
        (samples_per_optimizer_step(config) == samples_per_step(config), ("update.old_logps",),
         f"with a single mini-batch (--update.minibatch_sequences {samples_per_optimizer_step(config)})"),
        (config.rollout.exact or config.update.old_logps == "rollout", ("loss.rollout_is",),
         "where rollouts' log-probabilities are the old ones (--rollout.exact true, --update.old_logps rollout)"),
        (config.rollout.exact, ("rollout.decoder", "update.old_logps"), "with --rollout.exact true"),
        (config.update.lr_schedule == "constant", ("update.lr_decay_steps",), "with --update.lr_schedule constant"),
        (not config.run.save, ("resume", "run.checkpoint_every", "run.keep_checkpoints", "run.keep_best"),
         "with --run.save false"),
    ]  # fmt: skip


def _own_options(config: Config, section: str) -> tuple[str, ...]:
    """The options of an algorithm's section that no other algorithm reads."""
    return tuple(name for name in _inner(config, section) if name != _REFINE_INSTRUCTION)


def _ignored_in_evaluation(config: Config) -> list[_Ignored]:
    sets = evaluation_sets(config).values()
    followed = {option for entry in sets for option in entry.from_eval}
    drawn_only = ("eval.top_p", "eval.top_k", "eval.samples")
    return [
        (not sets, ("eval.every", "eval.temperature", *drawn_only, "run.keep_best"), "without --eval.sets"),
        (config.eval.temperature == 0, drawn_only, "with --eval.temperature 0"),
        (True, tuple(f"eval.{option}" for option in FROM_EVAL if option not in followed),
         "where none of --eval.sets leaves it open (arithmetic ones, files and ready sets have no use for some)"),
        (not any(entry.ready for entry in sets), ("eval.ready_sets", "eval.data_root"),
         "where --eval.sets names no ready set"),
    ]  # fmt: skip


def _check_loss(config: Config) -> None:
    # Imported here because it takes seconds, and most mistakes are found before.
    import torch

    from thinktwice_kernels import grpo_loss

    one = torch.zeros(1)
    try:
        grpo_loss(
            one,
            one,
            torch.tensor([0, 1], dtype=torch.int32),
            old_logps=one,
            rollout_logps=one,
            ref_logps=one if config.loss.beta else None,
            entropy=one if config.loss.entropy_coef else None,
            guide_mask=one,
            **loss_arguments(config.loss, config.rollout.max_response_tokens, config.thinktuning, guided=True),
        )
    except ValueError as error:
        raise UserError(f"loss options: {error}") from error


def _check_cache(config: Config) -> None:
    if not config.rollout.cache_tokens:
        return
    from thinktwice_fast.rollout.engine import BLOCK_SIZE

    options = config.rollout
    longest = options.max_prompt_tokens + options.max_response_tokens
    if 0 < -(-options.cache_tokens // BLOCK_SIZE) < -(-longest // BLOCK_SIZE):
        raise UserError(
            f"--rollout.cache_tokens {options.cache_tokens}: one sequence may take {longest} "
            "(--rollout.max_prompt_tokens and --rollout.max_response_tokens): give at least that, or 0"
        )


def _check_profile(config: Config) -> None:
    if config.profile is None:
        return
    from thinktwice_fast.run.profiling import profiled_steps

    if profiled_steps(config.profile)[-1] > config.run.steps:
        raise UserError(
            f"--profile {config.profile}: the run ends with step {config.run.steps}: give earlier steps, or more "
            "--run.steps"
        )


def _inner(config: Config, name: str) -> list[str]:
    """The options of a section; of anything else the name itself."""
    value = _value(config, name)
    return [f"{name}.{field.name}" for field in fields(value)] if is_dataclass(value) else [name]


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
