"""What the tests of this folder share."""

from tests.update.worlds import one_process

__all__ = ["one_process"]
