"""What a run was made with, so that every figure can be traced to its inputs: one record for every command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hnkit.internal.files import read_sealed, write_sealed
from hnkit.internal.versions import code_digest, versions

PROVENANCE = "provenance.json"
"""The file of a run folder that holds the records, the oldest first."""


def provenance(
    *,
    model: str | None = None,
    adapter: Mapping[str, str] | None = None,
    prompts: Sequence[str] | None = None,
    **inputs: str | None,
) -> dict[str, Any]:
    """The digests of a run's inputs, of the code that reads them, and the versions of what it rests on.

    Args:
        model: the digest of the base model, where it is known.
        adapter: SHA-256 of the adapter's files by name.
        prompts: the prompts, in their order.
        inputs: digests of other inputs, by name.
    """
    found: dict[str, Any] = {"code": code_digest(), "versions": versions(), **inputs}
    given = {"model": model, "adapter": None if adapter is None else dict(adapter)}
    given["prompts"] = None if prompts is None else prompts_digest(prompts)
    return {key: value for key, value in (found | given).items() if value is not None}


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts, in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def record_provenance(folder: Path, record: Mapping[str, Any]) -> None:
    """Say in a run folder what it is made with from now on; nothing is added where that has not changed.

    Raises:
        OSError: it cannot be written.
    """
    records = recorded_provenance(folder)
    if not records or records[-1] != record:
        write_sealed(folder / PROVENANCE, [*records, dict(record)])


def recorded_provenance(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder, the oldest first; none where there is no file, or a damaged one."""
    try:
        records = read_sealed(folder / PROVENANCE)
    except (OSError, ValueError):
        return []
    return records if isinstance(records, list) else []
