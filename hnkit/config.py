"""What a training run is told: one frozen record, from defaults, a preset, a TOML file and flags, strictly typed.

Later sources win: the dataclasses' defaults, the backend's preset `default`, `--preset`, the file, the flags. An
unknown key, a wrong type or a value out of range is an `InputError` of one line that names the key and what is
accepted. An import path (`pkg.mod:fn`) is code, so it is taken from flags alone, never from a file or a preset.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hnkit.backend import BackendFactory, backend_factory, installed_names
from hnkit.errors import InputError
from hnkit.prompts import is_unicode

Scalar = bool | int | float | str
CONFIG_FILE = "config.toml"


def _in_range(
    default: float, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    return field(default=default, metadata={"least": least, "above": above, "below": below})


@dataclass(frozen=True)
class TrainConfig:
    """The table `[train]`: everything about a run that does not belong to the generator or the rewards.

    Attributes:
        objective: `"hypernoise"` trains f on the noise; `"direct"` trains the backend's direct fine-tuning twin on
            `-reward / alpha` alone, the baseline.
        kl: the KL term of `NoiseLoss`.
        alpha: temperature of the tilt, in units of the reward.
        reduction: `"sum"` over the noise dimensions, or `"mean"`, which hides a factor d in alpha.
        noise: `"fresh"` noise for every sample, or one `"fixed"` noise for each training prompt.
        generator_steps: sampler steps of the generator during training.
        steps: optimiser steps.
        batch: samples per optimiser step, over all processes and accumulated micro-batches together.
        accumulate: micro-batches per process that make up one optimiser step.
        optimizer: `"adamw8bit"` needs the package bitsandbytes.
        lr: peak learning rate.
        momentum: of SGD.
        nesterov: Nesterov momentum, for SGD.
        weight_decay: decoupled (AdamW) or added to the gradient (SGD).
        clip: bound on the norm of the gradient of one optimiser step; 0 is none.
        warmup: steps over which the rate grows linearly to `lr`.
        schedule: what the rate does afterwards, until the last step.
        ema: decay of an exponential average of the weights, which is then what is measured and saved; 0 is none.
        precision: `"bfloat16"` runs network and generator under autocast; KL and rewards stay in float32 or better.
        seed: of noise, prompt order and probes. Sample i of step t depends on the seed, t and i alone, not on the
            number of processes.
        max_skipped: so many batches with a non-finite loss or gradient in a row end the run.
        measure_every: steps between measurements of the exact KL, L2 term and their gap; 0 is only at the end.
        measure_samples: samples of one measurement.
        measure_method: of `noise_kl`; `"auto"` is exact up to dimension 512 and Arnoldi above.
        measure_rel_error: the relative error at which a stochastic method stops.
        checkpoint_every: steps between checkpoints.
        keep: how many of the newest checkpoints are kept.
        validate_every: steps between comparisons of base and steered outputs on held-out prompts; 0 is only at the
            end.
        validate_samples: pairs of one comparison.
        prompts: training prompts; empty: the backend's own.
        validation_prompts: held-out prompts; empty: the backend's own, or a share of the training prompts.
        validation_share: that share.
        trackers: besides metrics.jsonl.
    """

    objective: Literal["hypernoise", "direct"] = "hypernoise"
    kl: Literal["l2", "second-order", "arnoldi", "exact"] = "l2"
    alpha: float = _in_range(1.0, above=0)
    reduction: Literal["sum", "mean"] = "sum"
    noise: Literal["fresh", "fixed"] = "fresh"
    generator_steps: int = _in_range(1, least=1)
    steps: int = _in_range(1000, least=1)
    batch: int = _in_range(16, least=1, below=2**24)
    accumulate: int = _in_range(1, least=1)
    optimizer: Literal["sgd", "adamw", "adamw8bit"] = "adamw"
    lr: float = _in_range(1e-3, above=0)
    momentum: float = _in_range(0.0, least=0, below=1)
    nesterov: bool = False
    weight_decay: float = _in_range(0.0, least=0)
    clip: float = _in_range(1.0, least=0)
    warmup: int = _in_range(0, least=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    ema: float = _in_range(0.0, least=0, below=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = _in_range(0, least=0, below=2**63)
    max_skipped: int = _in_range(20, least=1)
    measure_every: int = _in_range(0, least=0)
    measure_samples: int = _in_range(256, least=2, below=2**24)
    measure_method: Literal["auto", "exact", "arnoldi", "lanczos", "power", "roulette", "second-order"] = "auto"
    measure_rel_error: float = _in_range(0.05, above=0, below=1)
    checkpoint_every: int = _in_range(100, least=1)
    keep: int = _in_range(3, least=1)
    validate_every: int = _in_range(0, least=0)
    validate_samples: int = _in_range(16, least=1, below=2**24)
    prompts: str = ""
    validation_prompts: str = ""
    validation_share: float = _in_range(0.1, least=0, below=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_range(f"train.{item.name}", getattr(self, item.name), item.metadata)
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise InputError("train.nesterov = true needs train.optimizer = 'sgd' and train.momentum above 0")
        if self.batch % self.accumulate:
            raise InputError(
                f"train.batch = {self.batch} is not a multiple of train.accumulate = {self.accumulate}: "
                "batch counts the samples of one optimiser step, all micro-batches together"
            )


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `[rewards]` or `[heldout]`: its weight in the sum, and options of its loader."""

    weight: float = 1.0
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """A resolved run: the backend's name and options, the table `[train]`, the rewards.

    `rewards` empty means the backend's default reward. `heldout` rewards are reported and never trained on.
    """

    backend: str
    options: Any
    train: TrainConfig = field(default_factory=TrainConfig)
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    heldout: Mapping[str, RewardSpec] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The configuration as plain tables: what `config.toml` and `report.json` hold."""
        return {
            "train": _plain(self.train),
            "backend": {"name": self.backend, **_plain(self.options)},
            "rewards": {name: _plain_reward(spec) for name, spec in self.rewards.items()},
            "heldout": {name: _plain_reward(spec) for name, spec in self.heldout.items()},
        }

    def to_toml(self) -> str:
        """The same as TOML; `resolve_config(config_file=...)` reads it back to an equal record."""
        lines = ["# The resolved configuration of this run."]
        for table, entries in self.to_dict().items():
            lines.append(f"\n[{table}]")
            lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in entries.items()]
        return "\n".join(lines) + "\n"


def resolve_config(
    *,
    backend: str | None = None,
    config_file: Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    rewards: Sequence[str] = (),
    heldout: Sequence[str] = (),
    resume: Path | None = None,
) -> RunConfig:
    """Merge defaults, preset, file and flags into one checked configuration.

    Args:
        backend: name of an installed backend; `None`: the file's, or the resumed run's.
        config_file: TOML with the tables `[train]`, `[backend]`, `[rewards]`, `[heldout]`.
        preset: one of the backend's presets.
        overrides: `"table.key=value"`, value in TOML or bare text, in order.
        rewards: `"name=weight"` or `"pkg.mod:fn=weight"`; given, they replace the table `[rewards]`.
        heldout: the same for `[heldout]`.
        resume: a run folder; its saved configuration takes the place of the defaults and of the preset `default`.

    Raises:
        InputError: in one line, naming the key.
    """
    sources: list[tuple[str, dict[str, dict[str, Any]]]] = []
    if resume is not None:
        if preset is not None:
            raise InputError(f"--preset {preset} with --resume: a resumed run keeps its own configuration")
        sources.append((str(resume / CONFIG_FILE), read_tables(resume / CONFIG_FILE)))
    if config_file is not None:
        sources.append((str(config_file), read_tables(config_file)))
    for where, tables in sources:
        named = tables.get("backend", {}).get("name", backend)
        if named is not None and not isinstance(named, str):
            raise InputError(f"{where}: [backend] name = {_show(named)}: accepted is a string")
        if backend is not None and named != backend:
            raise InputError(f"{where} is for backend {named!r}, not {backend!r}: leave its name out, or use another")
        backend = named
    if backend is None:
        raise InputError(f"no backend given: use --backend with one of {', '.join(installed_names('hnkit.backends'))}")
    factory = backend_factory(backend)
    presets = [] if resume is not None else _preset_tables(factory, preset)
    set_tables = _override_tables(overrides, factory)
    sources.append(("--set", {table: set_tables[table] for table in ("train", "backend")}))

    merged: dict[str, dict[str, Any]] = {"train": {}, "backend": {}, "rewards": {}, "heldout": {}}
    for where, tables in [*presets, *sources]:
        for table, entries in tables.items():
            if table in ("rewards", "heldout") and entries:
                merged[table] = _reward_specs(entries, f"{where}: [{table}]", rewards if resume else ())
            elif table in ("train", "backend"):
                accepted = TrainConfig if table == "train" else factory.options
                known = {key: value for key, value in entries.items() if (table, key) != ("backend", "name")}
                merged[table] |= typed_values(known, accepted, f"{where}: [{table}]")
    for table, flags in (("rewards", rewards), ("heldout", heldout)):
        if flags:
            merged[table] = dict(parse_reward_flag(flag, f"--{table.removesuffix('s')}") for flag in flags)
        merged[table] |= _set_rewards(set_tables[table], merged[table], table)
    try:
        options = factory.options(**merged["backend"])
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"[backend] {error}") from error
    return RunConfig(backend, options, TrainConfig(**merged["train"]), merged["rewards"], merged["heldout"])


def parse_reward_flag(flag: str, name: str = "--reward") -> tuple[str, RewardSpec]:
    """Read `name=weight` or `pkg.mod:fn=weight`; the weight may be left out and is then 1."""
    key, equals, text = flag.partition("=")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        weight = math.nan
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
        entries[key] = _parse_text(text.strip(), _annotations(record).get(key))
    return typed_values(entries, record, f"--set {table}")


def differing_keys(one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted names of the keys in which two configurations, as `RunConfig.to_dict` gives them, differ."""
    return [
        f"{table}.{key}"
        for table in one
        for key in dict.fromkeys([*one[table], *two[table]])
        if one[table].get(key, dataclasses.MISSING) != two[table].get(key, dataclasses.MISSING)
    ]


def read_tables(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a configuration file, unchecked but for their names; a missing or malformed file is one line."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
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


# --- sources ---------------------------------------------------------------------------------------------------


def _preset_tables(factory: BackendFactory, name: str | None) -> list[tuple[str, dict[str, dict[str, Any]]]]:
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


def _override_tables(overrides: Sequence[str], factory: BackendFactory) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {"train": {}, "backend": {}, "rewards": {}, "heldout": {}}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        table, dot, key = dotted.strip().partition(".")
        if not equals or not dot or table not in tables:
            raise InputError(f"--set {override!r}: write TABLE.KEY=VALUE, TABLE one of {', '.join(tables)}")
        if (table, key) == ("backend", "name"):
            raise InputError(f"--set {override!r}: the backend is named with --backend")
        records: dict[str, type[Any]] = {"train": TrainConfig, "backend": factory.options}
        annotation = _annotations(records[table]).get(key) if table in records else None
        tables[table][key] = _parse_text(text.strip(), annotation)
    return tables


def _set_rewards(entries: Mapping[str, Any], specs: Mapping[str, RewardSpec], table: str) -> dict[str, RewardSpec]:
    """`NAME=weight` and `NAME.option=value` of `--set`, on top of the rewards given so far."""
    tables: dict[str, Any] = {}
    for dotted, value in entries.items():
        if ":" in dotted:
            raise InputError(f"--set {table}.{dotted}: an import path is given with --{table.removesuffix('s')}")
        name, dot, option = dotted.partition(".")
        saved = _plain_reward(specs[name]) if name in specs else {}
        tables[name] = tables.get(name, saved) | {option if dot else "weight": value}
    return _reward_specs(tables, f"--set {table}", ())


def _parse_text(text: str, annotation: Any) -> Any:
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
    if _is_union(annotation):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return all(_accepts_text(member) for member in members)
    if typing.get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(annotation))
    return annotation in (str, Path)


# --- types -----------------------------------------------------------------------------------------------------


def _annotations(record: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(record)
    return {item.name: hints[item.name] for item in dataclasses.fields(record) if item.init}


def typed_values(entries: Mapping[str, Any], record: type[Any], where: str) -> dict[str, Any]:
    """The values of a table as the fields of a dataclass ask for them.

    Args:
        entries: from TOML, JSON or flags.
        record: the dataclass.
        where: the source, for messages.

    Raises:
        InputError: an unknown key or a value of another type.
    """
    annotations = _annotations(record)
    checked: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in annotations:
            near = difflib.get_close_matches(key, annotations, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            accepted = ", ".join(sorted(annotations)) or "none"
            raise InputError(f"{where} has the unknown key {key!r}{hint}: accepted are {accepted}")
        checked[key] = typed_value(value, annotations[key], f"{where} {key}")
    return checked


def typed_value(value: Any, annotation: Any, name: str) -> Any:
    """`value` as a type annotation asks for it; `InputError` names it and what is accepted."""
    try:
        return _coerce(value, annotation)
    except TypeError:
        raise InputError(f"{name} = {_show(value)}: accepted is {_describe(annotation)}") from None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _coerce(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` asks; the only conversions are integer to float, text to path, list to tuple."""
    if _is_union(annotation):
        for member in typing.get_args(annotation):
            try:
                return _coerce(value, member)
            except TypeError:
                continue
        raise TypeError
    origin = typing.get_origin(annotation)
    if origin is Literal:
        for choice in typing.get_args(annotation):
            if type(choice) is type(value) and choice == value:
                return value
        raise TypeError
    if origin is tuple:
        members = typing.get_args(annotation)
        if not isinstance(value, list | tuple):
            raise TypeError
        if members[-1] is Ellipsis:
            members = (members[0],) * len(value)
        if len(members) != len(value):
            raise TypeError
        return tuple(_coerce(entry, member) for entry, member in zip(value, members, strict=True))
    if annotation is Path and isinstance(value, str | Path):
        return Path(value)
    if annotation is float and _is_finite_number(value):
        return float(value)
    if annotation is str and isinstance(value, str) and not is_unicode(value):
        raise TypeError
    if annotation is type(None) and value is None:
        return None
    if annotation in (bool, int, str) and type(value) is annotation:
        return value
    raise TypeError


def _is_finite_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _describe(annotation: Any) -> str:
    if _is_union(annotation):
        return " or ".join(_describe(member) for member in typing.get_args(annotation))
    origin = typing.get_origin(annotation)
    if origin is Literal:
        choices = [_show(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is tuple:
        members = typing.get_args(annotation)
        if members[-1] is Ellipsis:
            return f"a list, each entry {_describe(members[0])}"
        return f"a list of {len(members)} entries, each {_describe(members[0])}"
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string", Path: "a path"}
    return words.get(annotation, "none")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_range(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    tests: dict[str, Callable[[Any, Any], bool]] = {"least": operator.ge, "above": operator.gt, "below": operator.lt}
    signs = {"least": ">=", "above": ">", "below": "<"}
    bounds = {name: metadata[name] for name in tests if metadata.get(name) is not None}
    if not all(tests[name](value, bound) for name, bound in bounds.items()):
        accepted = " and ".join(f"{signs[name]} {bound:g}" for name, bound in bounds.items())
        raise InputError(f"{key} = {value}: accepted is a value {accepted}")


def _reward_specs(entries: Mapping[str, Any], where: str, flags: Sequence[str]) -> dict[str, RewardSpec]:
    """The rewards of a table. `flags` name the import paths that the user has repeated on the command line."""
    repeated = {parse_reward_flag(flag)[0] for flag in flags}
    specs: dict[str, RewardSpec] = {}
    for name, value in entries.items():
        if ":" in name and name not in repeated:
            raise InputError(
                f"{where} names the import path {name!r}: code is never taken from a file, give --reward {name}=WEIGHT"
            )
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if not _is_finite_number(weight):
            raise InputError(
                f"{where} {name!r} = {_show(value)}: accepted is a finite weight, or a table with `weight`"
            )
        for key, option in options.items():
            if not isinstance(option, Scalar):
                raise InputError(
                    f"{where} {f'{name}.{key}'!r} = {_show(option)}: accepted is a string, a number or a boolean"
                )
        specs[name] = RewardSpec(float(weight), options)
    return specs


# --- plain values and TOML -------------------------------------------------------------------------------------


def _plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON and TOML values; `None` fields, which TOML cannot hold, are left out."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.init}
    return {key: _plain_value(value) for key, value in values.items() if value is not None}


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain_value(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _plain_reward(spec: RewardSpec) -> dict[str, Scalar]:
    return {"weight": spec.weight, **spec.options}


def _toml_key(key: str) -> str:
    bare = bool(key) and all(character.isascii() and (character.isalnum() or character in "_-") for character in key)
    return key if bare else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # "1e-05" and "0.5" are TOML; infinities cannot get here
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml_value(entry)}" for key, entry in value.items()) + " }"
    return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
