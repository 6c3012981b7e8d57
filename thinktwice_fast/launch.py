"""What a process is told through its environment, by torchrun and for torch, what memory it keeps, and how it gives up.

Needs no torch.
"""

import ctypes
import os
import sys
import time

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_SIZE = 1 << 30  # largest piece of memory that is kept


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


def refuse(program: str, error: str) -> int:
    """Tell the user in one line what is wrong; the exit status of a process that does not do what it was asked."""
    if env_rank():
        # Rank 0 mostly has the same to say; torchrun ends this process before it says it again.
        time.sleep(5)
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    return 2


def grow_segments() -> None:
    """Have torch's GPU allocator map memory into segments that grow, unless the user has told it something.

    A gap between tensors is then of use to any other; segments of fixed sizes would keep it to tensors of theirs. Torch
    reads this when it is imported.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next tensor, where it is glibc.

    It would hand tensors' memory back to the system after each use; every new one then costs a page fault per 4 KiB,
    which takes longer than most element-wise operations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Older ones refuse more than 32 MiB. To set either ends the C library's own adjustment of both.
    if mallopt(_M_MMAP_THRESHOLD, _KEPT_SIZE) or mallopt(_M_MMAP_THRESHOLD, 32 << 20):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
