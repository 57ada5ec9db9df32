"""Values as JSON and TOML hold them, and as options are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hnkit.errors import InputError


def finite(value: Any) -> Any:
    """The same JSON document with `None` in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def number(value: Any, what: str) -> float:
    """A setting as a float, infinity and NaN included.

    Raises:
        InputError: it is no real number (text is none either); `what` names it.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise InputError(f"{what} is no real number: give one")
