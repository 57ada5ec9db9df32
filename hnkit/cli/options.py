"""Commands as records: a frozen dataclass of settings becomes the flags of a command, its help and its defaults.

A command is a module with a record `Options`, whose docstring is the command's help, a function `run(options)` that
returns the exit code, and an `EXAMPLE`. A new flag is one more field of the record, or, where the library takes the
setting, of the library's own record (`TrainConfig`, `GenerateSettings`), whose fields `flags_of` offers.
"""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperArgument, TyperCommand

from hnkit.errors import InputError
from hnkit.internal.values import described, field_types, is_union, printable, ranges, setting

NEWEST = "newest"
"""What a bare `--resume` stands for: the run in `--out`, or the newest run of `runs/`."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command that writes results takes.

    Attributes:
        out: new folder for the results; default: one under runs/.
        as_json: print one JSON document on stdout and nothing else there.
    """

    out: Path | None = setting(None, metavar="DIR")
    as_json: bool = setting(False, flags=("--json",))


@dataclass(frozen=True, kw_only=True)
class WithBackend(Common):
    """What every command on a backend takes.

    Attributes:
        backend: installed backend; see hnkit backends.
        model_id: model of the backend: a hub name, or a folder.
        overrides: override one key of the configuration (repeatable).
    """

    backend: str | None = setting(None, metavar="NAME")
    model_id: str | None = setting(None, metavar="NAME")
    overrides: tuple[str, ...] = setting((), flags=("--set",), metavar="TABLE.KEY=VALUE")

    def all_overrides(self) -> tuple[str, ...]:
        """What `--set` gives, with `--model-id` as the override that it is short for."""
        return (*self.overrides, *([] if self.model_id is None else [f"backend.model_id={self.model_id}"]))

    def named_backend(self) -> str:
        """The backend's name; `InputError` where none was given."""
        if self.backend is None:
            from hnkit.backend import installed_names

            installed = ", ".join(installed_names("hnkit.backends"))
            raise InputError(f"no backend given: use --backend with one of {installed}")
        return self.backend


def flags_of(record: type[Any], defaults: str = "") -> Any:
    """A field that holds those settings of another record that the user has given, by name.

    Args:
        record: a frozen dataclass; its fields that were declared with `flags` become flags of the command.
        defaults: said after each default in `--help`.
    """
    return dataclasses.field(default_factory=dict, metadata={"record": record, "defaults": defaults})


def command(module: ModuleType) -> Callable[..., None]:
    """The function that typer makes a command of: its parameters are the fields of the module's `Options`."""
    record = module.Options
    flags: dict[str, tuple[inspect.Parameter, Callable[[dict[str, Any], Any], None]]] = {}
    for item in _own_fields_first(record):
        if "record" in item.metadata:
            inner = item.metadata["record"]
            for part in dataclasses.fields(inner):
                if part.metadata.get("flags") is not None:
                    flags[part.name] = _parameter(inner, part, item.metadata["defaults"]), _nested(item.name, part.name)
        else:
            flags[item.name] = _parameter(record, item, None), _plain(item.name)

    def call(**values: Any) -> None:
        given: dict[str, Any] = {}
        for name, (_, store) in flags.items():
            store(given, values[name])
        raise typer.Exit(module.run(record(**given)))

    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", metavar="")]
    # The flag is read from the arguments by the group of commands, before any command is known.
    last = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug)
    parameters = [*(parameter for parameter, _ in flags.values()), last]
    call.__doc__ = _command_help(record)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def command_line(name: str, options: Any) -> str:
    """The command that such options are made by, with every flag that is not at its default.

    Where output goes, what is printed and what is gone on with say nothing about the result and are left out.

    Args:
        name: the command.
        options: its record of options.
    """
    words = ["hnkit", name]
    for item in _own_fields_first(type(options)):
        value = getattr(options, item.name)
        if "record" in item.metadata:
            parts = {part.name: part for part in dataclasses.fields(item.metadata["record"])}
            words += [word for key, given in value.items() for word in _words(parts[key], given)]
        elif item.name not in _OF_THE_CALL and value != item.default:
            words += _words(item, value)
    return shlex.join(printable(word) for word in words)


_OF_THE_CALL = ("out", "as_json", "verbose", "resume")


def _words(item: dataclasses.Field[Any], value: Any) -> list[str]:
    """A flag with its value, a repeatable one with each of its values."""
    flag = (item.metadata.get("flags") or (f"--{item.name.replace('_', '-')}",))[0]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [word for given in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(given))]


class PlainHelp:
    """What makes `--help` show no `<bool>` for itself, in a command and in the group of commands."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option `--help`, without a value."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class Command(PlainHelp, TyperCommand):
    """A command made of a record."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters; one that is known by its place is shown by its name alone."""
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign] # noqa: ARG005
        return parameters


def _own_fields_first(record: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a record and of its bases, in the order of `--help`: the most particular first."""
    fields = {item.name: item for item in dataclasses.fields(record)}
    own = [name for base in record.__mro__ for name in inspect.get_annotations(base) if name in fields]
    return [fields[name] for name in dict.fromkeys(own)]


def _plain(name: str) -> Callable[[dict[str, Any], Any], None]:
    def store(given: dict[str, Any], value: Any) -> None:
        given[name] = tuple(value) if isinstance(value, list) else value

    return store


def _nested(field: str, name: str) -> Callable[[dict[str, Any], Any], None]:
    def store(given: dict[str, Any], value: Any) -> None:
        if value is not None:
            given.setdefault(field, {})[name] = value

    return store


def _parameter(record: type[Any], item: dataclasses.Field[Any], inherited: str | None) -> inspect.Parameter:
    """The parameter that typer reads of one field; `inherited` is given for a field of another record."""
    kind = field_types(record)[item.name]
    many = typing.get_origin(kind) is tuple
    value = typing.get_args(kind)[0] if many else _without_none(kind)
    metavar = item.metadata.get("metavar")
    if item.metadata.get("argument"):
        place: Any = typer.Argument(help=_help(described(record)[item.name], item, value, None), metavar=metavar)
        return inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=Annotated[value | None, place]
        )
    option: Any = typer.Option(
        *(item.metadata.get("flags") or (f"--{item.name.replace('_', '-')}",)),
        help=_help(described(record)[item.name], item, value, inherited if _says_something(item.default) else None),
        metavar=_metavar(value) if metavar is None else metavar,
        show_default=inherited is None and _says_something(item.default),
    )
    accepted = list[value] if many else value  # type: ignore[valid-type]
    optional = kind is not bool or inherited is not None
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=item.default if inherited is None else None,
        annotation=Annotated[accepted | None if optional else accepted, option],
    )


def _without_none(kind: Any) -> Any:
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    return members[0] if is_union(kind) else kind


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "NAME"
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _help(text: str, item: dataclasses.Field[Any], kind: Any, inherited: str | None) -> str:
    """The first sentence of a field, its choices and range, and its default where typer does not show that itself."""
    parts = [text.replace("`", "").partition(". ")[0].removesuffix(".")]
    if typing.get_origin(kind) is Literal:
        parts.append(f"one of {', '.join(typing.get_args(kind))}")
    parts += ranges(item, below=10**6)  # a larger bound says nothing to anybody
    if inherited is not None:
        parts.append(f"default: {item.default}{inherited}")
    line = "; ".join(parts)
    return f"{line[:1].upper()}{line[1:]}."


def _says_something(value: Any) -> bool:
    return not (value is None or isinstance(value, bool) or value in ((), ""))


def _command_help(record: type[Any]) -> str:
    return inspect.cleandoc(record.__doc__ or "").partition("\n\nAttributes:")[0]
