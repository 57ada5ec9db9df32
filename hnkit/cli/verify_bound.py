"""`hnkit verify-bound`: check the theory on toys, on a map, or on a trained network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hnkit.cli.folders import refuse_existing
from hnkit.cli.options import WithBackend
from hnkit.errors import InputError
from hnkit.internal.values import setting
from hnkit.internal.workers import ALONE, Workers

if TYPE_CHECKING:
    from hnkit.checks.parts import Parts
    from hnkit.checks.report import Report
    from hnkit.checks.settings import VerifySettings
    from hnkit.maps import NoiseMap

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
    verbose: bool = setting(False, flags=("--verbose", "-v"))

    def __post_init__(self) -> None:
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
    from hnkit.checks.view import report_view
    from hnkit.output import terminal
    from hnkit.training.processes import evaluation_workers

    settings = options.settings()
    refuse_existing(options.out)
    workers = evaluation_workers(options.backend, options.all_overrides(), vars(options))
    report, parts = verify(options, settings, workers)
    if workers.index:  # one of several processes writes and speaks
        return 0 if report.ok else 1
    try:
        folder = parts.finish(report)
    except (OSError, InputError):  # what was measured is not lost with the disk
        if options.as_json:
            terminal.print_json({**report.to_json(), "run_folder": None})
        else:
            terminal.console().print(report_view(report, verbose=options.verbose))
        raise
    if options.as_json:
        terminal.print_json({**report.to_json(), "run_folder": str(folder)})
    else:
        terminal.console().print(report_view(report, verbose=options.verbose))
        print(f"report: {folder / 'report.html'}")
    return 0 if report.ok else 1


def verify(options: Options, settings: VerifySettings, workers: Workers = ALONE) -> tuple[Report, Parts]:
    """The report on the map, the trained network or the toys that the options name, and what is written of it."""
    from hnkit.adapters import adapter_digests, default_prompts, load_trained, local_files_only, named_adapter
    from hnkit.checks.parts import Parts
    from hnkit.checks.reference_maps import reference_maps
    from hnkit.checks.verify_backend import verify_backend
    from hnkit.checks.verify_map import verify_map
    from hnkit.checks.verify_toys import chosen_problems, verify_toys
    from hnkit.internal.provenance import provenance
    from hnkit.output import terminal
    from hnkit.prompts import read_prompts

    if options.map_path is not None:
        sizes = parse_shape(options.shape)
        parts = Parts(options.out, provenance(), workers)
        name = options.map_path
        return verify_map(load_map(name), sizes, settings, name=name, done=parts.done, workers=workers), parts
    if options.backend is not None:
        if options.adapter is None:
            raise InputError(
                f"--backend {options.backend} without --adapter: name the folder of the adapter or its run"
            )
        adapter = named_adapter(options.backend, options.adapter)
        loaded, trained_alpha = load_trained(options.backend, adapter, options.all_overrides())
        local = local_files_only(options.backend, options.overrides)
        given = options.prompts
        texts = default_prompts(loaded) if given is None else read_prompts(given, local_files_only=local)
        alpha = trained_alpha if options.alpha is None else options.alpha
        made_with = provenance(model=loaded.model_digest(), adapter=adapter_digests(adapter), prompts=texts)
        parts = Parts(options.out, made_with, workers)
        return verify_backend(loaded, texts, settings, alpha=alpha, done=parts.done, workers=workers), parts
    problems = chosen_problems(options.toy, options.alpha)
    references = [name for name in reference_maps() if not options.toy or name in options.toy]
    parts = Parts(options.out, provenance(), workers)
    parts.share()
    with terminal.steps(-(-(len(problems) + len(references)) // workers.count)) as steps:
        say = steps.start if workers.index == 0 else (lambda _: None)
        found = verify_toys(problems, settings, references=references, say=say, done=parts.done, workers=workers)
    return found, parts


def parse_shape(text: str | None) -> tuple[int, ...]:
    """Read `3,16,16`; at most 2^24 entries in all."""
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
    from torch import nn

    from hnkit.rewards import import_object, made

    found = made(import_object(path, "--map"), path, "--map")
    if not callable(found):
        raise InputError(f"--map {path} is {type(found).__name__}: name a callable f(x), a module, or a factory of one")
    return found.eval() if isinstance(found, nn.Module) else found
