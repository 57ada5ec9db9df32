"""The command line: one file a command, every error one line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hnkit import __version__
from hnkit.cli import backends, compare, export, frontier, generate, push, train, verify_bound
from hnkit.cli.options import NEWEST, Command, PlainHelp, command
from hnkit.errors import InputError
from hnkit.internal.stops import Stopped, stoppable
from hnkit.internal.streams import drop_what_cannot_be_written
from hnkit.internal.values import printable, shortened
from hnkit.internal.workers import is_first, said_by_first, tell_the_others

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
_IN_THE_WAY = "something else lies where a file or a folder of the run should: take it out of the run folder"
_LONGEST = 600
"""Characters of an error's line."""


class _Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C, in a form that typer does not answer itself."""


class _Commands(PlainHelp, TyperGroup):
    """The group of commands: every error becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(str(interrupt)) from interrupt

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        arguments = _with_resume_value(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        try:
            _require_directory()
            with stoppable():
                returned = super().main(arguments, standalone_mode=False, **extra)
            code = returned if isinstance(returned, int) else OK
            sys.stdout.flush()
            if (problem := getattr(sys.stdout, "problem", None)) is not None:
                raise problem if isinstance(problem, BrokenPipeError) else _unwritten(problem)
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - the last line of defence: whatever it is becomes one line
            if "--debug" in arguments:
                traceback.print_exc()
            line, code = describe_error(error)
            if is_first() or not (getattr(error, "everywhere", False) or _said_by_first(line, code)):
                print(f"hnkit: {line}", file=sys.stderr)
            if is_first() and code == BAD_INPUT:
                tell_the_others(line)
            if isinstance(error, BrokenPipeError):  # nobody reads stdout any more: keep the interpreter quiet about it
                sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        sys.exit(code)


def _said_by_first(line: str, code: int) -> bool:
    """Whether another process says this line of bad input; a signal meanwhile ends the wait, not the line."""
    if code != BAD_INPUT:
        return False
    try:
        with stoppable():
            return said_by_first(line)
    except (Stopped, KeyboardInterrupt):
        return False


def describe_error(error: BaseException) -> tuple[str, int]:
    """One line for a user, and the exit code, for anything a command may raise."""
    text = _one_line(str(error))
    name = type(error).__name__
    if isinstance(error, InputError):
        return text, BAD_INPUT
    if isinstance(error, KeyboardInterrupt | _Interrupted) or name == "Abort":
        return f"interrupted; {text}" if text else "interrupted", INTERRUPTED
    if isinstance(error, Stopped):
        return text, error.exit_code
    usage = getattr(error, "format_message", None)  # typer's (or click's) usage errors
    if usage is not None:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hnkit"
        return f"{_one_line(usage())} (see {command} --help)", BAD_INPUT
    if isinstance(error, BrokenPipeError):
        return "the reader of the output has gone", BAD_INPUT
    if _out_of_memory(error):
        return (
            "out of memory: use a smaller batch, fewer samples, or a cheaper method, arnoldi instead of exact",
            BAD_INPUT,
        )
    if isinstance(error, OSError):
        where = f" at {printable(str(error.filename))}" if error.filename else ""
        cure = {
            errno.ENOSPC: "free some space, or write elsewhere with --out",
            errno.EDQUOT: "free some space, or write elsewhere with --out",
            errno.EACCES: "check the permissions, or write elsewhere with --out",
            errno.EROFS: "write elsewhere with --out",
            errno.EFBIG: "allow larger files (ulimit -f), or write elsewhere with --out",
            errno.ENAMETOOLONG: "choose a shorter name",
            **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL), _IN_THE_WAY),
        }.get(error.errno or 0, "run again with --debug for where it happened")
        return f"{(error.strerror or text).lower()}{where}: {cure}", BAD_INPUT
    return f"internal error, {name}: {shortened(text, 300)} (run again with --debug for the traceback)", BAD_INPUT


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing: to an array, or to a library that was loaded, which others wrap."""
    texts = ("not enough memory", "allocate memory", "failed to map segment")
    while True:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if any(text in str(error) for text in texts):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


def _require_directory() -> None:
    """Torch ends the process without a word of ours where the working directory has been deleted."""
    try:
        Path.cwd()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"the working directory cannot be found ({reason}): change to one that is there") from None


def _unwritten(error: OSError) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError(f"standard output cannot be written ({reason}): what was made is in its folder; print elsewhere")


def _one_line(text: str) -> str:
    """A message on one line of bearable length, without what a terminal obeys."""
    return shortened(printable(" ".join(text.split())), _LONGEST)


def _with_resume_value(arguments: Sequence[str]) -> list[str]:
    """A bare `--resume` gets the value that stands for the newest run."""
    given = list(arguments)
    for place, word in enumerate(given):
        following = given[place + 1 : place + 2]
        if word == "--resume" and (not following or following[0].startswith("-")):
            given[place] = f"--resume={NEWEST}"
    return given


app = typer.Typer(
    cls=_Commands,
    name="hnkit",
    help="Exact KL, bounds and training for noise hypernetworks x -> x + f(x) on one-step generators.",
    epilog="Start with: hnkit verify-bound, then hnkit train --backend digits",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line on `sys.argv`; exits with 0, 1, 2 or 130."""
    drop_what_cannot_be_written()  # a terminal that is gone is no reason to end
    app()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", metavar="")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", metavar="")] = False,  # noqa: ARG001
) -> None:
    if version:
        print(f"hnkit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _register(name: str, module: ModuleType) -> None:
    app.command(name, cls=Command, epilog=f"Example: {module.EXAMPLE}")(command(module))


_register("verify-bound", verify_bound)
_register("train", train)
_register("export", export)
_register("generate", generate)
_register("frontier", frontier)
_register("compare", compare)
_register("push", push)
_register("backends", backends)
