"""`hnkit generate`: base and steered images of prompts from the same noise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnkit.cli.folders import refuse_existing, resumed_folder
from hnkit.cli.options import WithBackend, command_line, flags_of
from hnkit.config import GenerateSettings, split_model, split_permissions
from hnkit.errors import InputError
from hnkit.internal.values import number_of, printable, setting
from hnkit.internal.workers import ALONE, Workers

if TYPE_CHECKING:
    from hnkit.backend import BackendBase
    from hnkit.generate import GeneratePlan
    from hnkit.output.page import Card

EXAMPLE = "hnkit generate --backend digits --adapter bundled --prompt 'a three'"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """Write base and steered images, pair by pair from the same noise, and a contact sheet.

    Attributes:
        adapter: trained adapter, the run folder that holds it, or `bundled`; default: base images alone.
        prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME; default: the backend's held-out ones.
        prompt: one prompt (repeatable).
        resume: continue a run that was cut short: this one, or the newest.
    """

    adapter: Path | None = setting(None, metavar="DIR")
    prompts: str | None = setting(None, metavar="FILE")
    prompt: tuple[str, ...] = setting(())
    settings: Mapping[str, Any] = flags_of(GenerateSettings)
    resume: str | None = setting(None, metavar="[DIR]")

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompt:
            raise InputError("--prompts and --prompt together: name one source of prompts")
        if self.resume is None:
            return
        others = split_model(split_permissions(self.overrides)[1])[1]
        given: dict[str, Any] = {
            "--prompts": self.prompts,
            "--prompt": self.prompt,
            "--set": others,
        }
        given |= {f"--{name}": True for name in self.settings}
        for flag, value in given.items():
            if value:
                raise InputError(f"{flag} with --resume: a resumed run keeps its settings: leave the flag out")


def run(options: Options) -> int:
    """Write the images of every prompt; see `hnkit.generate`."""
    from hnkit.generate import generate_pairs
    from hnkit.internal.files import resumable
    from hnkit.internal.folders import run_lock, sweep_temporaries
    from hnkit.internal.provenance import provenance, record_provenance
    from hnkit.output import terminal
    from hnkit.training.processes import evaluation_workers

    workers = evaluation_workers(options.backend, options.overrides, vars(options))
    folder, plan, backend = resumed(options) if options.resume is not None else begun(options, workers)
    with run_lock(folder) if workers.index == 0 else contextlib.nullcontext():
        workers.on_main(lambda: sweep_temporaries(folder))
        if options.resume is not None:
            workers.on_main(lambda: plan.write(folder))  # what was moved has been found
        record = provenance(
            model=plan.model, adapter=plan.adapter_files or None, prompts=plan.prompts, asked=plan.asked
        )
        try:
            with resumable("hnkit", "generate", "--resume", str(folder)):
                workers.on_main(lambda: record_provenance(folder, record))
                with terminal.steps(len(plan.prompts), lines=False) as shown:
                    document = generate_pairs(
                        backend, plan.prompts, plan.settings, folder, steered=plan.adapter is not None,
                        records=plan.records, workers=workers, made_from=plan.made_from, card=recorded_card(plan),
                        command=reproducing_command(plan, backend), say=shown.start,
                        warn=lambda text: print(f"hnkit: {printable(text)}", file=sys.stderr),
                    )  # fmt: skip
        except InputError:
            if options.as_json and workers.index == 0:  # what is done is not lost with the disk
                terminal.print_json(unfinished(folder, plan))
            raise
    if workers.index:
        return 0
    if options.as_json:
        terminal.print_json({**document, "run_folder": str(folder)})
    else:
        terminal.print_card_of(document)
        whose = "" if document["verdict"] is None else "; the verdict is the adapter's, from its training"
        print(printable(f"{number_of(document['images'], 'image')}{whose}\nreport: {folder / 'report.html'}"))
    return 0


def recorded_card(plan: GeneratePlan) -> Card | None:
    """The card that the adapter's training left, or one that says what was not measured; `None` for the base alone."""
    from hnkit.internal.folders import adapter_folder
    from hnkit.output.verdict import RunFigures, read_card, verdict_card

    if plan.adapter is None:
        return None
    return read_card(adapter_folder(plan.adapter)) or verdict_card(RunFigures())


def reproducing_command(plan: GeneratePlan, backend: BackendBase) -> str:
    """The command that makes these images again, the same for a run that was gone on with."""
    from hnkit.adapters import adapter_word, default_prompts
    from hnkit.generate import PROMPTS

    usual = asdict(GenerateSettings())
    own = [] if backend.prompts is None else default_prompts(backend)
    named = () if plan.records or list(plan.prompts) == own else plan.prompts
    options = Options(
        backend=plan.backend,
        adapter=None if plan.adapter is None else Path(adapter_word(plan.backend, plan.adapter)),
        prompts=PROMPTS if plan.records else None,
        prompt=named,
        settings={key: value for key, value in asdict(plan.settings).items() if value != usual[key]},
        overrides=tuple(split_permissions(plan.overrides)[1]),
    )
    return command_line("generate", options)


def begun(options: Options, workers: Workers = ALONE) -> tuple[Path, GeneratePlan, BackendBase]:
    """A new run folder with its plan, and the backend; whatever can be refused is refused before the folder is made."""
    from hnkit.adapters import adapter_digests, default_prompts, load_trained, local_files_only, named_adapter
    from hnkit.generate import GeneratePlan, require_images
    from hnkit.internal.files import new_run_folder
    from hnkit.output.layouts import check_layout
    from hnkit.prompts import read_records

    name = options.named_backend()
    settings = GenerateSettings(**options.settings)
    refuse_existing(options.out)
    records = {}
    if options.prompts is not None:
        records = read_records(options.prompts, local_files_only=local_files_only(name, options.overrides))
    texts = list(dict.fromkeys(options.prompt)) or list(records)
    if not all(text.strip() for text in texts):
        raise InputError("--prompt is empty: write a prompt")
    if texts and settings.layout is not None:
        check_layout(settings.layout, texts, settings.count, records)
    chosen = named_adapter(name, options.adapter)
    backend, _ = load_trained(name, chosen, options.all_overrides())
    texts = texts or default_prompts(backend)
    require_images(backend, texts, settings, records)
    adapter = None if chosen is None else str(chosen.resolve())
    plan = GeneratePlan(
        name, settings, tuple(texts), records, options.all_overrides(), adapter, adapter_digests(adapter),
        backend.model_digest(),
    )  # fmt: skip

    def made() -> Path:
        folder = new_run_folder(options.out, "generate")
        plan.write(folder)
        return folder

    folder = workers.on_main(made)
    return folder, plan, backend


def resumed(options: Options) -> tuple[Path, GeneratePlan, BackendBase]:
    """The run to go on with, whose adapter and model must be what they were, wherever they lie now."""
    from hnkit.adapters import adapter_digests, load_trained, named_adapter
    from hnkit.generate import PLAN, GeneratePlan
    from hnkit.internal.folders import require_resumable

    folder = resumed_folder(str(options.resume), options.out, "generate", PLAN)
    require_resumable(folder, "generate")
    plan = GeneratePlan.read(folder)
    if options.backend not in (None, plan.backend):
        raise InputError(f"--resume {folder} has backend {plan.backend!r}, not {options.backend!r}")
    if options.adapter is not None:
        if plan.adapter is None:
            raise InputError(f"--adapter with --resume {folder}: its images are made without one: leave the flag out")
        plan = replace(plan, adapter=str((named_adapter(plan.backend, options.adapter) or options.adapter).resolve()))
    if adapter_digests(plan.adapter) != plan.adapter_files:
        raise InputError(
            f"--resume {folder}: its adapter {plan.adapter} is gone or has changed since: restore it, name where it "
            "lies now with --adapter DIR, or start anew"
        )
    adapter = None if plan.adapter is None else Path(plan.adapter)
    given = options.all_overrides()
    if plan.model is None and (moved := split_model(given)[0]):
        raise InputError(
            f"--resume {folder} with {moved[-1]}: backend {plan.backend!r} does not know its models by their "
            "content, and another one would not be noticed: leave it out, or start anew"
        )
    if moved := split_model(given)[0]:
        plan = replace(plan, overrides=(*split_model(plan.overrides)[1], *moved))
    backend, _ = load_trained(plan.backend, adapter, [*plan.overrides, *split_permissions(given)[0]])
    if backend.model_digest() != plan.model:
        raise InputError(
            f"--resume {folder}: the base model has changed since (SHA-256 {str(plan.model)[:12]}... then, "
            f"{str(backend.model_digest())[:12]}... now): restore it, or start anew"
        )
    backend.prepare(plan.prompts)
    return folder, plan, backend


def unfinished(folder: Path, plan: GeneratePlan) -> dict[str, Any]:
    """What `--json` says of a run that ended early."""
    from hnkit.generate import complete_prompts

    kinds = ["base"] if plan.adapter is None else ["base", "steered"]
    images = complete_prompts(folder, plan) * plan.settings.count * len(kinds)
    return {"backend": plan.backend, "images": images, "prompts": list(plan.prompts), "kinds": kinds,
            **asdict(plan.settings), "finished": False, "run_folder": str(folder)}  # fmt: skip
