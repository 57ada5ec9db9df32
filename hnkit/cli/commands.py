"""What the commands do between parsing and printing."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text
from torch import nn

from hnkit.adapters import default_prompts, load_trained
from hnkit.backend import backend_factory, installed_names, load_installed
from hnkit.checks.report import Report
from hnkit.checks.runs import VerifySettings, chosen_problems, reference_maps, verify_backend, verify_map, verify_toys
from hnkit.config import resolve_config
from hnkit.errors import InputError
from hnkit.internal.files import new_run_folder
from hnkit.maps import NoiseMap
from hnkit.output import terminal
from hnkit.prompts import read_prompts, read_records
from hnkit.rewards import import_object

__all__ = ["VerifySettings", "backends", "compare", "generate", "load_trained", "train", "verify"]

NEWEST = "newest"


# --- verify-bound -----------------------------------------------------------------------------------------------


def verify(
    *,
    toys: Sequence[str],
    map_path: str | None,
    shape: str | None,
    backend: str | None,
    adapter: Path | None,
    prompts: str | None,
    alpha: float | None,
    overrides: Sequence[str],
    settings: VerifySettings,
    out: Path | None,
) -> tuple[Report, Path]:
    """Run `verify-bound` on what was named, write its run folder, and return the report and the folder."""
    subjects = {"--toy": bool(toys), "--map": map_path is not None, "--backend": backend is not None}
    named = [flag for flag, given in subjects.items() if given]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} together: name one thing to verify")
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"--alpha {alpha:g}: give a finite positive temperature")
    for flag, given, needs in (
        ("--shape", shape is not None, "--map"),
        ("--adapter", adapter is not None, "--backend"),
        ("--prompts", prompts is not None, "--backend"),
        ("--set", bool(overrides), "--backend"),
    ):
        if given and needs not in named:
            raise InputError(f"{flag} without {needs}: it says nothing about {named[0] if named else 'the toys'}")
    if alpha is not None and map_path is not None:
        raise InputError("--alpha with --map: the temperature belongs to a tilted law, and a map has none")
    _refuse_existing(out)
    if map_path is not None:
        sizes = parse_shape(shape)
        report = verify_map(load_map(map_path), sizes, settings, name=map_path)
    elif backend is not None:
        if adapter is None:
            raise InputError(f"--backend {backend} without --adapter: name the folder of the adapter or its run")
        loaded, trained_alpha = load_trained(backend, adapter, overrides)
        texts = read_prompts(prompts) if prompts is not None else default_prompts(loaded)
        report = verify_backend(loaded, texts, settings, alpha=alpha if alpha is not None else trained_alpha)
    else:
        problems = chosen_problems(toys, alpha)
        references = [name for name in reference_maps() if not toys or name in toys]
        with terminal.steps(len(problems) + len(references)) as steps:
            report = verify_toys(problems, settings, references=references, say=steps.start)
    folder = new_run_folder(out, "verify")
    report.write(folder)
    return report, folder


def _refuse_existing(out: Path | None) -> None:
    """Say so before the work, not after it; the folder itself is made when there is something to write."""
    if out is not None and (out.exists() or out.is_symlink()):
        raise InputError(f"--out {out} exists already and is never overwritten: name a new folder")
    for above in out.absolute().parents if out is not None else ():
        if above.exists() or above.is_symlink():
            if not above.is_dir() or not os.access(above, os.W_OK):
                reason = "is read-only" if above.is_dir() else "is not a folder"
                raise InputError(f"--out {out} cannot be created, {above} {reason}: name another folder")
            return


def parse_shape(text: str | None) -> tuple[int, ...]:
    """Read `3,16,16`; at most a million entries in all."""
    if text is None:
        raise InputError("--map without --shape: give the noise shape of one row, such as --shape 3,16,16")
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--shape {text}: write positive integers with commas, such as 3,16,16") from None
    if any(size < 1 for size in shape) or math.prod(shape) > 2**24:
        raise InputError(f"--shape {text}: give positive sizes, at most {2**24} entries in all, such as 3,16,16")
    return shape


def load_map(path: str) -> NoiseMap:
    """The map at `pkg.mod:f`: a function of the noise, a module, or something that makes one without arguments."""
    found = import_object(path, "--map")
    if isinstance(found, type) or (not isinstance(found, nn.Module) and callable(found) and _takes_nothing(found)):
        try:
            found = found()
        except Exception as error:  # the user's code may raise anything: say so in one line, keep the cause
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"--map {path}: making the map failed ({type(error).__name__}: {reason})") from error
    if not callable(found):
        raise InputError(f"--map {path} is {type(found).__name__}: name a callable f(x), a module, or a factory of one")
    return found.eval() if isinstance(found, nn.Module) else found


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether a callable is a factory: no argument is required and none is taken by position alone."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return not any(
        parameter.kind is parameter.VAR_POSITIONAL or parameter.default is parameter.empty
        for parameter in parameters
        if parameter.kind is not parameter.VAR_KEYWORD
    )


# --- backends with an adapter -----------------------------------------------------------------------------------


# --- train ------------------------------------------------------------------------------------------------------


def train(
    *,
    backend: str | None,
    config_file: Path | None,
    preset: str | None,
    overrides: Sequence[str],
    rewards: Sequence[str],
    heldout: Sequence[str],
    out: Path | None,
    resume: str | None,
    as_json: bool,
) -> int:
    """Train or resume, and return the exit code."""
    from hnkit.training.run import train as run_training

    folder = _resumed_folder(resume, out, "train") if resume is not None else None
    config = resolve_config(
        backend=backend,
        config_file=config_file,
        preset=preset,
        overrides=overrides,
        rewards=rewards,
        heldout=heldout,
        resume=folder,
    )
    result = run_training(config, out=out if folder is None else None, resume=folder)
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks
        return result.exit_code
    if as_json:
        document = {
            "run_folder": str(result.folder), "step": result.step, "finished": result.finished,
            "skipped": result.skipped, "report": result.report,
        }  # fmt: skip
        terminal.print_json(document)
    elif result.finished:
        print(f"report: {result.folder / 'report.html'}")
    return result.exit_code


def _resumed_folder(resume: str, out: Path | None, kind: str) -> Path:
    """The run that `--resume` means: the one named, the one in `--out`, or the newest under `runs/`."""
    if resume != NEWEST:
        if out is not None:
            raise InputError(f"--resume {resume} with --out {out}: a resumed run stays in its folder")
        return Path(resume)
    if out is not None:
        return out
    runs = sorted(Path("runs").glob(f"{kind}-*"), key=lambda folder: folder.stat().st_mtime)
    if not runs:
        raise InputError("--resume: there is no run under runs/ to go on with: name its folder, --resume DIR")
    return runs[-1]


# --- generate, compare, backends --------------------------------------------------------------------------------


def generate(
    *,
    backend: str | None,
    adapter: Path | None,
    prompts: str | None,
    prompt: Sequence[str],
    count: int,
    steps: int,
    seed: int,
    batch: int,
    layout: str | None,
    overrides: Sequence[str],
    out: Path | None,
    as_json: bool,
) -> None:
    """Write base and steered images of every prompt from the same noise; see `hnkit.generate`."""
    from hnkit.generate import GenerateSettings, generate_pairs, require_images
    from hnkit.output.layouts import check_layout

    name = _named_backend(backend)
    settings = GenerateSettings(count=count, steps=steps, seed=seed, batch=batch, layout=layout)
    if prompts is not None and prompt:
        raise InputError("--prompts and --prompt together: name one source of prompts")
    _refuse_existing(out)
    records = read_records(prompts) if prompts is not None else {}
    texts = list(dict.fromkeys(prompt)) or list(records) or None
    if texts is not None and not all(text.strip() for text in texts):
        raise InputError("--prompt is empty: write a prompt")
    if texts is not None and layout is not None:
        check_layout(layout, texts, count, records)
    loaded, _ = load_trained(name, adapter, overrides)
    texts = default_prompts(loaded) if texts is None else texts
    require_images(loaded, texts, settings, records)
    folder = new_run_folder(out, "generate")
    document = generate_pairs(loaded, texts, settings, folder, steered=adapter is not None, records=records)
    if as_json:
        terminal.print_json({**document, "run_folder": str(folder)})
    else:
        print(f"{document['images']} images; contact sheet: {folder / 'contact-sheet.png'}")


def compare(
    *,
    backend: str | None,
    methods: str | None,
    adapter: Path | None,
    prompts: str | None,
    seeds: int | None,
    quick: bool,
    resume: str | None,
    overrides: Sequence[str],
    out: Path | None,
    as_json: bool,
) -> None:
    """Run the comparison that the entry-point group `hnkit.comparisons` offers for the backend."""
    name = _named_backend(backend)
    factory = backend_factory(name)
    runner = comparison_runner(factory)
    _refuse_existing(None if resume is not None else out)
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds}: give at least 1, and 2 or more for error bars")
    document: Mapping[str, Any] = runner(
        name,
        methods=None if methods is None else [part.strip() for part in methods.split(",")],
        adapter=adapter,
        prompts=None if prompts is None else read_prompts(prompts),
        seeds=seeds,
        quick=quick,
        resume=None if resume is None else _resumed_folder(resume, out, "compare"),
        overrides=list(overrides),
        out=out,
    )
    if as_json:
        terminal.print_json(document)
    else:
        print(f"report: {Path(document['run_folder']) / 'report.html'}")


def comparison_runner(factory: Any) -> Callable[..., Mapping[str, Any]]:
    """The comparison of a backend: its own, or the first installed one that accepts it.

    An entry point of the group `hnkit.comparisons` names an object with `accepts(factory) -> bool` and a call
    `(backend, *, methods, adapter, prompts, seeds, quick, resume, overrides, out) -> document`, whose document holds
    `run_folder`.
    """
    for point in installed_names("hnkit.comparisons"):
        runner: Any = load_installed("hnkit.comparisons", point)
        if runner.accepts(factory):
            found: Callable[..., Mapping[str, Any]] = runner
            return found
    raise InputError(
        f"no comparison is installed for backend {factory.name}: it is for image generators, see hnkit backends"
    )


def _named_backend(name: str | None) -> str:
    if name is None:
        raise InputError(f"no backend given: use --backend with one of {', '.join(installed_names('hnkit.backends'))}")
    return name


def backends(*, as_json: bool) -> None:
    """Print what is installed, what it needs, and whether its weights are present."""
    found: list[dict[str, Any]] = []
    for name in installed_names("hnkit.backends"):
        try:
            factory = backend_factory(name)
            found.append({"name": name, "summary": factory.summary, "status": factory.status(),
                          "presets": sorted(factory.presets)})  # fmt: skip
        except InputError as reason:
            found.append({"name": name, "summary": "", "status": str(reason), "presets": []})
    rewards = installed_names("hnkit.rewards")
    if as_json:
        terminal.print_json({"backends": found, "rewards": rewards})
        return
    screen = terminal.console()
    for entry in found:
        screen.print(Text.assemble((str(entry["name"]), "bold"), f"  {entry['summary']}"))
        lines = [Text(str(entry["status"]))]
        if entry["presets"]:
            lines.append(Text(f"presets: {', '.join(entry['presets'])}", style="dim"))
        screen.print(Padding(Group(*lines), (0, 0, 0, 4)))
    screen.print(Text(f"\nrewards: {', '.join(rewards) or 'none'}"))
