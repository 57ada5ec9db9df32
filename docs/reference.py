"""The reference pages of the site, written from the code: commands, configuration and the Python API."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sphinx.pycode import ModuleAnalyzer
from tables import to_markdown

import hnkit
from hnkit import scaled, toy
from hnkit.internal.values import describe, described, field_types, ranges
from hnkit.output.page import Table

HIDDEN = ("hnkit.internal", "hnkit.cli", "hnkit.scaled.internal", "hnkit.scaled.digits.train")
"""Packages that are for hnkit's own use: not part of what users build on."""

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

NOUNS = {
    "maps": "Maps on noise",
    "jacobian": "Jacobians",
    "kl": "The KL divergence and its parts",
    "logdet": "Log-determinants",
    "bounds": "Bounds",
    "lipschitz": "Lipschitz constants and injectivity",
    "loss": "Training",
    "tilt": "Targets",
    "frontier": "Reward per nat",
    "backend": "Generators and rewards",
    "verify": "Verification",
    "errors": "Errors",
}


def pages() -> dict[str, str]:
    """Every reference page by its name, as Markdown."""
    return {"commands.md": commands(), "configuration.md": configuration(), **dict(api())}


def commands() -> str:
    """The page of commands: help, example and flags of each, read from the command line itself."""
    import typer.main

    from hnkit.cli import app

    group: Any = typer.main.get_command(app.app)
    lines = [
        "# Commands",
        "",
        "Exit codes: 0, no check fails; 1, a check fails; 2, bad input (one line on stderr); 130, Ctrl-C after a",
        "checkpoint; 143, SIGTERM after a checkpoint. `--json` prints one JSON document on stdout and nothing else",
        "there. Every command that makes something writes a new folder under `runs/` or at `--out`.",
        "",
    ]
    for name, command in group.commands.items():
        lines += [f"## hnkit {name}", "", _paragraph(command.help), ""]
        if command.epilog:
            lines += ["```sh", command.epilog.removeprefix("Example: "), "```", ""]
        rows = [
            (f"`{', '.join(option.opts)} {option.metavar or ''}`".replace(" `", "`"), _flagged(option.help or ""))
            for option in command.params
            if not option.hidden
        ]
        lines += [to_markdown(Table(("flag and value", "meaning"), tuple(rows)))]
    return "\n".join(lines)


def _flagged(text: str) -> str:
    return FLAG.sub(r"`\g<0>`", text)


def configuration() -> str:
    """The page of configuration: every key of every table, with its type, default, range and meaning."""
    from hnkit import config
    from hnkit.backend import backend_factory, installed_names
    from hnkit.config import GenerateSettings, TrainConfig

    lines = [
        "# Configuration",
        "",
        "A run is described by one TOML file (`--config FILE`); `--set TABLE.KEY=VALUE` overrides one key, and many",
        "keys of `[train]` have a flag of their own. The file that a run writes, `config.toml`, holds every value.",
        "",
        _paragraph(config.__doc__).partition("\n\n")[2],
        "",
        "## [train]",
        "",
        _record(TrainConfig),
        "## Generating (`hnkit generate`)",
        "",
        _record(GenerateSettings),
        "## [backend]",
        "",
        "`name` names the backend; the other keys are its options.",
        "",
    ]
    for name in installed_names("hnkit.backends"):
        options = backend_factory(name).options
        if dataclasses.is_dataclass(options):
            lines += [f"### {name}", "", _record(options)]
    lines += [
        "## [rewards] and [heldout]",
        "",
        "`NAME = WEIGHT`, or a table with `weight` and the reward's own options. The name of an installed reward",
        "(`hnkit backends` lists them) or `pkg.mod:function`. Held-out rewards are measured and never trained on.",
        "",
    ]
    return "\n".join(lines)


def _record(record: Any) -> str:
    """A table of the fields of a settings record, of two columns: it is read on a telephone without scrolling."""
    kinds, meanings = field_types(record), _meanings(record)
    rows = [
        (f"`{item.name}`", f"{_meaning(meanings.get(item.name, ''), item)} {_accepted(kinds[item.name], item)}".strip())
        for item in dataclasses.fields(record)
    ]
    return to_markdown(Table(("key", "meaning, what is accepted, default"), tuple(rows)))


def _accepted(kind: Any, item: Any) -> str:
    """What a field takes, and its default, as the end of a cell."""
    default = _default(item)
    accepted = describe(kind)
    return f"*{accepted[:1].upper()}{accepted[1:]}*{', default ' if default else ''}{default}"


def _meanings(record: Any) -> dict[str, str]:
    """What is said of each field, under `Attributes` or in a string below it, in the record and its bases."""
    found = {}
    for base in reversed(record.__mro__[:-1]):
        below = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
        own = {name: text for (owner, name), text in below.items() if owner == base.__name__}
        found |= {name: " ".join(" ".join(text).split()) for name, text in own.items()}
    return found | described(record)


def _default(item: Any) -> str:
    if item.default is dataclasses.MISSING:
        return "" if item.default_factory is dataclasses.MISSING else f"`{item.default_factory()}`"
    return "" if item.default in (None, "", ()) else f"`{str(item.default).lower()}`"


def _meaning(text: str, item: Any) -> str:
    found = ranges(item, below=10**6)
    return f"{text.removesuffix('.')}; {' and '.join(found)}." if found else text


def _paragraph(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("\b", "")


def api() -> Iterator[tuple[str, str]]:
    """The pages of the Python API: the names of `hnkit` itself by noun, then every public module."""
    lines = ["# The API on one page", "", "Everything here is imported from `hnkit` itself.", ""]
    hidden: list[str] = []
    for module, names in hnkit._API.items():
        if module in NOUNS:
            lines += [f"## {NOUNS[module]}", ""]
        for name in names:
            value = getattr(hnkit, name)
            made = inspect.isclass(value) or inspect.isroutine(value)
            home = value.__module__ if made else f"hnkit.{module}"
            home = "hnkit" if home.startswith(HIDDEN) else home
            said = _first_sentence(inspect.getdoc(value) or "" if made else _below(home, name))
            lines += [f"- {{py:obj}}`hnkit.{name} <{home}.{name}>`: {said}"]
            hidden += [name] * (home == "hnkit")
        lines += [""]
    for name in hidden:  # it has no module of its own to stand in
        lines += ["```{eval-rst}", f".. autoclass:: hnkit.{name}", "```", ""]
    yield "api.md", "\n".join(lines)
    for room, modules in rooms().items():
        text = [f"# {room}", ""]
        if room not in modules:  # a package that makes nothing itself: what it says of its modules
            text += ["```{eval-rst}", f".. automodule:: {room}", "   :no-members:", "```", ""]
        for module in modules:
            text += [f"## {module}", ""] * (module != room)
            text += ["```{eval-rst}", f".. automodule:: {module}", "   :ignore-module-all:", "```", ""]
        yield f"{room}.md", "\n".join(text)


def _below(module: str, name: str) -> str:
    """What the string below a name says that is neither class nor function, such as a type."""
    return "\n".join(ModuleAnalyzer.for_module(module).find_attr_docs()["", name])


def _first_sentence(text: str) -> str:
    first = " ".join(text.split("\n\n")[0].split())
    return first.partition(". ")[0].removesuffix(".") + "."


def rooms() -> dict[str, list[str]]:
    """Public modules by the page they stand on: a package with all its modules, or a module by itself.

    `toy` and `scaled` lie beside `hnkit` in the repository, so that each is walked by itself.
    """
    found: dict[str, list[str]] = {}
    for name in sorted({name for package in (hnkit, toy, scaled) for name in _modules(package)}):
        parts = name.split(".")
        room = ".".join(parts[: 3 if parts[1] == "scaled" else 2])
        if _has_members(name):
            found.setdefault(room, []).append(name)
    return found


def _modules(package: ModuleType) -> Iterator[str]:
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not info.name.startswith(HIDDEN) and not any(part.startswith("_") for part in info.name.split(".")):
            yield info.name


def _has_members(name: str) -> bool:
    """Whether anything public is made in a module."""
    module = importlib.import_module(name)
    return any(
        not key.startswith("_") and getattr(value, "__module__", None) == name for key, value in vars(module).items()
    )
