"""Versions of what figures were computed with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def versions() -> dict[str, str]:
    """Versions of what the figures were computed with."""
    found = {"python": platform.python_version()}
    for package in ("hnkit", "torch", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a distribution"
    return found
