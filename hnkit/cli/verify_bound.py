"""`hnkit verify-bound`: check the theory on toys, on a map, or on a trained network."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hnkit.cli.folders import refuse_existing, resumed_folder
from hnkit.cli.options import Common, WithBackend, command_line
from hnkit.config import split_model, split_permissions
from hnkit.errors import InputError
from hnkit.internal.files import document_digest
from hnkit.internal.values import finite, printable, setting, typed_values
from hnkit.internal.workers import ALONE, Workers, is_first

if TYPE_CHECKING:
    from hnkit.checks.report import Report
    from hnkit.checks.settings import VerifySettings
    from hnkit.internal.kept import Keep
    from hnkit.maps import NoiseMap

_OF_THIS_CALL = {"out", "as_json", "verbose", "resume", "model_id"}
"""Fields of the options that say nothing about what is verified; `model_id` stands for an override."""
EXAMPLE = "hnkit verify-bound --map mymaps:f --shape 3,16,16 --samples 64"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """Check the theory: on every closed-form toy, on a map of yours, or on a trained network.

    Exit code 0: no check fails; 1: a check fails; 2: bad input.

    Attributes:
        toy: one toy (repeatable); default: all.
        map_path: your own map: callable, nn.Module or factory.
        shape: noise shape of one row of --map.
        adapter: trained adapter, the run folder that holds it, or `bundled`.
        prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME; default: the backend's held-out ones.
        method: how E(J) is computed; default: exact where it can be.
        samples: noise samples; default 2048 for a toy, 256 to 32 for a map, by dimension.
        seed: seed of noise and probes.
        alpha: temperature of the tilt; default: the toy's own.
        probes: probes per sample of a stochastic method.
        steps: Krylov steps or series terms; default: adaptive.
        rel_error: aim at this Monte Carlo error, relative to the KL.
        budget: matrix-vector products in all, at most.
        certify: enclose E(A) and its bounds in ball arithmetic.
        injection: share of --map's noise that is drawn afresh where it is used; bounds that law's KL for any map.
        max_delta: |f| that --map is clipped at there.
        resume: continue a run that was cut short: this one, or the newest; --map is named again.
        verbose: print every check in full.
    """

    toy: tuple[str, ...] = setting((), metavar="NAME")
    map_path: str | None = setting(None, flags=("--map",), metavar="PKG.MOD:F")
    shape: str | None = setting(None, metavar="C,H,W")
    adapter: Path | None = setting(None, metavar="DIR")
    prompts: str | None = setting(None, metavar="FILE")
    method: Literal["exact", "arnoldi", "lanczos", "low-rank", "power", "roulette", "second-order", "l2"] | None = (
        setting(None)
    )
    samples: int | None = setting(None)
    seed: int = setting(0)
    alpha: float | None = setting(None)
    probes: int | None = setting(None)
    steps: int | None = setting(None)
    rel_error: float | None = setting(None)
    budget: int | None = setting(None)
    certify: bool = setting(False)
    injection: float | None = setting(None)
    max_delta: float | None = setting(None)
    resume: str | None = setting(None, metavar="[DIR]")
    verbose: bool = setting(False, flags=("--verbose", "-v"))

    def __post_init__(self) -> None:
        if self.resume is not None:
            self._require_nothing_else()
            return
        named = [flag for flag, given in self._subjects().items() if given]
        if len(named) > 1:
            raise InputError(f"{' and '.join(named)} together: name one thing to verify")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"--alpha {self.alpha:g}: give a finite positive temperature")
        for flag, given, needs in (
            ("--shape", self.shape is not None, "--map"),
            ("--adapter", self.adapter is not None, "--backend"),
            ("--prompts", self.prompts is not None, "--backend"),
            ("--model-id", self.model_id is not None, "--backend"),
            ("--set", bool(self.overrides), "--backend"),
            ("--injection", self.injection is not None, "--map"),
        ):
            if given and needs not in named:
                raise InputError(f"{flag} without {needs}: it says nothing about {named[0] if named else 'the toys'}")
        if self.max_delta is not None and self.injection is None:
            raise InputError(f"--max-delta {self.max_delta:g} without --injection: it is about injected noise alone")
        if self.alpha is not None and self.map_path is not None:
            raise InputError("--alpha with --map: the temperature belongs to a tilted law, and a map has none")

    def _subjects(self) -> dict[str, bool]:
        return {"--toy": bool(self.toy), "--map": self.map_path is not None, "--backend": self.backend is not None}

    def _require_nothing_else(self) -> None:
        """Beside `--resume` stands only what no file may say, what may have been moved, and where output goes."""
        moved = {"map_path", "backend", "model_id", "overrides", "resume", *(item.name for item in fields(Common))}
        others = split_model(split_permissions(self.overrides)[1])[1]
        given = {item.name: item for item in fields(self) if item.name not in moved | {"adapter", "verbose"}}
        for name, item in given.items():
            if getattr(self, name) != item.default:
                flag = (item.metadata["flags"] or (f"--{name.replace('_', '-')}",))[0]
                raise InputError(f"{flag} with --resume: a resumed run keeps its settings: leave the flag out")
        if others:
            raise InputError("--set with --resume: a resumed run keeps its settings: leave the flag out")

    def settings(self) -> VerifySettings:
        """What every run of checks is told."""
        from hnkit.checks.settings import VerifySettings
        from hnkit.injection import NoiseInjection

        chosen = {name: getattr(self, name) for name in ("probes", "steps", "rel_error", "budget")}
        options = {name: value for name, value in chosen.items() if value is not None}
        deployed = None if self.injection is None else NoiseInjection(self.injection, self.max_delta)
        return VerifySettings(self.samples, self.seed, self.method, self.certify, options, deployed)


def run(options: Options) -> int:
    """Measure and check what was named, write the run folder, print the report."""
    from hnkit.checks.parts import PLAN, Parts
    from hnkit.checks.view import report_view
    from hnkit.internal.folders import require_resumable
    from hnkit.internal.provenance import provenance
    from hnkit.output import terminal
    from hnkit.training.processes import evaluation_workers, said_once

    folder, asked, before = None, options, None
    if options.resume is None:
        refuse_existing(options.out)
    else:
        folder = resumed_folder(str(options.resume), options.out, "verify", PLAN)
        require_resumable(folder, "verify")
        if (finished := finished_report(folder)) is not None:
            if is_first() and options.as_json:  # one of several processes speaks
                terminal.print_json({**finished, "run_folder": str(folder)})
            elif is_first():
                print(printable(f"{folder} is finished, nothing to do; report: {folder / 'report.html'}"))
            return 0 if finished["ok"] else 1
        asked, before = _asked_then(options, folder)
    workers = evaluation_workers(asked.backend, asked.all_overrides(), vars(options))
    if folder is not None and workers.count > 1:
        raise said_once(f"--resume {folder} with {workers.count} processes: one process goes on: leave torchrun out")
    subject = loaded_subject(asked, None if before is None else before.prompts, workers)
    if folder is not None and before is not None:
        _require_same(folder, before, subject.inputs)
    inputs, flags = subject.inputs, _recorded(asked)
    record = provenance(
        model=inputs.model, adapter=inputs.adapter_files or None, prompts=inputs.prompts, map=inputs.map_code,
        asked=_asked_digest(flags),
    )  # fmt: skip
    plan = {"flags": flags, "inputs": vars(inputs)}
    again = [] if asked.map_path is None else ["--map", asked.map_path]
    with Parts(options.out, record, plan, again, workers) as parts:
        if folder is not None and not parts.take_up(folder):
            print("hnkit: code or versions have changed since: everything is measured again", file=sys.stderr)
        if subject.shared:
            parts.share()
        report = subject.verify(parts.keep)
        if workers.index:  # one of several processes writes and speaks
            return 0 if report.ok else 1
        try:
            written = parts.finish(report, _command(asked))
        except (OSError, InputError):  # what was measured is not lost with the disk
            if options.as_json:
                begun = None if parts.folder is None else str(parts.folder)
                terminal.print_json({**report.to_json(), "finished": False, "run_folder": begun})
            else:
                terminal.console().print(report_view(report, verbose=options.verbose))
            raise
    if options.as_json:
        terminal.print_json({**report.to_json(), "run_folder": str(written)})
    else:
        terminal.console().print(report_view(report, verbose=options.verbose))
        print(printable(f"report: {written / 'report.html'}"))
    return 0 if report.ok else 1


@dataclass(frozen=True)
class Inputs:
    """What a run was made from, by content.

    Attributes:
        model: SHA-256 of the base model where the backend knows it.
        adapter_files: SHA-256 of the adapter's files by name.
        prompts: the prompts themselves.
        map_code: SHA-256 of the file that a map of one's own is written in, and of its weights.
    """

    model: str | None = None
    adapter_files: dict[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None
    map_code: str | None = None


@dataclass(frozen=True)
class Subject:
    """What is verified: what it is made from, and the function that measures it and keeps its parts.

    `shared`: of several processes, each makes parts of its own.
    """

    inputs: Inputs
    verify: Callable[[Keep], Report]
    shared: bool = False


def loaded_subject(options: Options, prompts: Sequence[str] | None = None, workers: Workers = ALONE) -> Subject:
    """The map, the trained network or the toys that the options name; `prompts` stand for those of `--prompts`."""
    from hnkit.adapters import adapter_digests, default_prompts, load_trained, local_files_only, named_adapter
    from hnkit.checks.reference_maps import reference_maps
    from hnkit.checks.verify_backend import verify_backend
    from hnkit.checks.verify_map import verify_map
    from hnkit.checks.verify_toys import chosen_problems, verify_toys
    from hnkit.output import terminal
    from hnkit.prompts import read_prompts

    settings = options.settings()
    if options.map_path is not None:
        sizes, name = parse_shape(options.shape), options.map_path
        f = load_map(name)
        inputs = Inputs(map_code=map_digest(f))
        return Subject(inputs, lambda keep: verify_map(f, sizes, settings, name=name, keep=keep, workers=workers))
    if options.backend is not None:
        if options.adapter is None:
            raise InputError(
                f"--backend {options.backend} without --adapter: name the folder of the adapter or its run"
            )
        adapter = named_adapter(options.backend, options.adapter)
        loaded, trained_alpha = load_trained(options.backend, adapter, options.all_overrides())
        if prompts is None and options.prompts is not None:
            local = local_files_only(options.backend, options.overrides)
            prompts = read_prompts(options.prompts, local_files_only=local)
        texts = default_prompts(loaded) if prompts is None else prompts
        alpha = trained_alpha if options.alpha is None else options.alpha
        inputs = Inputs(loaded.model_digest(), adapter_digests(adapter), tuple(texts))
        return Subject(
            inputs, lambda keep: verify_backend(loaded, texts, settings, alpha=alpha, keep=keep, workers=workers)
        )
    problems = chosen_problems(options.toy, options.alpha)
    references = [name for name in reference_maps() if not options.toy or name in options.toy]

    def toys(keep: Keep) -> Report:
        with terminal.steps(-(-(len(problems) + len(references)) // workers.count)) as steps:
            say = steps.start if workers.index == 0 else (lambda _: None)
            return verify_toys(problems, settings, references=references, say=say, keep=keep, workers=workers)

    return Subject(Inputs(), toys, shared=True)


def finished_report(folder: Path) -> dict[str, Any] | None:
    """The report of a run that has ended; `None` while it has not."""
    from hnkit.checks.parts import UNFINISHED
    from hnkit.internal.files import read_plain

    if (folder / UNFINISHED).exists():
        return None
    try:
        document = json.loads(read_plain(folder / "report.json"))
        if isinstance(document["ok"], bool):
            return dict(document)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return None


def _recorded(options: Options) -> dict[str, Any]:
    """The flags that a run depends on, for its plan: where the adapter lies in full, no leave to download."""
    from hnkit.adapters import BUNDLED

    asked = [item for item in fields(options) if item.name not in _OF_THIS_CALL]
    found = {item.name: value for item in asked if (value := getattr(options, item.name)) != item.default}
    found["overrides"] = split_permissions(options.all_overrides())[1]
    if options.adapter is not None:
        found["adapter"] = BUNDLED if str(options.adapter) == BUNDLED else str(options.adapter.resolve())
    return found


def _asked_digest(flags: Mapping[str, Any]) -> str:
    """SHA-256 of what was asked, but for where something lies: of that, the inputs hold the content."""
    kept = {name: value for name, value in flags.items() if name not in ("adapter", "prompts")}
    # what is infinite will be refused by name
    return document_digest(finite(kept | {"overrides": split_model(flags["overrides"])[1]}))


def _command(options: Options) -> str:
    """The command that makes the report again, the same for a run that was gone on with."""
    found = _recorded(options)
    adapter = None if options.adapter is None else Path(found["adapter"])
    overrides = tuple(found["overrides"])
    return command_line("verify-bound", replace(options, adapter=adapter, overrides=overrides, model_id=None))


def _asked_then(options: Options, folder: Path) -> tuple[Options, Inputs]:
    """What the run of a folder was asked, with what has been moved since, and what it was made from."""
    from hnkit.checks.parts import PLAN
    from hnkit.internal.files import read_sealed

    try:
        document = read_sealed(folder / PLAN)
        flags = typed_values(document["flags"], Options, PLAN)
        before = Inputs(**typed_values(document["inputs"], Inputs, PLAN))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--resume {folder}: no run of verify-bound is begun there ({PLAN} is missing or damaged): name its folder"
        ) from error
    overrides = flags.pop("overrides", ())
    if set(flags) & _OF_THIS_CALL or (lifting := split_permissions(overrides)[0]):
        given = lifting[0] if not set(flags) & _OF_THIS_CALL else min(set(flags) & _OF_THIS_CALL)
        raise InputError(f"--resume {folder}: its {PLAN} has {given!r}: only your own flag may say that")
    for name, flag in (("map_path", "--map"), ("backend", "--backend")):
        then, now = flags.get(name), getattr(options, name)
        if now is not None and now != then:
            raise InputError(
                f"--resume {folder} with {flag} {now}: it verifies {then or 'something else'}: leave it out"
            )
    if "map_path" in flags and options.map_path is None:
        words = shlex.join(("--map", printable(flags["map_path"])))
        raise InputError(f"--resume {folder} is of a map of yours: add {words}, for no file may say what is imported")
    if options.adapter is not None:
        if "adapter" not in flags:
            raise InputError(f"--resume {folder} with --adapter {options.adapter}: it has none: leave it out")
        flags["adapter"] = options.adapter
    given_again = options.all_overrides()
    if split_model(given_again)[0]:
        if before.model is None:
            raise InputError(
                f"--resume {folder} with {split_model(given_again)[0][-1]}: its backend does not know its models by "
                "their content, and another one would not be noticed: leave it out, or start anew"
            )
        overrides = split_model(overrides)[1]
    return Options(**flags, overrides=(*overrides, *given_again)), before


def _require_same(folder: Path, before: Inputs, now: Inputs) -> None:
    """Refuse to go on with another model, adapter or map than the run was begun with."""
    for what, then, found in (
        ("its base model", before.model, now.model),
        ("its adapter", before.adapter_files, now.adapter_files),
        ("the code of its map", before.map_code, now.map_code),
    ):
        if then != found:
            raise InputError(f"--resume {folder}: {what} has changed since: restore it, or start anew")


def parse_shape(text: str | None) -> tuple[int, ...]:
    """Read `3,16,16`; at most 2^24 entries in all."""
    if text is None:
        raise InputError("--map without --shape: give the noise shape of one row, such as --shape 3,16,16")
    if not re.fullmatch(r" *[+-]?[0-9]{1,18} *(, *[+-]?[0-9]{1,18} *)*", text):
        raise InputError(f"--shape {text}: write positive integers with commas, such as 3,16,16")
    shape = tuple(int(part) for part in text.split(","))
    if any(size < 1 for size in shape) or math.prod(shape) > 2**24:
        raise InputError(f"--shape {text}: give positive sizes, at most {2**24} entries in all, such as 3,16,16")
    return shape


def load_map(path: str) -> NoiseMap:
    """The map at `pkg.mod:f`: a function of the noise, a module, or something that makes one without arguments."""
    from torch import nn

    from hnkit.rewards import import_object, made

    found = made(import_object(path, "--map"), path, "--map")
    if not callable(found):
        raise InputError(f"--map {path} is {type(found).__name__}: name a callable f(x), a module, or a factory of one")
    return found.eval() if isinstance(found, nn.Module) else found


def map_digest(f: NoiseMap) -> str | None:
    """SHA-256 of the file that a map is written in and of its weights; `None` where neither is to be had."""
    import torch
    from torch import nn

    found = []
    try:
        source = inspect.getsourcefile(inspect.unwrap(f) if inspect.isroutine(f) else type(f))
        found.append(hashlib.sha256(Path(source or "").read_bytes()).hexdigest())
    except (TypeError, OSError):  # built in, or typed into a prompt
        pass
    if isinstance(f, nn.Module):
        for name, tensor in f.state_dict().items():
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found.append(hashlib.sha256(name.encode() + content).hexdigest())
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else None
