"""Files that are whole or absent: atomic writes, and run folders that are never overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hnkit.errors import InputError


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    The content goes to a temporary file in the same folder, is flushed to the disk, and replaces `path` in one step.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is then untouched and the temporary file removed.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON document atomically. NaN and infinity are refused: use `None` for "not known"."""
    atomic_write(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_sealed(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON document atomically with the SHA-256 of what it says, for `read_sealed`."""
    write_json(path, sealed(content))


def sealed(content: Mapping[str, Any] | list[Any]) -> dict[str, Any]:
    """The document of `write_sealed`. It shows damage; it does not show who wrote it."""
    return {"sha256": _digest(content), "content": content}


def read_sealed(path: Path) -> Any:
    """What `write_sealed` was given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or was not written by `write_sealed`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content = document["content"]
        whole = document["sha256"] == _digest(content)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has no content with a SHA-256") from error
    if not whole:
        raise ValueError(f"{path}: the SHA-256 of its content does not match: truncated or altered")
    return content


def _digest(content: Any) -> str:
    """Of the document as it is read back: tuples are lists and keys text."""
    read_back = json.loads(json.dumps(content, allow_nan=False))
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_run_folder(out: Path | None, kind: str) -> Path:
    """Create the folder a run writes to.

    Args:
        out: the folder the user asked for; it must not exist yet. `None`: `runs/<kind>-<time>`, made unique.
        kind: the first word of the default name, e.g. `"verify"`.

    Returns:
        The new, empty folder.

    Raises:
        InputError: `out` exists, or cannot be created.
    """
    if out is not None:
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            raise InputError(f"--out {out} exists already and is never overwritten: name a new folder") from None
        except OSError as error:
            raise InputError(f"--out {out} cannot be created ({error.strerror}): name another folder") from None
        return out
    stem = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
        candidate = Path("runs") / f"{stem}{suffix}"
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{candidate} cannot be created ({error.strerror}): choose a folder with --out") from None
        return candidate
    raise InputError(f"runs/{stem} and 999 numbered variants exist: choose a folder with --out")
