"""What a training run is told: one frozen record, from defaults, a preset, a TOML file and flags, strictly typed.

Later sources win: the dataclasses' defaults, the backend's preset `default`, `--preset`, the file, the flags. An
unknown key, a wrong type or a value out of range is an `InputError` of one line that names the key and what is
accepted. An import path (`pkg.mod:fn`) is code, so it is taken from flags alone, never from a file or a preset; so is
leave to download. A relative path in a file is looked for beside that file first, then in the working directory.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import tomllib
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from hnkit.errors import InputError
from hnkit.internal.folders import adapter_folder
from hnkit.internal.values import (
    field_types,
    parse_text,
    plain_record,
    printable,
    require_ranges,
    setting,
    shown,
    typed_value,
    typed_values,
)
from hnkit.prompts import file_and_column

if TYPE_CHECKING:
    from hnkit.backend import BackendFactory
    from hnkit.injection import NoiseInjection

Scalar = bool | int | float | str
CONFIG_FILE = "config.toml"
PERMISSIONS: dict[str, Scalar] = {"local_files_only": True}
"""Options that allow what a file must not switch on, with the value that allows nothing. They are taken from flags,
and are not part of a run: a run folder that is passed on does not hold them."""
PLACES = ("backend.model_id", "train.from_adapter", "train.prompts", "train.validation_prompts")
"""Where a run finds what it is made from. A resumed run may find it elsewhere, if it is the same there."""


@dataclass(frozen=True)
class TrainConfig:
    """The table `[train]`: everything about a run that does not belong to the generator or the rewards.

    Attributes:
        from_adapter: a trained adapter, or its run, to start from; empty: f = 0. Its rank, model and conditioning are
            then the defaults of the backend's options.
        objective: `"hypernoise"` trains f on the noise; `"direct"` trains the backend's direct fine-tuning twin, the
            baseline. The latter's loss is `-reward / alpha` alone.
        kl: the KL term of `NoiseLoss`.
        alpha: temperature of the tilt, in units of the reward.
        reduction: `"sum"` over the noise dimensions, or `"mean"`, which hides a factor d in alpha.
        injection: share `1 - a^2` of the noise that is drawn afresh, in training and wherever the adapter is used:
            `x_hat = a (x + f) + sqrt(1 - a^2) eps`, whose KL is at most `a^2 E|f|^2 / (2 (1 - a^2))`; 0 is none.
        max_delta: bound on `|f|` with injected noise, to which longer deltas are scaled down; 0 is none.
        draws: draws of injected noise for each sample of a step, each a pass of the generator: 2 or more with
            score-function gradients, whose baseline they are, else 1.
        reward_gradient: `"pathwise"`, through reward and generator, or `"score-function"`, which needs values of the
            reward alone: with injected noise and 2 draws or more.
        noise: `"fresh"` noise for every sample; one for each optimiser `"step"`, shared by all its prompts, as in the
            published code; or one `"fixed"` noise for each training prompt.
        generator_steps: sampler steps of the generator during training.
        steps: optimiser steps.
        batch: samples per optimiser step, over all processes and accumulated micro-batches together.
        accumulate: micro-batches per process that make up one optimiser step.
        optimizer: `"adamw8bit"` needs the package bitsandbytes.
        lr: peak learning rate.
        momentum: the momentum of SGD.
        nesterov: Nesterov momentum, for SGD.
        weight_decay: decoupled (AdamW) or added to the gradient (SGD).
        clip: bound on the norm of the gradient of one optimiser step; 0 is none.
        reward_clip: bound on the norm of each sample's gradient of the reward in its noise, in units of the reward; 0
            is none. Direct fine-tuning and score-function gradients, which have none, are as they are without.
        warmup: steps over which the rate grows linearly to `lr`.
        schedule: what the rate does afterwards, until the last step.
        ema: decay of an exponential average of the weights, which is then what is measured and saved; 0 is none.
        precision: `"bfloat16"` runs network and generator under autocast; KL and rewards stay in float32 or better.
        seed: seed of noise, prompt order and probes. Sample i of step t depends on the seed, t and i alone, not on the
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
        validation_share: that share; 0 trains on all of them and validates on the training prompts.
        trackers: besides metrics.jsonl.
    """

    from_adapter: str = setting("", flags=(), metavar="DIR", beside=True)
    objective: Literal["hypernoise", "direct"] = setting("hypernoise", flags=())
    kl: Literal["l2", "second-order", "arnoldi", "exact"] = setting("l2", flags=())
    alpha: float = setting(1.0, above=0, flags=())
    reduction: Literal["sum", "mean"] = setting("sum", flags=())
    injection: float = setting(0.0, least=0, below=1)
    max_delta: float = setting(0.0, least=0)
    draws: int = setting(1, least=1)
    reward_gradient: Literal["pathwise", "score-function"] = "pathwise"
    noise: Literal["fresh", "step", "fixed"] = "fresh"
    generator_steps: int = setting(1, least=1)
    steps: int = setting(1000, least=1, flags=())
    batch: int = setting(16, least=1, below=2**24, flags=())
    accumulate: int = setting(1, least=1)
    optimizer: Literal["sgd", "adamw", "adamw8bit"] = "adamw"
    lr: float = setting(1e-3, above=0, flags=())
    momentum: float = setting(0.0, least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(0.0, least=0)
    clip: float = setting(1.0, least=0)
    reward_clip: float = setting(0.0, least=0)
    warmup: int = setting(0, least=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    ema: float = setting(0.0, least=0, below=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = setting(0, least=0, below=2**63, flags=())
    max_skipped: int = setting(20, least=1)
    measure_every: int = setting(0, least=0)
    measure_samples: int = setting(256, least=2, below=2**24)
    measure_method: Literal["auto", "exact", "arnoldi", "lanczos", "power", "roulette", "second-order"] = "auto"
    measure_rel_error: float = setting(0.05, above=0, below=1)
    checkpoint_every: int = setting(100, least=1)
    keep: int = setting(3, least=1)
    validate_every: int = setting(0, least=0)
    validate_samples: int = setting(16, least=1, below=2**24)
    prompts: str = setting("", flags=(), metavar="FILE", beside=True)
    validation_prompts: str = setting("", beside=True)
    validation_share: float = setting(0.1, least=0, below=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        require_ranges(self, "train.")
        if self.draws > 1 and self.reward_gradient == "pathwise":
            raise InputError(
                f"train.draws = {self.draws} with train.reward_gradient = 'pathwise', which takes one, for more do not "
                "earn their passes: leave it out, or give train.reward_gradient = 'score-function', whose baseline "
                "they are"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise InputError("train.nesterov = true needs train.optimizer = 'sgd' and train.momentum above 0")
        if self.batch % self.accumulate:
            raise InputError(
                f"train.batch = {self.batch} is not a multiple of train.accumulate = {self.accumulate}: "
                "batch counts the samples of one optimiser step, all micro-batches together"
            )
        if self.injection:
            if self.objective == "direct":
                raise InputError("train.injection with train.objective = 'direct', which moves no noise: leave one out")
            if self.kl != "l2":
                raise InputError(
                    f"train.injection with train.kl = {self.kl!r}: its KL is bounded by 'l2', leave kl out"
                )
        elif named := [name for name in ("max_delta", "reward_gradient") if self._set(name)]:
            raise InputError(
                f"train.{named[0]} = {getattr(self, named[0])!r} without train.injection, which it is about: give the "
                "share of the noise that is drawn afresh, such as 0.5"
            )
        if self.reward_gradient == "score-function" and self.draws < 2:
            raise InputError("train.reward_gradient = 'score-function' needs a baseline: give train.draws = 2 or more")

    def _set(self, name: str) -> bool:
        """Whether a setting is not at its default."""
        default = {item.name: item.default for item in dataclasses.fields(self)}[name]
        return bool(getattr(self, name) != default)

    @property
    def deployment(self) -> NoiseInjection | None:
        """How the hypernetwork is deployed, in training as in use; `None`: as `x + f(x)`."""
        if not self.injection:
            return None
        from hnkit.injection import NoiseInjection

        return NoiseInjection(self.injection, self.max_delta or None)


@dataclass(frozen=True)
class GenerateSettings:
    """What a run of `generate` is told.

    Attributes:
        count: images per prompt, each from its own noise. Image k of every prompt starts from the same noise.
        steps: sampler steps of the generator.
        seed: seed of the noise.
        batch: images generated together.
        layout: also write the folder that a scorer reads.
    """

    count: int = setting(4, least=1, flags=("--count", "-n"))
    steps: int = setting(1, least=1, flags=())
    seed: int = setting(0, least=0, flags=())
    batch: int = setting(8, least=1, flags=())
    layout: Literal["geneval", "geneval2", "t2i-compbench", "dpg-bench"] | None = setting(None, flags=())

    def __post_init__(self) -> None:
        require_ranges(self, "--", " ")
        if self.layout is not None:
            from hnkit.output.layouts import check_layout

            check_layout(self.layout, (), self.count)


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
            "train": plain_record(self.train),
            "backend": {"name": self.backend, **_without_permissions(plain_record(self.options))},
            "rewards": {name: _plain_reward(spec) for name, spec in self.rewards.items()},
            "heldout": {name: _plain_reward(spec) for name, spec in self.heldout.items()},
        }

    def to_toml(self) -> str:
        """The same as TOML; `resolve_config(config_file=...)` reads it back to an equal record."""
        return config_toml(self.to_dict())


def config_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of a resolved configuration as they stand in `config.toml`."""
    return "# The resolved configuration of this run.\n\n" + tomli_w.dumps(tables)


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
    presets = [] if resume is not None else _preset_tables(factory, preset)
    set_tables = _override_tables(overrides, factory)
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
                _require_no_permissions(entries, place, table, set_tables[table])
            if table in ("rewards", "heldout"):
                wanted = {
                    name: value for name, value in entries.items()
                    if rewards_of_files == "all" or (rewards_of_files == "installed" and ":" not in name)
                }  # fmt: skip
                if wanted:
                    replaced = bool(flags[table]) and resume is None
                    known_code = wanted if replaced else {parse_reward_flag(flag)[0] for flag in flags[table]}
                    merged[table] = _reward_specs(wanted, place, table, known_code, path)
            else:
                accepted = TrainConfig if table == "train" else factory.options
                known = {key: value for key, value in entries.items() if (table, key) != ("backend", "name")}
                values = _beside(typed_values(known, accepted, place), accepted, path)
                merged[table] |= values
                chosen |= values if table == "backend" and (path is not None or where == "--set") else {}
    for table, given in flags.items():
        if given:
            specs = dict(parse_reward_flag(flag, _flag(table)) for flag in given)
            merged[table] = _confirmed(merged[table], specs, given) if resume is not None else specs
        merged[table] |= _set_rewards(set_tables[table], merged[table], table)
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
                words += [_flag(table), f"{name}={spec.weight:g}"]
    return shlex.join(printable(word) for word in words)


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


def differing_keys(one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted names of the keys in which two configurations, as `RunConfig.to_dict` gives them, differ."""
    keys = [(table, key) for table in one for key in dict.fromkeys([*one[table], *two[table]])]
    missing = dataclasses.MISSING
    return [
        f"{table}.{key}"
        for table, key in keys
        if key not in PERMISSIONS and one[table].get(key, missing) != two[table].get(key, missing)
    ]


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


def _recorded(factory: BackendFactory, adapter: str) -> Mapping[str, Any]:
    """The options that the adapter which training starts from fixes."""
    from hnkit.backend import RecordsOptions

    if not Path(adapter).is_dir():
        raise InputError(
            f"train.from_adapter {adapter} is not a folder: name the folder of a trained adapter, or its run"
        )
    folder = adapter_folder(adapter)
    return factory.recorded(folder) if isinstance(factory, RecordsOptions) else {}


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
        annotation = field_types(records[table]).get(key) if table in records else None
        tables[table][key] = parse_text(text.strip(), annotation)
    return tables


def _flag(table: str) -> str:
    return {"rewards": "--reward", "heldout": "--heldout"}[table]


def _set_rewards(entries: Mapping[str, Any], specs: Mapping[str, RewardSpec], table: str) -> dict[str, RewardSpec]:
    """`NAME=weight` and `NAME.option=value` of `--set`, on top of the rewards given so far."""
    tables: dict[str, Any] = {}
    for dotted, value in entries.items():
        if ":" in dotted:
            raise InputError(f"--set {table}.{dotted}: an import path is given with {_flag(table)}")
        name, dot, option = dotted.partition(".")
        saved = {"weight": specs[name].weight, **specs[name].options} if name in specs else {}
        tables[name] = tables.get(name, saved) | {option if dot else "weight": value}
    return _reward_specs(tables, f"--set {table}", table, ())


def _confirmed(
    saved: Mapping[str, RewardSpec], given: Mapping[str, RewardSpec], flags: Sequence[str]
) -> dict[str, RewardSpec]:
    """Saved rewards with those that the flags name again; a flag without a weight keeps the saved one."""
    weighed = {parse_reward_flag(flag)[0] for flag in flags if "=" in flag}
    again = {
        name: (replace(saved[name], weight=spec.weight) if name in weighed else saved[name]) if name in saved else spec
        for name, spec in given.items()
    }
    return {**saved, **again}


def _reward_specs(
    entries: Mapping[str, Any], where: str, table: str, known_code: Collection[str], file: Path | None = None
) -> dict[str, RewardSpec]:
    """The rewards of a table. `known_code` holds the import paths that the user has typed on the command line."""
    specs: dict[str, RewardSpec] = {}
    for name, value in entries.items():
        if ":" in name and name not in known_code:
            flag = f"{_flag(table)} {shlex.quote(f'{name}=WEIGHT')}"
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


def _plain_reward(spec: RewardSpec) -> dict[str, Scalar]:
    return {"weight": spec.weight, **_without_permissions(spec.options)}


def _beside(values: dict[str, Any], record: type[Any], file: Path | None) -> dict[str, Any]:
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


def _require_no_permissions(
    entries: Mapping[str, Any], where: str, table: str, given: Mapping[str, Any], prefix: str = ""
) -> None:
    """Refuse a file that lifts a restriction, such as that on downloads, unless the user's own flag lifts it too."""
    for key, value in entries.items():
        if isinstance(value, dict) and not prefix:
            _require_no_permissions(value, where, table, given, f"{key}.")
        elif key in PERMISSIONS and value is not PERMISSIONS[key] and given.get(f"{prefix}{key}") != value:
            flag = shlex.quote(f"{table}.{prefix}{key}={str(value).lower()}")
            raise InputError(f"{where} has {prefix}{key} = {shown(value)}: a file cannot allow that, give --set {flag}")


def _without_permissions(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in PERMISSIONS}
