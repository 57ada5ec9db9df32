"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hnkit import __version__
from hnkit.errors import InputError

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
NEWEST = "newest"
"""What a bare `--resume` stands for: the run in `--out`, or the newest run of `runs/`."""
_LONGEST = 600
"""Characters of an error's line."""


class _Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C, in a form that typer does not answer itself."""


class _Commands(TyperGroup):
    """The group of commands: every error becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted from interrupt

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        arguments = _with_resume_value(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        try:
            returned = super().main(arguments, standalone_mode=False, **extra)
            code = returned if isinstance(returned, int) else OK
            sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - the last line of defence: whatever it is becomes one line
            if "--debug" in arguments:
                traceback.print_exc()
            line, code = describe_error(error)
            print(f"hnkit: {line}", file=sys.stderr)
            if isinstance(error, BrokenPipeError):  # nobody reads stdout any more: keep the interpreter quiet about it
                sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        sys.exit(code)


def describe_error(error: BaseException) -> tuple[str, int]:
    """One line for a user, and the exit code, for anything a command may raise."""
    text = _shortened(" ".join(str(error).split()))
    name = type(error).__name__
    if isinstance(error, InputError):
        return text, BAD_INPUT
    if isinstance(error, KeyboardInterrupt | _Interrupted) or name == "Abort":
        return "interrupted", INTERRUPTED
    usage = getattr(error, "format_message", None)  # typer's (or click's) usage errors
    if usage is not None:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hnkit"
        return f"{_shortened(' '.join(usage().split()))} (see {command} --help)", BAD_INPUT
    if isinstance(error, BrokenPipeError):
        return "the reader of the output has gone", BAD_INPUT
    if isinstance(error, OSError):
        where = f" at {error.filename}" if error.filename else ""
        cure = {
            errno.ENOSPC: "free some space, or write elsewhere with --out",
            errno.EDQUOT: "free some space, or write elsewhere with --out",
            errno.EACCES: "check the permissions, or write elsewhere with --out",
            errno.EROFS: "write elsewhere with --out",
        }.get(error.errno or 0, "run again with --debug for where it happened")
        return f"{(error.strerror or text).lower()}{where}: {cure}", BAD_INPUT
    no_memory = isinstance(error, MemoryError) or name == "OutOfMemoryError"
    if no_memory or "not enough memory" in text or "allocate memory" in text:
        return "out of memory: use fewer --samples, a smaller batch, or --method arnoldi instead of exact", BAD_INPUT
    return f"internal error, {name}: {text[:300]} (run again with --debug for the traceback)", BAD_INPUT


def _shortened(text: str) -> str:
    """The beginning and the end of a line that a huge value has made long: what was given, and what to do."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]} ... {text[-190:]}"


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
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line on `sys.argv`; exits with 0, 1, 2 or 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a report holds symbols that a C locale cannot encode
            stream.reconfigure(errors="replace")
    app()


# --- options that several commands share ------------------------------------------------------------------------

Out = Annotated[Path | None, typer.Option(help="New folder for the results; default: one under runs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
# Read from the arguments by the group of commands, before any command is known.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override one key of the configuration.")
]
BackendName = Annotated[str | None, typer.Option(metavar="NAME", help="Installed backend; see hnkit backends.")]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME."),
]
Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="Trained adapter, or the run folder that holds it.")]


class Method(StrEnum):
    """How E(J) is computed."""

    exact = "exact"
    arnoldi = "arnoldi"
    lanczos = "lanczos"
    power = "power"
    roulette = "roulette"
    second_order = "second-order"
    l2 = "l2"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    if version:
        print(f"hnkit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


# --- verify-bound -----------------------------------------------------------------------------------------------


@app.command("verify-bound")
def verify_bound_command(
    toy: Annotated[list[str] | None, typer.Option(metavar="NAME", help="One toy (repeatable); default: all.")] = None,
    map_: Annotated[
        str | None, typer.Option("--map", metavar="PKG.MOD:F", help="Your own map: callable, nn.Module or factory.")
    ] = None,
    shape: Annotated[str | None, typer.Option(metavar="C,H,W", help="Noise shape of one row of --map.")] = None,
    backend: BackendName = None,
    adapter: Adapter = None,
    prompts: Prompts = None,
    method: Annotated[Method | None, typer.Option(help="How E(J) is computed; default: exact where it can be.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Noise samples; default 2048 for a toy, 256 to 32 for a map, by dimension.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of noise and probes.")] = 0,
    alpha: Annotated[float | None, typer.Option(help="Temperature of the tilt; default: the toy's own.")] = None,
    probes: Annotated[int | None, typer.Option(help="Probes per sample of a stochastic method.")] = None,
    steps: Annotated[int | None, typer.Option(help="Krylov steps or series terms; default: adaptive.")] = None,
    rel_error: Annotated[float | None, typer.Option(help="Stop at this relative standard error of E(J).")] = None,
    budget: Annotated[int | None, typer.Option(help="Matrix-vector products in all, at most.")] = None,
    certify: Annotated[bool, typer.Option("--certify", help="Enclose E(A) and its bounds in ball arithmetic.")] = False,
    set_: Set = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every check in full.")] = False,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Check the theory: on every closed-form toy, on a map of yours, or on a trained network.

    Exit code 0: no check fails; 1: a check fails; 2: bad input.
    """
    from hnkit.cli import commands

    report, folder = commands.verify(
        toys=toy or [],
        map_path=map_,
        shape=shape,
        backend=backend,
        adapter=adapter,
        prompts=prompts,
        alpha=alpha,
        overrides=set_ or [],
        settings=commands.VerifySettings(
            samples=samples,
            seed=seed,
            method=method.value if method else None,
            certify=certify,
            options={
                key: value
                for key, value in (
                    ("probes", probes), ("steps", steps), ("rel_error", rel_error), ("budget", budget)
                )
                if value is not None
            },
        ),
        out=out,
    )  # fmt: skip
    from hnkit.checks.view import report_view
    from hnkit.output import terminal

    if as_json:
        terminal.print_json({**report.to_json(), "run_folder": str(folder)})
    else:
        screen = terminal.console()
        screen.print(report_view(report, verbose=verbose))
        print(f"report: {folder / 'report.html'}")
    raise typer.Exit(OK if report.ok else CHECK_FAILED)


# --- train ------------------------------------------------------------------------------------------------------


@app.command("train")
def train_command(
    backend: BackendName = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Configuration file.")] = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Named settings of the backend.")] = None,
    kl: Annotated[str | None, typer.Option(help="KL term: l2, second-order, arnoldi or exact.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Temperature of the tilt, in units of the reward.")] = None,
    reduction: Annotated[str | None, typer.Option(help="sum, or mean (hides a factor d in alpha).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per optimiser step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of noise, prompt order and probes.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WEIGHT", help="Reward, or pkg.mod:fn=WEIGHT (repeatable); default: the backend's."),
    ] = None,
    heldout: Annotated[
        list[str] | None, typer.Option(metavar="NAME=WEIGHT", help="Reward that is reported and never trained on.")
    ] = None,
    prompts: Prompts = None,
    objective: Annotated[str | None, typer.Option(help="hypernoise, or direct fine-tuning as a baseline.")] = None,
    out: Out = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", help="Continue a run: this one, or the newest if none is named.")
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Train a noise hypernetwork, or resume its training; Ctrl-C writes a checkpoint first."""
    from hnkit.cli import commands

    flags = {
        "kl": kl, "alpha": alpha, "reduction": reduction, "steps": steps, "batch": batch, "lr": lr, "seed": seed,
        "prompts": prompts, "objective": objective,
    }  # fmt: skip
    overrides = [f"train.{key}={value}" for key, value in flags.items() if value is not None]
    code = commands.train(
        backend=backend,
        config_file=config,
        preset=preset,
        overrides=[*overrides, *(set_ or [])],
        rewards=reward or [],
        heldout=heldout or [],
        out=out,
        resume=resume,
        as_json=as_json,
    )
    raise typer.Exit(code)


# --- generate, compare, backends --------------------------------------------------------------------------------


@app.command("generate")
def generate_command(
    backend: BackendName = None,
    adapter: Adapter = None,
    prompts: Prompts = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt (repeatable).")] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Images per prompt, each from its own noise.")] = 4,
    steps: Annotated[int, typer.Option(help="Sampler steps of the generator.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch: Annotated[int, typer.Option(help="Images generated together.")] = 8,
    layout: Annotated[
        str | None, typer.Option(help="Also write a scorer's folder: geneval, geneval2, t2i-compbench, dpg-bench.")
    ] = None,
    set_: Set = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Write base and steered images, pair by pair from the same noise, and a contact sheet."""
    from hnkit.cli import commands

    commands.generate(
        backend=backend,
        adapter=adapter,
        prompts=prompts,
        prompt=prompt or [],
        count=count,
        steps=steps,
        seed=seed,
        batch=batch,
        layout=layout,
        overrides=set_ or [],
        out=out,
        as_json=as_json,
    )


@app.command("compare", context_settings={"allow_extra_args": False})
def compare_command(
    backend: BackendName = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Methods: base,hypernoise,best-of-n,reno,direct, ...")
    ] = None,
    adapter: Adapter = None,
    prompts: Prompts = None,
    seeds: Annotated[int | None, typer.Option(help="Noise seeds per prompt.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The short version, minutes on a laptop.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", help="Continue a comparison: this one, or the newest.")
    ] = None,
    set_: Set = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """The paper's tables and figures for a backend: base, noise hypernetwork and the baselines, paired."""
    from hnkit.cli import commands

    commands.compare(
        backend=backend,
        methods=methods,
        adapter=adapter,
        prompts=prompts,
        seeds=seeds,
        quick=quick,
        resume=resume,
        overrides=set_ or [],
        out=out,
        as_json=as_json,
    )


@app.command("backends")
def backends_command(
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """What is installed, what it needs, and whether its weights are present."""
    from hnkit.cli import commands

    commands.backends(as_json=as_json)
