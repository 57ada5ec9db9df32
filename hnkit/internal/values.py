"""Typed values: settings as fields of frozen records, strictly read from TOML, JSON and flags, and plain again."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import operator
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hnkit.errors import InputError

_RANGES: dict[str, tuple[str, str, Callable[[Any, Any], bool]]] = {
    "least": (">=", "at least", operator.ge), "above": (">", "above", operator.gt), "below": ("<", "below", operator.lt)
}  # fmt: skip
"""Bounds of a setting: their sign in messages, their words in help, and what holds of a value and a bound."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys: control characters but for line feed and tab, and overrides of the direction of writing."""
_LONGEST_WORD, _LONGEST_VALUE = 80, 60


def finite(value: Any) -> Any:
    """The same JSON document with `None` in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def or_nan(value: float | None) -> float:
    """A number of a JSON document, NaN where it is not known: the way back from `finite`."""
    return math.nan if value is None else value


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


_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def parsed_number(text: str) -> float:
    """A finite number as it is written in ASCII, in a table or a flag; NaN for anything else.

    What is a number to Python alone is none: `1_000`, digits of other scripts, `nan`, `inf`.
    """
    value = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    return value if math.isfinite(value) else math.nan


def printable(text: str) -> str:
    r"""Text without what a terminal obeys: control characters and overrides of direction are spelt out, as `\x1b`.

    Line breaks and tabs stay. Names, prompts and messages may come from a folder that somebody sent.
    """
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shortened(text: str, longest: int) -> str:
    """The beginning and the end of a line that a huge value has made long: what was given, and what to do.

    No word is cut, but for one that is itself as long as a line.
    """
    if len(text) <= longest:
        return text
    beginning, end = text[: longest * 2 // 3 - 5], text[-(longest // 3) :]
    if not text[len(beginning)].isspace() and " " in beginning[-_LONGEST_WORD:]:
        beginning = beginning.rpartition(" ")[0]
    if not text[-len(end) - 1].isspace() and " " in end[:_LONGEST_WORD]:
        end = end.partition(" ")[2]
    return f"{beginning.rstrip()} ... {end.lstrip()}"


def number_of(count: int, one: str, more: str = "") -> str:
    """`1 prompt`, `12 prompts`; `more` is the plural of a word that takes no s."""
    return f"{count} {one if count == 1 else more or f'{one}s'}"


def reason_of(error: BaseException, longest: int = 160) -> str:
    """What another library's exception says, in one short line; its name where it says nothing."""
    return shortened(" ".join(str(error).split()), longest) or type(error).__name__


# --- records of settings ---------------------------------------------------------------------------------------


def setting(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flags: Sequence[str] | None = None,
    metavar: str | None = None,
    beside: bool = False,
    argument: bool = False,
) -> Any:
    """One field of a frozen record: its default, its range, and the flag that a command makes of it.

    What it says, in `--help` too, stands in the record's docstring under `Attributes`.

    Args:
        default: its value where nothing else is said.
        least: the value is at least this.
        above: the value is above this.
        below: the value is below this.
        flags: a command offers it; empty: as `--name`; else under these names.
        metavar: what stands for a value in `--help`; `None`: by its type.
        beside: the value is a path, or a name that may be one: in a file it is first looked for beside that file.
        argument: a command takes it by its place, not by a flag.
    """
    metadata = {"least": least, "above": above, "below": below, "flags": flags, "metavar": metavar, "beside": beside}
    metadata["argument"] = argument
    return dataclasses.field(default=default, metadata=metadata)


def described(record: type[Any]) -> dict[str, str]:
    """What the docstrings of a record and of its bases say of each field under `Attributes`."""
    found: dict[str, str] = {}
    for base in reversed(record.__mro__):
        _, _, attributes = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        for match in re.finditer(r"^    (\w+): (.+(?:\n {5,}.+)*)", attributes, flags=re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found


def require_ranges(record: Any, prefix: str, equals: str = " = ") -> None:
    """Refuse a record with a value out of its range; `prefix` stands before the field's name, `equals` after it."""
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        bounds = {name: item.metadata[name] for name in _RANGES if item.metadata.get(name) is not None}
        if value is not None and not all(_RANGES[name][2](value, bound) for name, bound in bounds.items()):
            accepted = " and ".join(f"{_RANGES[name][0]} {bound:g}" for name, bound in bounds.items())
            given = shortened(str(value), _LONGEST_VALUE)
            raise InputError(f"{prefix}{item.name}{equals}{given}: accepted is a value {accepted}")


def ranges(item: dataclasses.Field[Any], below: float) -> list[str]:
    """The range of a setting in words, bound by bound, `at least 1`; a bound that is not below `below` is left out."""
    bounds = [(words, item.metadata.get(name)) for name, (_, words, _) in _RANGES.items()]
    return [f"{words} {bound:g}" for words, bound in bounds if bound is not None and bound < below]


def field_types(record: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields that its constructor takes, by name."""
    hints = typing.get_type_hints(record)
    return {item.name: hints[item.name] for item in dataclasses.fields(record) if item.init}


def plain_record(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON and TOML values; `None` fields, which TOML cannot hold, are left out."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.init}
    return {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


# --- strict types ----------------------------------------------------------------------------------------------


def typed_values(entries: Mapping[str, Any], record: type[Any], where: str) -> dict[str, Any]:
    """The values of a table as the fields of a dataclass ask for them.

    Args:
        entries: the entries, from TOML, JSON or flags.
        record: the dataclass.
        where: the source, for messages.

    Raises:
        InputError: an unknown key or a value of another type.
    """
    accepted = field_types(record)
    checked: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            names = ", ".join(sorted(accepted)) or "none"
            raise InputError(f"{where} has the unknown key {key!r}{hint}: accepted are {names}")
        checked[key] = typed_value(value, accepted[key], f"{where} {key}")
    return checked


def typed_value(value: Any, annotation: Any, name: str) -> Any:
    """`value` as a type annotation asks for it; `InputError` names it and what is accepted.

    Nothing is converted but an integer to a float, text to a path and a list to a tuple: JSON's strict mode of
    pydantic. A number is finite, text is Unicode.
    """
    unicode = not isinstance(value, str | Path) or _is_unicode(str(value))
    if not unicode and Path in (annotation, *typing.get_args(annotation)):  # file names may be any bytes
        return Path(value)
    try:
        return _adapter(annotation).validate_json(json.dumps(value, default=os.fspath), strict=True)
    except (ValueError, TypeError, RecursionError):
        accepted = describe(annotation) + ("" if unicode else " that is UTF-8: rename what it names")
        raise InputError(f"{name} = {shown(value)}: accepted is {accepted}") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@cache
def _adapter(annotation: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def describe(annotation: Any) -> str:
    """What values of a type are accepted, in words."""
    if is_union(annotation):
        return " or ".join(describe(member) for member in typing.get_args(annotation))
    origin = typing.get_origin(annotation)
    if origin is dict:
        return f"a table, each value {describe(typing.get_args(annotation)[1])}"
    if origin is Literal:
        choices = [shown(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is tuple:
        members = typing.get_args(annotation)
        if members[-1] is Ellipsis:
            return f"a list, each entry {describe(members[0])}"
        return f"a list of {len(members)} entries, each {describe(members[0])}"
    words = {
        bool: "true or false", int: "an integer", float: "a finite number", str: "a string", Path: "a path",
        dict: "a table", list: "a list",
    }  # fmt: skip
    return words.get(annotation, "none")


def shown(value: Any) -> str:
    """A value as messages show it, at most 60 characters; no word of it is cut."""
    return shortened(repr(value), _LONGEST_VALUE)


def is_union(annotation: Any) -> bool:
    """Whether an annotation is `A | B`."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def parse_text(text: str, annotation: Any) -> Any:
    """A flag's value: bare text where a string (or path, or literal) may stand, else TOML, else the text itself."""
    if text[:1] not in {'"', "'"} and _accepts_text(annotation):
        if text == "none" and type(None) in typing.get_args(annotation):
            return None
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return [part.strip() for part in text.split(",")] if typing.get_origin(annotation) is tuple else text


def _accepts_text(annotation: Any) -> bool:
    if is_union(annotation):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return all(_accepts_text(member) for member in members)
    if typing.get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(annotation))
    return annotation in (str, Path)
