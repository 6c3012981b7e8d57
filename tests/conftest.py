"""Settings of every test."""

import os

import pytest
from hypothesis import settings

# The same examples in every run, so that a run says something about the change at hand;
# HYPOTHESIS_PROFILE=search looks for new ones. No limit of time for one: it would test the machine, which may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Their files take minutes: run last they would leave one of two workers without work.
_LONG = (
    *("tests/run/", "tests/kernels/test_aot", "tests/csrc/test_cuda", "tests/csrc/test_native"),
    *("tests/test_bench", "tests/test_distributions", "tests/test_gpu_check"),
)
_LONGEST_ON_A_GPU = "tests/test_gpu.py"  # whole runs, for which Triton compiles everything; elsewhere they are skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (not item.nodeid.startswith(_LONGEST_ON_A_GPU), not item.nodeid.startswith(_LONG)))
