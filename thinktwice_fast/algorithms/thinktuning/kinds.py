"""What ``thinktuning.teacher`` may say."""

from thinktwice_fast.errors import UserError

MODELS = ("frozen", "live", "checkpoint")  # that are sampled here
CHECKPOINT = "checkpoint:"


def teacher_kind(teacher: str | None) -> str:
    """ "frozen", "live", "checkpoint", "endpoint" or "function".

    Raises:
        UserError: none of them.
    """
    kinds = "frozen, live, checkpoint:PATH, endpoint, or my_file.py:function"
    if teacher is None:
        raise UserError(f"--algorithm thinktuning needs a teacher: give --thinktuning.teacher {kinds}")
    if teacher in ("frozen", "live", "endpoint"):
        return teacher
    if teacher.startswith(CHECKPOINT) and teacher != CHECKPOINT:
        return "checkpoint"
    path, _, function = teacher.rpartition(":")
    if path.endswith(".py") and function.isidentifier():
        return "function"
    raise UserError(f"--thinktuning.teacher {teacher}: no teacher: use {kinds}")
