"""What ``thinktuning.teacher`` may say, and what its options mean beside each other; needs no torch."""

from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError

CHECKPOINT = "checkpoint:"
_KINDS = "frozen, live, checkpoint:PATH, endpoint, or my_file.py:function"
_ENDPOINT = (
    "endpoint_url", "endpoint_model", "endpoint_key_variable", "endpoint_retries", "endpoint_concurrency",
    "endpoint_step_timeout",
)  # fmt: skip
_UNUSED = {
    "frozen": ("teacher_timeout", *_ENDPOINT),
    "live": ("teacher_timeout", *_ENDPOINT),
    "checkpoint": ("teacher_timeout", *_ENDPOINT),
    "endpoint": ("teacher_prompt_tokens",),
    "function": ("shots", "one_behaviour", "teacher_prompt_tokens", "teacher_answer_tokens", *_ENDPOINT),
}  # by kind of teacher


def teacher_kind(teacher: str | None) -> str:
    """ "frozen", "live", "checkpoint", "endpoint" or "function".

    Raises:
        UserError: none of them.
    """
    if teacher is None:
        raise UserError(f"--algorithm thinktuning needs a teacher: give --thinktuning.teacher {_KINDS}")
    if teacher in ("frozen", "live", "endpoint"):
        return teacher
    if teacher.startswith(CHECKPOINT) and teacher != CHECKPOINT:
        return "checkpoint"
    path, _, function = teacher.rpartition(":")
    if path.endswith(".py") and function.isidentifier():
        return "function"
    raise UserError(f"--thinktuning.teacher {teacher}: no teacher: use {_KINDS}")


def check_teacher(config: Config) -> None:
    """Raise UserError where a ThinkTuning run's options contradict each other."""
    options = config.thinktuning
    kind = teacher_kind(options.teacher)
    if kind == "endpoint" and options.endpoint_step_timeout >= config.run.distributed_timeout:
        raise UserError(
            f"--thinktuning.endpoint_step_timeout {options.endpoint_step_timeout:g}: the other processes wait only "
            f"--run.distributed_timeout {config.run.distributed_timeout:g}: give less"
        )
    if kind == "endpoint" and not (options.endpoint_url and options.endpoint_model):
        raise UserError(
            "--thinktuning.teacher endpoint: give its address with --thinktuning.endpoint_url (such as "
            "http://localhost:8000/v1) and its model with --thinktuning.endpoint_model"
        )
    if options.min_fraction > options.fraction:
        raise UserError(
            f"--thinktuning.min_fraction {options.min_fraction} is above --thinktuning.fraction {options.fraction}: "
            "the share of guided rollouts only falls"
        )
    if config.rollout.stop_strings:
        raise UserError(
            "--rollout.stop_strings and --algorithm thinktuning: a response that a stop string ends has no end token "
            "to put feedback before: leave them out"
        )


def unused_options(config: Config) -> list[tuple[str, str]]:
    """The ``thinktuning`` options that this run's teacher has no use for, each with the circumstance in words."""
    if config.algorithm != "thinktuning":
        return []  # none of the section has
    teacher = config.thinktuning.teacher
    return [(name, f"with --thinktuning.teacher {teacher}") for name in _UNUSED[teacher_kind(teacher)]]
