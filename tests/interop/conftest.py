"""The tiny checkpoints of `tests/scaled`, for formats that are tried end to end."""

from tests.scaled.conftest import checkpoint

__all__ = ["checkpoint"]
