"""What a configuration is merged from: presets, TOML files, flags; what each may say, and what is code in them."""

from __future__ import annotations

import dataclasses
import math
import shlex
import tomllib
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnkit.config.records import PERMISSIONS, RewardSpec, Scalar, TrainConfig
from hnkit.errors import InputError
from hnkit.internal.values import field_types, parse_text, parsed_number, shown, typed_value, typed_values
from hnkit.prompts import file_and_column

if TYPE_CHECKING:
    from hnkit.backend import BackendFactory

PLACES = ("backend.model_id", "train.from_adapter", "train.prompts", "train.validation_prompts")
"""Where a run finds what it is made from. A resumed run may find it elsewhere, if it is the same there."""


def read_tables(path: str | Path) -> dict[str, dict[str, Any]]:
    """The tables of a configuration file, unchecked but for their names; a missing or malformed file is one line."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"configuration {path} cannot be read ({error.strerror}): name a TOML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"configuration {path} is not UTF-8 text (byte {error.start}): name a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"configuration {path} is not TOML: {error}") from error
    for table, entries in document.items():
        if table not in ("train", "backend", "rewards", "heldout"):
            raise InputError(
                f"{path}: unknown table or key {table!r}: accepted are [train], [backend], [rewards], [heldout]"
            )
        if not isinstance(entries, dict):
            raise InputError(f"{path}: {table} = {entries!r} is not a table: write [{table}] and its keys below it")
    return document


def preset_tables(factory: BackendFactory, name: str | None) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """The backend's preset `default` and the one that is named, as tables, each with the name messages call it by."""
    wanted = [preset for preset in ("default", name) if preset in factory.presets]
    if name is not None and name not in factory.presets:
        accepted = ", ".join(factory.presets) or "none"
        raise InputError(f"unknown preset {name!r} of backend {factory.name!r}: accepted are {accepted}")
    found = []
    for preset in dict.fromkeys(wanted):
        tables: dict[str, dict[str, Any]] = {}
        for dotted, value in factory.presets[preset or ""].items():
            table, _, key = dotted.partition(".")
            tables.setdefault(table, {})[key] = value
        found.append((f"preset {preset}", tables))
    return found


def override_tables(overrides: Sequence[str], factory: BackendFactory) -> dict[str, dict[str, Any]]:
    """What `--set TABLE.KEY=VALUE` gives, as tables; bare text is read by the type of its key."""
    tables: dict[str, dict[str, Any]] = {"train": {}, "backend": {}, "rewards": {}, "heldout": {}}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        table, dot, key = dotted.strip().partition(".")
        if not equals or not dot or table not in tables:
            raise InputError(f"--set {override!r}: write TABLE.KEY=VALUE, TABLE one of {', '.join(tables)}")
        if (table, key) == ("backend", "name"):
            raise InputError(f"--set {override!r}: the backend is named with --backend")
        records: dict[str, type[Any]] = {"train": TrainConfig, "backend": factory.options}
        annotation = field_types(records[table]).get(key) if table in records else None
        tables[table][key] = parse_text(text.strip(), annotation)
    return tables


def flag_of(table: str) -> str:
    """The flag that gives a reward of a table."""
    return {"rewards": "--reward", "heldout": "--heldout"}[table]


def parse_reward_flag(flag: str, name: str = "--reward") -> tuple[str, RewardSpec]:
    """Read `name=weight` or `pkg.mod:fn=weight`; the weight may be left out and is then 1."""
    key, equals, text = flag.partition("=")
    weight = parsed_number(text) if equals else 1.0
    if not key.strip() or not math.isfinite(weight):
        raise InputError(f"{name} {flag!r}: write NAME=WEIGHT or pkg.mod:fn=WEIGHT, the weight a finite number")
    return key.strip(), RewardSpec(weight)


def parse_options(overrides: Sequence[str], record: type[Any], table: str) -> dict[str, Any]:
    """Typed values of `"table.key=value"` flags for a dataclass other than the tables of a run.

    Args:
        overrides: the flags, all with the prefix `table.`.
        record: the dataclass whose fields are accepted.
        table: the prefix.

    Raises:
        InputError: an unknown key or a value of another type.
    """
    entries: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        key = dotted.strip().removeprefix(f"{table}.")
        if not equals:
            raise InputError(f"--set {override!r}: write {table}.KEY=VALUE")
        entries[key] = parse_text(text.strip(), field_types(record).get(key))
    return typed_values(entries, record, f"--set {table}")


def split_permissions(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those flags that lift a restriction, which no file may repeat on the user's behalf, and the others."""
    lifting = [text for text in overrides if text.partition("=")[0].strip().rpartition(".")[2] in PERMISSIONS]
    return lifting, [text for text in overrides if text not in lifting]


def split_model(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those flags that say where the model of a backend lies, and the others.

    What goes on with a run is given the former: a model that has been moved is the same by its content.
    """
    model = [text for text in overrides if text.partition("=")[0].strip() == "backend.model_id"]
    return model, [text for text in overrides if text not in model]


def reward_specs(
    entries: Mapping[str, Any], where: str, table: str, known_code: Collection[str], file: Path | None = None
) -> dict[str, RewardSpec]:
    """The rewards of a table. `known_code` holds the import paths that the user has typed on the command line."""
    specs: dict[str, RewardSpec] = {}
    for name, value in entries.items():
        if ":" in name and name not in known_code:
            flag = f"{flag_of(table)} {shlex.quote(f'{name}=WEIGHT')}"
            raise InputError(f"{where} names the import path {name!r}: code is never taken from a file, give {flag}")
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        try:
            weight = typed_value(options.pop("weight", 1.0), float, name)
        except InputError:
            raise InputError(
                f"{where} {name!r} = {shown(value)}: accepted is a finite weight, or a table with `weight`"
            ) from None
        for key, option in options.items():
            if not isinstance(option, Scalar):
                raise InputError(
                    f"{where} {f'{name}.{key}'!r} = {shown(option)}: accepted is a string, a number or a boolean"
                )
            options[key] = _found_beside(option, file)
        specs[name] = RewardSpec(weight, options)
    return specs


def set_rewards(entries: Mapping[str, Any], specs: Mapping[str, RewardSpec], table: str) -> dict[str, RewardSpec]:
    """`NAME=weight` and `NAME.option=value` of `--set`, on top of the rewards given so far."""
    tables: dict[str, Any] = {}
    for dotted, value in entries.items():
        if ":" in dotted:
            raise InputError(f"--set {table}.{dotted}: an import path is given with {flag_of(table)}")
        name, dot, option = dotted.partition(".")
        saved = {"weight": specs[name].weight, **specs[name].options} if name in specs else {}
        tables[name] = tables.get(name, saved) | {option if dot else "weight": value}
    return reward_specs(tables, f"--set {table}", table, ())


def confirmed(
    saved: Mapping[str, RewardSpec], given: Mapping[str, RewardSpec], flags: Sequence[str]
) -> dict[str, RewardSpec]:
    """Saved rewards with those that the flags name again; a flag without a weight keeps the saved one."""
    weighed = {parse_reward_flag(flag)[0] for flag in flags if "=" in flag}
    again = {
        name: (replace(saved[name], weight=spec.weight) if name in weighed else saved[name]) if name in saved else spec
        for name, spec in given.items()
    }
    return {**saved, **again}


def with_paths_beside(values: dict[str, Any], record: type[Any], file: Path | None) -> dict[str, Any]:
    """The values of a table, paths that exist beside the file they stand in taken from there."""
    kinds = field_types(record)
    paths = {item.name for item in dataclasses.fields(record) if item.metadata.get("beside") or item.name == "model_id"}
    paths |= {name for name, kind in kinds.items() if kind is Path or Path in typing.get_args(kind)}
    return {key: _found_beside(value, file) if key in paths else value for key, value in values.items()}


def _found_beside(value: Any, file: Path | None) -> Any:
    if file is None or not isinstance(value, str | Path) or str(value) in ("", ".") or Path(value).is_absolute():
        return value
    try:
        name, column = file_and_column(str(value))
        beside = file.parent / name
        return type(value)(f"{beside}:{column}" if column else beside) if beside.exists() else value
    except (OSError, ValueError):  # not the name of a file at all
        return value


def require_no_permissions(
    entries: Mapping[str, Any], where: str, table: str, given: Mapping[str, Any], prefix: str = ""
) -> None:
    """Refuse a file that lifts a restriction, such as that on downloads, unless the user's own flag lifts it too."""
    for key, value in entries.items():
        if isinstance(value, dict) and not prefix:
            require_no_permissions(value, where, table, given, f"{key}.")
        elif key in PERMISSIONS and value is not PERMISSIONS[key] and given.get(f"{prefix}{key}") != value:
            flag = shlex.quote(f"{table}.{prefix}{key}={str(value).lower()}")
            raise InputError(f"{where} has {prefix}{key} = {shown(value)}: a file cannot allow that, give --set {flag}")
