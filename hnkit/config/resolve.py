"""Presets, files and flags merged into one checked configuration, and the commands that repeat a run from it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hnkit.config.records import CONFIG_FILE, PERMISSIONS, RunConfig, TrainConfig
from hnkit.config.sources import (
    confirmed,
    flag_of,
    override_tables,
    parse_reward_flag,
    preset_tables,
    read_tables,
    require_no_permissions,
    reward_specs,
    set_rewards,
    with_paths_beside,
)
from hnkit.errors import InputError
from hnkit.internal.folders import adapter_folder
from hnkit.internal.values import printable, shown, typed_values

if TYPE_CHECKING:
    from hnkit.backend import BackendFactory


def resolve_config(
    *,
    backend: str | None = None,
    config_file: str | Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    rewards: Sequence[str] = (),
    heldout: Sequence[str] = (),
    resume: str | Path | None = None,
    rewards_of_files: Literal["all", "installed", "none"] = "all",
) -> RunConfig:
    """Merge defaults, preset, file and flags into one checked configuration.

    Args:
        backend: name of an installed backend; `None`: the file's, or the resumed run's.
        config_file: TOML with the tables `[train]`, `[backend]`, `[rewards]`, `[heldout]`.
        preset: one of the backend's presets.
        overrides: `"table.key=value"`, value in TOML or bare text, in order.
        rewards: `"name=weight"` or `"pkg.mod:fn=weight"`; given, they replace the table `[rewards]`. With `resume`
            they repeat entries of the saved table instead, as every import path there has to be.
        heldout: the same for `[heldout]`.
        resume: a run folder; its saved configuration takes the place of the defaults and of the preset `default`. Of a
            run that took several draws by the pathwise gradient, as was once possible, they come back as one: what
            was trained is used as it is, and `train` refuses to go on with it.
        rewards_of_files: which of them are taken; "all" asks for a flag for each import path, since code is never taken
            from a file. Only training needs them all.

    Raises:
        InputError: in one line, naming the key.
    """
    from hnkit.backend import backend_factory, installed_names

    files = []
    if resume is not None:
        if preset is not None:
            raise InputError(f"--preset {preset} with --resume: a resumed run keeps its own configuration")
        files.append(Path(resume) / CONFIG_FILE)
    if config_file is not None:
        files.append(Path(config_file))
    sources = [(file, read_tables(file)) for file in files]
    if resume is not None:
        sources[0] = (files[0], _of_a_run(sources[0][1]))
    for file, tables in sources:
        named = tables.get("backend", {}).get("name", backend)
        if named is not None and not isinstance(named, str):
            raise InputError(f"{file}: [backend] name = {shown(named)}: accepted is a string")
        if backend is not None and named != backend:
            raise InputError(f"{file} is for backend {named!r}, not {backend!r}: leave its name out, or use another")
        backend = named
    if backend is None:
        raise InputError(f"no backend given: use --backend with one of {', '.join(installed_names('hnkit.backends'))}")
    factory = backend_factory(backend)
    presets = [] if resume is not None else preset_tables(factory, preset)
    set_tables = override_tables(overrides, factory)
    flags = {"rewards": rewards, "heldout": heldout}

    merged: dict[str, dict[str, Any]] = {"train": {}, "backend": {}, "rewards": {}, "heldout": {}}
    chosen: dict[str, Any] = {}  # of the backend's options, those that a file or a flag gives
    layers: list[tuple[str, Path | None, dict[str, dict[str, Any]]]] = [
        *((where, None, tables) for where, tables in presets),
        *((str(file), file, tables) for file, tables in sources),
        ("--set", None, {table: set_tables[table] for table in ("train", "backend")}),
    ]
    for where, path, tables in layers:
        for table, entries in tables.items():
            place = f"{where}: [{table}]"
            if path is not None:
                require_no_permissions(entries, place, table, set_tables[table])
            if table in ("rewards", "heldout"):
                wanted = {
                    name: value for name, value in entries.items()
                    if rewards_of_files == "all" or (rewards_of_files == "installed" and ":" not in name)
                }  # fmt: skip
                if wanted:
                    replaced = bool(flags[table]) and resume is None
                    known_code = wanted if replaced else {parse_reward_flag(flag)[0] for flag in flags[table]}
                    merged[table] = reward_specs(wanted, place, table, known_code, path)
            else:
                accepted = TrainConfig if table == "train" else factory.options
                known = {key: value for key, value in entries.items() if (table, key) != ("backend", "name")}
                values = with_paths_beside(typed_values(known, accepted, place), accepted, path)
                merged[table] |= values
                chosen |= values if table == "backend" and (path is not None or where == "--set") else {}
    for table, given in flags.items():
        if given:
            specs = dict(parse_reward_flag(flag, flag_of(table)) for flag in given)
            merged[table] = confirmed(merged[table], specs, given) if resume is not None else specs
        merged[table] |= set_rewards(set_tables[table], merged[table], table)
    if resume is None and (start := merged["train"].get("from_adapter")):
        merged["backend"] |= {**_recorded(factory, start), **chosen}
    options = make_options(factory.options, merged["backend"])
    return RunConfig(backend, options, TrainConfig(**merged["train"]), merged["rewards"], merged["heldout"])


def own_rewards(run: str | Path) -> list[str]:
    """The import paths that a run was trained on, functions of its user's."""
    return [name for name in read_tables(Path(run) / CONFIG_FILE).get("rewards", {}) if ":" in name]


def _of_a_run(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tables of a saved run, but for several draws by the pathwise gradient, which were once accepted."""
    train = tables.get("train", {})
    if train.get("reward_gradient", "pathwise") != "pathwise":
        return tables
    return {**tables, "train": {key: value for key, value in train.items() if key != "draws"}}


def _recorded(factory: BackendFactory, adapter: str) -> Mapping[str, Any]:
    """The options that the adapter which training starts from fixes."""
    from hnkit.backend import RecordsOptions

    if not Path(adapter).is_dir():
        raise InputError(
            f"train.from_adapter {adapter} is not a folder: name the folder of a trained adapter, or its run"
        )
    folder = adapter_folder(adapter)
    return factory.recorded(folder) if isinstance(factory, RecordsOptions) else {}


def make_options(build: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """A backend's options, built of these values; whatever its own checks refuse is an `InputError`."""
    try:
        return build(**values)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"[backend] {error}") from error


def resume_command(config: RunConfig, folder: str | Path) -> str:
    """The command that goes on with a run, as it is typed into a shell: code is named again, it is never in a file."""
    return _with_code(["hnkit", "train", "--resume", str(folder)], config)


def reproducing_command(config: RunConfig) -> str:
    """The command that trains the same again, typed in the folder of the run."""
    return _with_code(["hnkit", "train", "--config", CONFIG_FILE], config)


def _with_code(words: list[str], config: RunConfig) -> str:
    """A command with a flag for each reward that is code."""
    for table, specs in (("rewards", config.rewards), ("heldout", config.heldout)):
        for name, spec in specs.items():
            if ":" in name:
                words += [flag_of(table), f"{name}={spec.weight:g}"]
    return shlex.join(printable(word) for word in words)


def differing_keys(one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted names of the keys in which two configurations, as `RunConfig.to_dict` gives them, differ."""
    keys = [(table, key) for table in one for key in dict.fromkeys([*one[table], *two[table]])]
    missing = dataclasses.MISSING
    return [
        f"{table}.{key}"
        for table, key in keys
        if key not in PERMISSIONS and one[table].get(key, missing) != two[table].get(key, missing)
    ]
