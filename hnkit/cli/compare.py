"""`hnkit compare`: the paper's tables and figures for a backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.cli.folders import refuse_existing, resumed_folder
from hnkit.cli.options import WithBackend
from hnkit.errors import InputError
from hnkit.internal.files import read_plain, read_sealed, require_run_folder
from hnkit.internal.values import finite, printable, reason_of, setting
from hnkit.internal.workers import is_first

_PLAN = "plan.json"
EXAMPLE = "hnkit compare --backend digits --methods base,best-of-n --quick"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """The paper's tables and figures for a backend: base, noise hypernetwork and the baselines, paired.

    Attributes:
        methods: some of base, hypernoise, direct, best-of-2, best-of-4, best-of-n, reno, prompt-optimisation;
            default: all, the last where `compare.proposer` or the backend has a proposer.
        adapter: trained adapter, the run folder that holds it, or `bundled`; default: one is trained here.
        prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME; default: the backend's held-out ones.
        seeds: noise seeds per prompt; default: 4, and 2 with --quick.
        quick: the short version, minutes on a laptop.
        resume: continue a comparison: this one, or the newest.
        power: say how many prompts and images a difference of this size needs; with --resume of a finished comparison
            nothing is made.
    """

    methods: str | None = setting(None, metavar="A,B,...")
    adapter: Path | None = setting(None, metavar="DIR")
    prompts: str | None = setting(None, metavar="FILE")
    seeds: int | None = setting(None)
    quick: bool = setting(False)
    resume: str | None = setting(None, metavar="[DIR]")
    power: float | None = setting(None, metavar="DIFFERENCE")

    def __post_init__(self) -> None:
        if self.power is not None and not 0 < self.power < float("inf"):
            raise InputError(f"--power {self.power:g}: give a difference of scores, a finite number above 0")


def run(options: Options) -> int:
    """Run the comparison that the entry-point group `hnkit.comparisons` offers for the backend."""
    from hnkit.adapters import local_files_only, named_adapter
    from hnkit.backend import backend_factory
    from hnkit.output import terminal
    from hnkit.prompts import read_prompts

    folder = None
    if options.resume is not None:
        folder = resumed_folder(options.resume, options.out, "compare", _PLAN)
    name = options.named_backend() if folder is None or options.backend is not None else _backend_of(folder)
    runner = comparison_runner(backend_factory(name))
    if options.resume is None:
        refuse_existing(options.out)
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: give at least 1, and 2 or more for error bars")
    local = local_files_only(name, options.overrides)
    finished = None if folder is None or options.power is None else finished_comparison(folder, name)
    document = finished or runner(
        name,
        methods=None if options.methods is None else [part.strip() for part in options.methods.split(",")],
        adapter=named_adapter(name, options.adapter),
        prompts=None if options.prompts is None else read_prompts(options.prompts, local_files_only=local),
        seeds=options.seeds,
        quick=options.quick,
        resume=folder,
        overrides=list(options.all_overrides()),
        out=options.out,
    )
    needed = None if options.power is None else power_entries(document, options.power)
    if not is_first():
        return 0  # one of several processes speaks
    if options.as_json:
        terminal.print_json(finite(dict(document) if needed is None else {**document, "power": needed}))
    else:
        if needed is not None:
            screen = terminal.console()
            screen.print(terminal.simple_table(*power_table(needed)))
            for sentence in power_sentences(needed):
                screen.print(terminal.Words(sentence))
        elif (printed := getattr(runner, "printed", None)) is not None:
            table, card = printed(document)
            terminal.print_table(table)
            terminal.print_card(card)
        print(printable(f"report: {Path(document['run_folder']) / 'report.html'}"))
    return 0


def _backend_of(folder: Path) -> str:
    """The backend that the plan of a comparison names."""
    require_run_folder(folder, "compare")
    try:
        return str(read_sealed(folder / _PLAN)["backend"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"--resume {folder}: no comparison is there ({_PLAN} is missing or damaged): name its folder"
        ) from error


def comparison_runner(factory: Any) -> Callable[..., Mapping[str, Any]]:
    """The comparison of a backend: the first installed one that accepts it.

    An entry point of the group `hnkit.comparisons` names an object with `accepts(factory) -> bool` and a call
    `(backend, *, methods, adapter, prompts, seeds, quick, resume, overrides, out) -> document`, whose document holds
    `run_folder`. It may have `printed(document) -> (Table, Card)`, which the command then ends with.
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


def finished_comparison(folder: Path, backend: str) -> Mapping[str, Any] | None:
    """The document of a comparison that is finished; `None` where it is not, or where it says nothing of variances.

    Raises:
        InputError: it is another backend's.
    """
    try:
        document = json.loads(read_plain(folder / "report.json"))
        rows, compared = document["table_1"], document["settings"]["backend"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if compared != backend:
        raise InputError(f"--resume {folder} compares backend {compared!r}, not {backend!r}")
    if not all("components" in row for row in rows):
        return None
    return {**document, "run_folder": str(folder)}


def power_entries(document: Mapping[str, Any], difference: float) -> list[dict[str, Any]]:
    """What a difference of that size needs, by method and score of table 1."""
    from hnkit.internal.power import LEVEL, POWER, Components, detectable, needs

    entries = []
    for row in document["table_1"]:
        for score, values in row["components"].items():
            found = Components(**values)
            entries.append(
                {
                    "method": row["method"],
                    "score": score,
                    "difference": difference,
                    "level": LEVEL,
                    "power": POWER,
                    "components": values,
                    "detectable": detectable(found.variance(found.seeds), found.prompts),
                    "needs": [vars(need) for need in needs(found, difference)],
                }
            )
    if not entries:
        raise InputError(
            "--power: this comparison tells no variance: it needs a method beside the base, and two prompts or more"
        )
    return entries


def power_table(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Prompts needed at one noise a prompt and at more, with the interval that the run leaves open."""
    most = max((entry["needs"] for entry in entries), key=len)
    headers = ("", "score", *(f"{need['seeds']} a prompt" for need in most))
    rows = []
    for entry in entries:
        shown = [f"{need['prompts']:,} ({need['least']:,} to {_end(need['most'])})" for need in entry["needs"]]
        rows.append((entry["method"], entry["score"], *shown, *[""] * (len(most) - len(shown))))
    return headers, rows


def _end(most: int | None) -> str:
    return "more than 10^9" if most is None else f"{most:,}"


def power_sentences(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the table is read, and what the run itself could find."""
    first = entries[0]
    seeds = first["components"]["seeds"]
    found = [
        f"Prompts that a paired t-test over prompts needs to find a difference of {first['difference']:g} with "
        f"{100 * first['power']:.0f} % probability at the level {100 * first['level']:.0f} %, by noises a prompt; in "
        "parentheses 95 % intervals, for the variances come from this run."
    ]
    if seeds == 1:
        found.append("The run had one noise a prompt, which does not tell noise from prompt: no other number is known.")
    found += [
        f"{entry['method']}, {entry['score']}: these {entry['components']['prompts']} prompts of {seeds} find "
        f"{entry['detectable']:.3g}."
        for entry in entries
    ]
    return found
