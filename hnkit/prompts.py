"""Prompt sets: reading them, splitting them the same way on every process, and keeping evaluation out of training."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hnkit.errors import InputError
from hnkit.internal.downloads import not_here
from hnkit.internal.values import reason_of, shortened, shown

FORMATS = (
    ".txt (a prompt a line), .json (a list or dict of strings), .jsonl (field 'prompt'), .csv, .tsv or .parquet "
    "(FILE[:COLUMN], column 'prompt' unless given), a folder of .txt files with a prompt each, hf:NAME[:split[:column]]"
)
Records = Mapping[str, Mapping[str, Any]]
"""What is known about a prompt besides its text, by the prompt."""

_Entries = Iterable[tuple[str, dict[str, Any]]]
_COLUMN = "prompt"


def read_prompts(source: str | Path, *, local_files_only: bool = True) -> list[str]:
    """The distinct prompts of a file, a folder or a data set on the hub, in their order of first appearance.

    A prompt is kept as it is but for white space at its ends; blank ones are skipped, and duplicates are removed.

    Args:
        source: a `.txt`, `.json` or `.jsonl` file; a `.csv`, `.tsv` or `.parquet` file, as `FILE:COLUMN` where the
            column is not called `prompt` (parquet needs the package `pyarrow`); a folder of `.txt` files that hold
            one prompt each; or `hf:NAME[:split[:column]]` (split `train`, column `prompt` unless given), which needs
            the package `datasets`.
        local_files_only: never download: a data set on the hub is taken from the local caches.

    Raises:
        InputError: the source is missing, damaged, of another format, or holds no prompt.
    """
    return list(read_records(source, local_files_only=local_files_only))


def read_records(source: str | Path, *, local_files_only: bool = True) -> dict[str, dict[str, Any]]:
    """The prompts of `read_prompts` with what their source says of each: the first record of a prompt that recurs.

    A line of a `.jsonl` file and a row of a `.csv` or `.tsv` file are records themselves; a file of a folder has its
    name without `.txt` as `item_id`. Other sources know the text alone.

    Raises:
        InputError: as `read_prompts`.
    """
    text = str(source)
    found: dict[str, dict[str, Any]] = {}
    entries = _from_hub(text, local_files_only) if text.startswith("hf:") else _from_path(text)
    for raw, record in entries:
        if prompt := raw.strip():
            found.setdefault(prompt, record)
    if not found:
        raise InputError(f"{source} holds no prompt: give at least one")
    for number, prompt in enumerate(found, start=1):
        if not is_unicode(prompt):
            raise InputError(f"{source}: prompt {number} holds half a surrogate pair ({shown(prompt)}): mend it")
        if "\0" in prompt:
            raise InputError(f"{source}: prompt {number} holds a NUL ({shown(prompt)}), which no text has: mend it")
    return found


def file_and_column(source: str) -> tuple[str, str]:
    """`FILE:COLUMN` of a table apart; the column is empty where none is named, and for every other source."""
    name, colon, column = source.rpartition(":")
    return (name, column) if colon and Path(name).suffix.lower() in _TABLES else (source, "")


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


def spread(count: int, chosen: int) -> list[int]:
    """Places of `chosen` prompts of `count`, evenly over their order, from the first; all of them where they are fewer.

    Prompt sets stand in the order of their kinds: the first few of them say nothing of the others.
    """
    chosen = min(chosen, count)
    return [place * count // chosen for place in range(chosen)]


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


# --- files and folders ------------------------------------------------------------------------------------------


def _from_path(source: str) -> _Entries:
    if not source:
        raise InputError(f"prompts: no file is named; accepted are {FORMATS}")
    name, column = file_and_column(source)
    path = Path(name)
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # also a name too long, and the home of no user
        raise _unreadable(path, error) from error
    if is_folder:
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return _TABLES[suffix](path, column or _COLUMN)
    if suffix in _TEXTS:
        return _TEXTS[suffix](path)
    raise InputError(
        f"prompts {path}: format {path.suffix or 'without a suffix'!r} is not read; accepted are {FORMATS}"
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or reason_of(error)
    return InputError(f"prompts {path}: cannot be read ({reason}): give an existing, whole file")


def _text(path: Path) -> str:
    """The text of a file without a byte order mark; every line ends in a line feed alone."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompts {path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except (OSError, ValueError) as error:  # also a NUL in the name
        raise _unreadable(path, error) from error


def _lines(path: Path) -> _Entries:
    # str.splitlines would also cut at U+2028 and at form feeds, which are characters of a prompt
    return [(line, {}) for line in _text(path).split("\n")]


def _json(path: Path) -> _Entries:
    document = _parse(path, _text(path), "")
    values = list(document.values()) if isinstance(document, dict) else document
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"prompts {path}: expected a JSON list or dict of strings: write the prompts as one of them")
    return [(value, {}) for value in values]


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        entry = _parse(path, line, f" line {number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise InputError(f"prompts {path} line {number}: no string field 'prompt': each line is an object with one")
        yield entry["prompt"], entry


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"prompts {path}{where}: not valid JSON ({reason_of(error)}): mend the file") from error


def _folder(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt" and file.is_file())
    except OSError as error:
        raise _unreadable(path, error) from error
    if not files:
        raise InputError(f"prompts {path}: a folder that cannot be read as prompts, for it holds no .txt file")
    seen: dict[str, Path] = {}
    for file in files:
        lines = [line.strip() for line in _text(file).split("\n") if line.strip()]
        if len(lines) != 1:
            raise InputError(
                f"prompts {file}: {len(lines)} prompts; in a folder of prompts each .txt file holds one: mend it, or "
                f"name the one file that holds all of them"
            )
        (prompt,) = lines
        if (other := seen.setdefault(prompt, file)) is not file:
            raise InputError(f"prompts {file}: the same prompt as in {other.name}: leave one of the two files")
        yield prompt, {"prompt": prompt, "item_id": file.stem}


def _tabbed(path: Path, column: str) -> _Entries:
    """A `.tsv` file: with quotes around fields as spreadsheets write them, else with quotes that are characters.

    The latter is the registered form (text/tab-separated-values), in which PartiPrompts is published.
    """
    try:
        return list(_delimited(path, column, "\t"))
    except InputError as quoted:
        try:
            return list(_delimited(path, column, "\t", csv.QUOTE_NONE))
        except InputError:
            raise quoted from None


def _delimited(
    path: Path, column: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _require_column(path, column, header)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"prompts {path} line {reader.line_num}: {len(row)} fields where the header has {len(header)}: put "
                    f"fields that hold {delimiter!r} in double quotes"
                )
            record = dict(zip(header, row, strict=True))
            yield record[column], record
    except csv.Error as error:
        raise InputError(f"prompts {path} line {reader.line_num}: not valid CSV ({error}): mend the file") from error


def _parquet(path: Path, column: str) -> _Entries:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"prompts {path} need the package pyarrow: pip install pyarrow, or give a .csv") from error
    try:
        with parquet.ParquetFile(path) as table:
            _require_column(path, column, table.schema_arrow.names)
            values = table.read(columns=[column]).column(column).to_pylist()
    except InputError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise _unreadable(path, error) from error
    return _strings(values, f"prompts {path}, column {column!r}")


def _require_column(path: Path, column: str, columns: Sequence[str]) -> None:
    if columns.count(column) != 1:
        there = shortened(", ".join(columns), 200) or "nothing"
        raise InputError(
            f"prompts {path}: {'no' if column not in columns else 'more than one'} column {column!r}; it has {there}: "
            f"name one as {path.name}:COLUMN"
        )


def _strings(values: Iterable[object], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The strings of a column; missing ones are skipped as blank lines are, anything else is refused."""
    for number, value in enumerate(values, start=1):
        if value is None:
            continue
        if not isinstance(value, str):
            raise InputError(f"{where}: row {number} is a {type(value).__name__}, not a string: name another column")
        yield value, {}


_TEXTS: Mapping[str, Callable[[Path], _Entries]] = {".txt": _lines, ".json": _json, ".jsonl": _jsonl}
_TABLES: Mapping[str, Callable[[Path, str], _Entries]] = {
    ".csv": lambda path, column: _delimited(path, column, ","),
    ".tsv": _tabbed,
    ".parquet": _parquet,
}


# --- the hub ----------------------------------------------------------------------------------------------------


def _from_hub(source: str, local_files_only: bool) -> _Entries:
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    split, column = split or "train", column or _COLUMN
    if not name:
        raise InputError(f"prompts {source!r}: no data set is named; accepted are {FORMATS}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"prompts {source!r} need the package datasets: pip install datasets, or give a file"
        ) from error
    try:
        table = _cached(datasets, name, split) if local_files_only else datasets.load_dataset(name, split=split)
    except _NotCachedError as error:
        raise not_here(f"prompts {source!r}", name, error, local_files_only=True, data_set=True) from error
    except Exception as error:  # (the hub, the file formats and the network raise anything)
        raise InputError(
            f"prompts {source!r}: could not be loaded ({reason_of(error)}): check its name, or give a file"
        ) from error
    if column not in table.column_names:
        raise InputError(f"prompts {source!r}: no column {column!r}; it has {', '.join(table.column_names)}")
    return _strings(table[column], f"prompts {source!r}, column {column!r}")


class _NotCachedError(Exception):
    """A data set is in no cache of this machine."""


def _cached(datasets: Any, name: str, split: str) -> Any:
    """A data set as `datasets` has prepared it before, else from what `hf download` has left in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # what the variable of that name does, for this one call
    try:
        try:
            return datasets.load_dataset(name, split=split)
        except (ConnectionError, FileNotFoundError):  # it has not been prepared
            folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
            return datasets.load_dataset(folder, split=split)
    except LocalEntryNotFoundError as error:
        raise _NotCachedError(name) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
