"""Prompt sets: reading them, splitting them the same way on every process, and keeping evaluation out of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hnkit.errors import InputError

FORMATS = ".txt (a prompt a line), .json (a list or dict of strings), .jsonl (field 'prompt'), hf:NAME[:split[:column]]"


def read_prompts(source: str | Path) -> list[str]:
    """The distinct prompts of a file or of a data set on the hub, in their order of first appearance.

    Surrounding white space is dropped, blank lines are skipped, and duplicates are removed.

    Args:
        source: a `.txt`, `.json` or `.jsonl` file, or `hf:NAME[:split[:column]]` (split `train`, column `prompt`
            unless given), which needs the package `datasets`.

    Raises:
        InputError: the file is missing, damaged, of another format, or holds no prompt.
    """
    text = str(source)
    found = _from_hub(text) if text.startswith("hf:") else _from_file(Path(text))
    prompts = list(dict.fromkeys(stripped for prompt in found if (stripped := " ".join(prompt.split()))))
    if not prompts:
        raise InputError(f"{source} holds no prompt: give at least one")
    for number, prompt in enumerate(prompts, start=1):
        if not is_unicode(prompt):
            raise InputError(f"{source}: prompt {number} holds half a surrogate pair ({prompt[:60]!r}): mend it")
    return prompts


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; bytes of a command line that were not UTF-8 arrive as lone surrogates."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def split_prompts(prompts: Sequence[str], held_out: int) -> tuple[list[str], list[str]]:
    """Split prompts into `(training, held-out)` by a hash of their text.

    The split does not depend on the order of the prompts, nor on how many processes run, and adding prompts moves few
    of them across.

    Args:
        prompts: distinct prompts.
        held_out: how many to hold out; fewer than there are.

    Raises:
        InputError: `held_out` is negative or leaves nothing to train on.
    """
    if not 0 <= held_out < len(prompts):
        raise InputError(
            f"{held_out} prompts to hold out of {len(prompts)}: give 0 to {len(prompts) - 1}, or more prompts"
        )
    by_hash = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    kept_out = set(by_hash[:held_out])
    return [p for p in prompts if p not in kept_out], [p for p in prompts if p in kept_out]


def require_disjoint(training: Iterable[str], evaluation: Iterable[str]) -> None:
    """Refuse evaluation on prompts that were trained on; case and white space do not make a prompt another one.

    Raises:
        InputError: names the first shared prompt and how many there are.
    """

    def key(prompt: str) -> str:
        return " ".join(prompt.casefold().split())

    seen = {key(prompt) for prompt in training}
    shared = [prompt for prompt in evaluation if key(prompt) in seen]
    if shared:
        raise InputError(
            f"{len(shared)} evaluation prompts are in the training set, first {shared[0]!r}: evaluate on others"
        )


def _from_file(path: Path) -> list[str]:
    readers: dict[str, Callable[[Path, str], list[str]]] = {".txt": _lines, ".json": _json, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise InputError(
            f"prompts {path}: format {path.suffix or 'without a suffix'!r} is not read; accepted are {FORMATS}"
        )
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompts {path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL in the name, and the home of no user
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"prompts {path}: cannot be read ({reason}): give an existing file") from error
    return readers[path.suffix](path, text)


def _lines(_: Path, text: str) -> list[str]:
    return text.splitlines()


def _json(path: Path, text: str) -> list[str]:
    document = _parse(path, text, "")
    values = list(document.values()) if isinstance(document, dict) else document
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"prompts {path}: expected a JSON list or dict of strings: write the prompts as one of them")
    return values


def _jsonl(path: Path, text: str) -> list[str]:
    return list(_fields(path, text))


def _fields(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        entry = _parse(path, line, f" line {number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise InputError(f"prompts {path} line {number}: no string field 'prompt': each line is an object with one")
        yield entry["prompt"]


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"prompts {path}{where}: not valid JSON ({reason}): mend the file") from error


def _from_hub(source: str) -> list[str]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    split, column = split or "train", column or "prompt"
    if not name:
        raise InputError(f"prompts {source!r}: no data set is named; accepted are {FORMATS}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"prompts {source!r} need the package datasets: pip install datasets, or give a file"
        ) from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # (the hub, the file formats and the network raise anything)
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(
            f"prompts {source!r}: could not be loaded ({reason}): check its name, or give a file"
        ) from error
    if column not in table.column_names:
        raise InputError(f"prompts {source!r}: no column {column!r}; it has {', '.join(table.column_names)}")
    return [str(value) for value in table[column]]
