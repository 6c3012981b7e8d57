"""What torchrun tells each process through its environment; needs no torch."""

import os


def env_rank() -> int:
    """This process's number as torchrun gives it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def env_local_rank() -> int:
    """This process's number on its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def env_local_world_size() -> int:
    """How many processes torchrun started on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def env_world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
