"""`hnkit compare`: the paper's tables and figures for a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.cli.folders import refuse_existing, resumed_folder
from hnkit.cli.options import WithBackend
from hnkit.errors import InputError
from hnkit.internal.values import reason_of, setting

EXAMPLE = "hnkit compare --backend digits --methods base,best-of-n --quick"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """The paper's tables and figures for a backend: base, noise hypernetwork and the baselines, paired.

    Attributes:
        methods: some of base, hypernoise, direct, best-of-2, best-of-4, best-of-n, reno, prompt-optimisation;
            default: all.
        adapter: trained adapter, or the run folder that holds it; default: one is trained here.
        prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME; default: the backend's held-out ones.
        seeds: noise seeds per prompt; default: 4, and 2 with --quick.
        quick: the short version, minutes on a laptop.
        resume: continue a comparison: this one, or the newest.
    """

    methods: str | None = setting(None, metavar="A,B,...")
    adapter: Path | None = setting(None, metavar="DIR")
    prompts: str | None = setting(None, metavar="FILE")
    seeds: int | None = setting(None)
    quick: bool = setting(False)
    resume: str | None = setting(None, metavar="[DIR]")


def run(options: Options) -> int:
    """Run the comparison that the entry-point group `hnkit.comparisons` offers for the backend."""
    from hnkit.backend import backend_factory
    from hnkit.output import terminal
    from hnkit.prompts import read_prompts

    name = options.named_backend()
    runner = comparison_runner(backend_factory(name))
    refuse_existing(None if options.resume is not None else options.out)
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: give at least 1, and 2 or more for error bars")
    folder = None
    if options.resume is not None:
        folder = resumed_folder(options.resume, options.out, "compare", "plan.json")
    document = runner(
        name,
        methods=None if options.methods is None else [part.strip() for part in options.methods.split(",")],
        adapter=options.adapter,
        prompts=None if options.prompts is None else read_prompts(options.prompts),
        seeds=options.seeds,
        quick=options.quick,
        resume=folder,
        overrides=list(options.overrides),
        out=options.out,
    )
    if options.as_json:
        terminal.print_json(document)
    else:
        print(f"report: {Path(document['run_folder']) / 'report.html'}")
    return 0


def comparison_runner(factory: Any) -> Callable[..., Mapping[str, Any]]:
    """The comparison of a backend: the first installed one that accepts it.

    An entry point of the group `hnkit.comparisons` names an object with `accepts(factory) -> bool` and a call
    `(backend, *, methods, adapter, prompts, seeds, quick, resume, overrides, out) -> document`, whose document holds
    `run_folder`.
    """
    from hnkit.backend import installed_names, load_installed

    broken = ""
    for point in installed_names("hnkit.comparisons"):
        try:
            runner: Any = load_installed("hnkit.comparisons", point)
            accepted = runner.accepts(factory)
        except Exception as error:  # noqa: BLE001 - one that is broken may not be the one that is meant
            broken = f"; {point} is left out: {reason_of(error, 300)}"
            continue
        if accepted:
            found: Callable[..., Mapping[str, Any]] = runner
            return found
    raise InputError(
        f"no comparison is installed for backend {factory.name}: it is for image generators, see hnkit backends{broken}"
    )
