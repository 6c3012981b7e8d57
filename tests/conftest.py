"""Settings of every test."""

import os

from hypothesis import settings

# The same examples in every run, so that a run says something about the change at hand;
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
