"""Everything a comparison depends on: chosen before it starts, written to plan.json, and read back when it goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hnkit.adapters import adapter_digests, adapter_folder, adapter_word, load_backend, require_recorded
from hnkit.backend import BackendBase, backend_factory
from hnkit.config import CONFIG_FILE, RunConfig, own_rewards, resolve_config, split_model, split_permissions
from hnkit.errors import InputError
from hnkit.internal.files import document_digest, read_sealed
from hnkit.prompts import require_disjoint
from hnkit.scaled.compare.evaluation import category_of
from hnkit.scaled.compare.plan import Plan, make_plan, plan_from_json

PROMPTS = "prompts.json"
PLAN = "plan.json"


@dataclass(frozen=True)
class Settings:
    """Everything a comparison depends on; plan.json holds it."""

    backend: str
    plan: Plan
    adapter: str | None
    adapter_files: dict[str, str]
    """SHA-256 of the adapter's files: parts made with one adapter are not mixed with another's."""
    prompts: tuple[str, ...]
    overrides: tuple[str, ...]
    quick: bool
    model: str | None = None
    """SHA-256 of the base model, where the backend knows it."""

    @property
    def configuration(self) -> RunConfig:
        """What is trained and scored with."""
        return configuration(self.backend, self.adapter, self.overrides)

    @property
    def asked(self) -> str:
        """SHA-256 of all of it but for where something lies: adapter and model are known by their content."""
        kept = split_model(split_permissions(self.overrides)[1])[1]
        return document_digest(self.to_json() | {"adapter": None, "overrides": list(kept)})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            **vars(self),
            "plan": self.plan.to_json(),
            "prompts": list(self.prompts),
            "overrides": split_permissions(self.overrides)[1],
        }


def configuration(backend: str, adapter: str | Path | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the run that an adapter came from, else of what the adapter records, else the preset.

    Model, options, training and rewards of everything that is compared with an adapter are then the adapter's own.

    Args:
        backend: name of the installed backend.
        adapter: folder of an adapter or of its run; `None`: there is none.
        overrides: `table.key=value`, on top.

    Raises:
        InputError: the run is another backend's, or was trained on a function of its user's, which nothing names here.
    """
    if adapter is None:
        return resolve_config(backend=backend, overrides=overrides)
    folders = (Path(adapter), Path(adapter).parent)
    run = next((folder for folder in folders if (folder / CONFIG_FILE).is_file()), None)
    if run is None:
        recorded: Any = backend_factory(backend)
        flags = [f"backend.{key}={_toml(value)}" for key, value in recorded.recorded(adapter).items()]
        return resolve_config(backend=backend, overrides=[*flags, *overrides])
    code = own_rewards(run)
    taken: Any = "none" if code else "installed"  # a held-out score of its user's is not compared
    config = resolve_config(backend=backend, resume=run, overrides=overrides, rewards_of_files=taken)
    require_recorded(backend_factory(backend), adapter_folder(adapter), config, overrides)
    if code and not config.rewards:
        raise InputError(
            f"--adapter {adapter} was trained on {code[0]!r}, a function of its user's: --set rewards.NAME=WEIGHT "
            "names an installed reward to compare by"
        )
    return config


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_plan(folder: Path, backend: str, adapter: str | Path | None = None) -> Settings:
    """The settings of a comparison that was begun, with its adapter where it lies now, if that is named.

    Raises:
        InputError: the settings, or the adapter, are not what was written.
    """
    try:
        document = read_sealed(folder / PLAN)
        settings = Settings(
            document["backend"],
            plan_from_json(document["plan"]),
            document["adapter"],
            dict(document["adapter_files"]),
            tuple(document["prompts"]),
            tuple(document["overrides"]),
            document["quick"],
            document["model"],
        )
        texts = [settings.backend, settings.adapter or "", *settings.prompts, *settings.overrides]
        if not settings.prompts or not all(isinstance(text, str) for text in texts):
            raise ValueError("not text where text belongs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--resume {folder}: no comparison is there ({PLAN} is missing or damaged): name its folder"
        ) from error
    if lifting := split_permissions(settings.overrides)[0]:
        raise InputError(f"--resume {folder}: its {PLAN} has {lifting[0]!r}: only your own flag may allow that")
    if settings.backend != backend:
        raise InputError(f"--resume {folder} compares backend {settings.backend!r}, not {backend!r}")
    if adapter is not None and settings.adapter is None:
        raise InputError(f"--resume {folder} with --adapter {adapter}: it trains its own: leave the flag out")
    if adapter is not None:
        settings = replace(settings, adapter=str(Path(adapter).resolve()))
    if settings.adapter is not None and adapter_digests(settings.adapter) != settings.adapter_files:
        raise InputError(
            f"--resume {folder}: its adapter {settings.adapter} is gone or has changed since: restore it, name where "
            f"it lies now with --adapter DIR, or compare the new one in a new folder"
        )
    return settings


def gone_on_with(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings of a comparison with what a flag beside `--resume` may add: leave to download, a moved model."""
    lifting, others = split_permissions(overrides)
    moved, _ = split_model(others)
    kept = split_model(settings.overrides)[1] if moved else settings.overrides
    return replace(settings, overrides=(*kept, *moved, *lifting))


def require_same(
    folder: Path,
    settings: Settings,
    *,
    methods: Sequence[str] | None,
    prompts: Sequence[str] | None,
    seeds: int | None,
    quick: bool,
    overrides: Sequence[str],
) -> None:
    """Refuse flags beside `--resume` that ask for another comparison than the one in the folder."""
    plan = settings.plan
    mine, others = make_plan(quick=settings.quick, methods=methods, seeds=seeds, overrides=overrides)
    asked: dict[str, tuple[Any, Any]] = {}
    if methods is not None:
        asked["--methods"] = mine.methods, plan.methods
    if seeds is not None:
        asked["--seeds"] = mine.seeds, plan.seeds
    if quick:
        asked["--quick"] = quick, settings.quick
    if prompts is not None:
        asked["--prompts"] = tuple(prompts[: plan.prompts] if plan.prompts else prompts), settings.prompts
    for override in overrides:
        table, _, key = override.partition("=")[0].strip().partition(".")
        if table == "compare":
            asked[f"--set {override}"] = getattr(mine, key), getattr(plan, key)
    for override in split_model(split_permissions(others)[1])[1]:
        asked[f"--set {override}"] = override in settings.overrides, True
    for flag, (wanted, has) in asked.items():
        if wanted != has:
            kept = f" (it has {has!r})" if isinstance(has, int | str) and not isinstance(has, bool) else ""
            raise InputError(
                f"--resume {folder} with {flag}: that comparison was begun otherwise{kept}: leave the flag out, or "
                "start a new one"
            )


def chosen_prompts(config: RunConfig, prompts: Sequence[str] | None, plan: Plan) -> list[str]:
    """The prompts of a comparison: those given, else the backend's held-out ones, in turn from each category."""
    if prompts is None:
        found = default_prompts(load_backend(backend_factory(config.backend), config.options), plan)
        if found is None:
            raise InputError(f"backend {config.backend!r} has no prompts of its own: give --prompts FILE")
        return found
    return list(prompts[: plan.prompts] if plan.prompts else prompts)


def default_prompts(backend: BackendBase, plan: Plan) -> list[str] | None:
    """The backend's held-out prompts, in turn from each category; `None` where it has no prompts of its own."""
    if backend.prompts is None:
        return None
    training, held_out = backend.prompts()
    require_disjoint(training, held_out)
    ordered = _interleaved(held_out, {prompt: category_of(backend, prompt) for prompt in held_out})
    return ordered[: plan.prompts] if plan.prompts else ordered


def reproducing_command(settings: Settings, default: Sequence[str] | None) -> str:
    """The command that makes this comparison again, with every flag, in the folder of the comparison.

    Args:
        settings: the settings of the comparison.
        default: the prompts that it would have without `--prompts`.
    """
    words = ["hnkit", "compare", "--backend", settings.backend]
    plain, _ = make_plan(quick=settings.quick, methods=None, seeds=None, overrides=())
    plan, usual = settings.plan.to_json(), plain.to_json()
    words += ["--quick"] * settings.quick
    if settings.adapter is not None:
        words += ["--adapter", adapter_word(settings.backend, settings.adapter)]
    if default is None or tuple(default) != settings.prompts:
        words += ["--prompts", PROMPTS]
    if plan["methods"] != usual["methods"]:
        words += ["--methods", ",".join(plan["methods"])]
    if plan["seeds"] != usual["seeds"]:
        words += ["--seeds", str(plan["seeds"])]
    for key in usual:
        if key not in ("methods", "seeds") and plan[key] != usual[key]:
            words += ["--set", f"compare.{key}={plan[key] if isinstance(plan[key], str) else json.dumps(plan[key])}"]
    for override in split_permissions(settings.overrides)[1]:
        words += ["--set", override]
    return shlex.join(words)


def _interleaved(prompts: Sequence[str], category: dict[str, str]) -> list[str]:
    """Prompts in turn from each category, so that a first part of them has all of them."""
    queues = {name: [p for p in prompts if category[p] == name] for name in dict.fromkeys(category.values())}
    ordered: list[str] = []
    while any(queues.values()):
        ordered += [queue.pop(0) for queue in queues.values() if queue]
    return ordered
