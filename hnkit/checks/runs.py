"""The runs of `verify-bound`: on closed-form problems, on one map, and on a trained hypernetwork."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hnkit.checks.check import (
    Check,
    reported,
)
from hnkit.checks.report import Quantity, Report
from hnkit.errors import ExpansiveMapError, InputError, NotApplicable

if TYPE_CHECKING:
    from torch import Tensor

    from hnkit.maps import NoiseMap

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from hnkit.backend import Backend, completed, installed_names, load_installed
from hnkit.bounds import frobenius_bound, local_theorem7_bound, second_order_remainder_bound, theorem7_bound
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.plots import map_plots, toy_plots
from hnkit.checks.problems import TOY_CHECKS
from hnkit.checks.subjects import DENSE_DIM, Subject
from hnkit.checks.tilted import Tilted, contraction
from hnkit.figures import mean_shift_share
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import mean_and_stderr, ratio_and_stderr
from hnkit.kl.divergence import METHODS
from hnkit.lipschitz.certify import certify_injective
from hnkit.maps import NoiseMap
from hnkit.tilt import TiltedProblem, optimality_gap

TOY_SAMPLES = 2048
_PROMPTS_SHOWN = 12
_ALPHAS = (1e-3, 1e4)

Say = Callable[[str], None]


@dataclass(frozen=True)
class VerifySettings:
    """What a run of `verify-bound` is told, whatever it is run on.

    Attributes:
        samples: noise samples; `None`: 2048 for a toy, 256 down to 32 for a map, by its dimension.
        seed: of the noise and of every probe.
        method: of `noise_kl`; `None`: exact up to 1024 dimensions, Arnoldi above.
        certify: enclose E(A) and its bounds in ball arithmetic at some samples.
        options: further options of `noise_kl`.
    """

    samples: int | None = None
    seed: int = 0
    method: str | None = None
    certify: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples is not None and not 1 <= self.samples < 2**40:
            raise InputError(f"{self.samples} samples: give at least 1, and 2 or more for error bars, below 2^40")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed}: give an integer from 0 to 2^63 - 1")
        if self.certify and find_spec("flint") is None:
            raise InputError("--certify needs the package python-flint: pip install 'hnkit[certify]' adds it")
        if self.method is not None and self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}: accepted are {', '.join(METHODS)}")

    def samples_for(self, dim: int) -> int:
        """Samples of a map in so many dimensions: 256, and fewer, down to 32, where each costs d products."""
        return self.samples or min(256, max(32, 2**13 // dim))

    def method_for(self, dim: int) -> str:
        """The method that is used in so many dimensions."""
        return self.method or ("exact" if dim <= DENSE_DIM else "arnoldi")

    def to_config(self) -> dict[str, Any]:
        """The settings as a JSON object."""
        return {"samples": self.samples, "seed": self.seed, "method": self.method or "automatic",
                "certify": self.certify, **self.options}  # fmt: skip


# --- problems ---------------------------------------------------------------------------------------------------


def installed_problems() -> dict[str, Callable[[], TiltedProblem]]:
    """Every closed-form problem of the installed distributions, by name."""
    problems: dict[str, Callable[[], TiltedProblem]] = {}
    for point in installed_names("hnkit.problems"):
        problems.update(load_installed("hnkit.problems", point))
    return problems


def chosen_problems(names: Sequence[str], alpha: float | None = None) -> list[TiltedProblem]:
    """The problems of these names, all if none is named, at their own or at another temperature.

    Names of reference maps are accepted and passed over.

    Raises:
        InputError: an unknown name, or a temperature outside 1e-3 to 1e4.
    """
    if alpha is not None and not _ALPHAS[0] <= alpha <= _ALPHAS[1]:
        raise InputError(
            f"--alpha {alpha:g}: closed forms in double precision keep the digits that the checks need from "
            f"{_ALPHAS[0]:g} to {_ALPHAS[1]:g}: give a temperature between"
        )
    installed = installed_problems()
    for name in names:
        if name not in installed and name not in reference_maps():
            accepted = ", ".join([*installed, *reference_maps()])
            raise InputError(f"unknown toy {name!r}: accepted are {accepted}")
    chosen = dict.fromkeys(names or installed)
    problems = [installed[name]() for name in chosen if name in installed]
    return problems if alpha is None else [problem.with_alpha(alpha) for problem in problems]


def reference_maps() -> dict[str, tuple[NoiseMap, int, str]]:
    """Maps whose figures are known or certified: name -> (map, dimension, what it shows)."""
    turn = torch.tensor([[0.0, 0.5, 0.0, 0.0], [-0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3], [0.0, 0.0, -0.3, 0.0]])
    affine = nn.Linear(4, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    affine.weight.copy_(turn.double())
    shrink = nn.Linear(5, 5, bias=False, dtype=torch.float64).requires_grad_(False)
    shrink.weight.copy_(-0.6 * torch.eye(5, dtype=torch.float64))
    return {
        "gradient-field": (_Sine(), 1, "f(x) = 0.2 sin 3x: L < 1, and the L2 term is a tenth of the KL"),
        "contraction": (contraction(6, 0.6), 6, "two layers around tanh, certified L = 0.6: L2 is accurate"),
        "rotation": (affine, 4, "f(x) = Kx, K skew: E(J) < 0, the L2 term overcounts"),
        "extremal": (shrink, 5, "f(x) = -0.6 x: attains Theorem 7 and the Frobenius bound"),
    }


class _Sine(nn.Module):
    """`f(x) = 0.2 sin 3x`, whose constant is 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * torch.sin(3 * x)

    def lipschitz_upper(self) -> float:
        """`sup |f'| = 0.6`."""
        return 0.6


def verify_toys(
    problems: Sequence[TiltedProblem],
    settings: VerifySettings,
    *,
    references: Sequence[str] | None = None,
    say: Say = lambda _: None,
) -> Report:
    """Check every statement on closed-form problems, and on reference maps.

    Args:
        problems: what is checked.
        settings: of the run.
        references: names of the reference maps that are checked too; `None`: all.
        say: called with the name of each part when it begins.
    """
    samples = settings.samples or TOY_SAMPLES
    checks: list[Check] = []
    figures: list[Quantity] = []
    notes: list[tuple[str, str]] = []
    subjects: list[Subject] = []
    for name, (f, dim, shows) in reference_maps().items():
        if references is not None and name not in references:
            continue
        say(name)
        x = torch.randn(samples, dim, dtype=torch.float64, generator=generator_for(settings.seed, f"maps/{name}"))
        subject = _subject(name, f, x, settings)
        subjects.append(subject)
        notes.append((name, shows))
        checks += MAP_CHECKS.run(subject, name)
        found, failed = reported("figures", name, partial(_headline, subject))
        figures += found
        checks += failed
        if settings.certify:
            checks += certified_checks(subject)
    tilts = []
    for problem in problems:
        say(problem.name)
        tilted = Tilted(problem, samples, settings.seed)
        tilts.append(tilted)
        notes.append((problem.name, problem.statement))
        subject = replace(_subject(problem.name, tilted.optimum, tilted.x, settings), smooth=False, continuous=True)
        subjects.append(subject)
        checks += TOY_CHECKS.run(tilted, problem.name)
        checks += MAP_CHECKS.run(subject, problem.name)
        for make in (partial(_headline, subject), partial(_toy_figures, tilted)):
            found, failed = reported("figures", problem.name, make)
            figures += found
            checks += failed
        if settings.certify:
            checks += certified_checks(subject)
    names = [subject.name for subject in subjects]
    plots, failed = reported("plots", names[-1], partial(toy_plots, subjects, tilts)) if names else ([], ())
    checks += failed
    title = "hnkit verify-bound: " + (names[0] if len(names) == 1 else f"{len(problems)} closed-form problems")
    config = {"toys": names, "alpha": {p.name: p.alpha for p in problems}}
    return Report(
        title,
        {**config, **settings.to_config(), "samples": samples},
        tuple(checks),
        tuple(figures),
        tuple(notes),
        tuple(plots),
    )


def _subject(name: str, f: NoiseMap, x: Tensor, settings: VerifySettings, module: NoiseMap | None = None) -> Subject:
    dim = x[0].numel()
    method = settings.method_for(dim)
    options = dict(settings.options)
    return Subject(name, f, x, settings.seed, method, options, module, ascent_steps=25 if dim <= 64 else 5)


def _headline(subject: Subject) -> list[Quantity]:
    """The few figures of a map that the summary of many maps shows."""
    return [figure for figure in map_figures(subject) if figure.name in _HEADLINE]


_HEADLINE = ("KL (Stein form)", "L2 term", "relative error of L2", "symmetry index", "Theorem 7 bound")


def _toy_figures(tilted: Tilted) -> list[Quantity]:
    problem = tilted.problem
    found = [Quantity("log Z*", problem.log_z(), problem.name)]
    rows = (
        ("KL(p0* || p0)", "kl_optimal", "closed form or quadrature"),
        ("gap of the L2 optimum", "l2_gap", "KL(law of the proximal map || p0*)"),
        ("gap of the second-order optimum", "second_order_gap", ""),
    )
    for name, member, note in rows:
        if member not in problem.unavailable:
            found.append(Quantity(name, float(getattr(problem, member)()), problem.name, note=note))
    return found


# --- one map ----------------------------------------------------------------------------------------------------


def verify_map(f: NoiseMap, shape: tuple[int, ...], settings: VerifySettings, *, name: str = "map") -> Report:
    """Measure and check one map; see `hnkit.verify_bound`."""
    if not shape or any(size < 1 for size in shape):
        raise InputError(f"shape {shape}: give positive sizes, such as 3,16,16")
    samples = settings.samples_for(math.prod(shape))
    x = torch.randn(samples, *shape, dtype=torch.float64, generator=generator_for(settings.seed, "noise"))
    device, dtype = _home(f)
    subject = _subject(name, f, x.to(device, dtype), settings)
    subject.validate()
    subject = replace(subject, smooth=not _has_kinks(f))
    return _map_report(subject, settings, {"map": name, "shape": list(shape)})


def _map_report(
    subject: Subject,
    settings: VerifySettings,
    config: Mapping[str, Any],
    extra: Sequence[Quantity] = (),
    more_checks: Sequence[Check] = (),
) -> Report:
    try:
        _ = subject.stein  # a KL that cannot be estimated is bad input: one line, and no report
    except NotApplicable as reason:
        raise ExpansiveMapError(str(reason)) from None
    checks = [*MAP_CHECKS.run(subject, subject.name), *more_checks]
    if settings.certify:
        checks += certified_checks(subject)
    return Report(
        f"hnkit verify-bound: {subject.name}",
        {**config, **settings.to_config(), "samples": len(subject.x), "method": subject.method},
        tuple(checks),
        (*map_figures(subject), *extra),
        tuple((subject.name, sentence) for sentence in invertibility(subject)),
        tuple(map_plots(subject)),
    )


def _home(f: NoiseMap) -> tuple[torch.device, torch.dtype]:
    """Where a map computes and in which type: a module's own, float64 on the CPU for a plain function."""
    if isinstance(f, nn.Module):
        for tensor in [*f.parameters(), *f.buffers()]:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float64


def _has_kinks(f: NoiseMap) -> bool:
    """Whether finite differences of the map may straddle a kink: unknown for a plain function, so yes."""
    kinked = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.PReLU, nn.ReLU6, nn.MaxPool2d, nn.Threshold, nn.Hardswish)
    return not isinstance(f, nn.Module) or any(isinstance(module, kinked) for module in f.modules())


def map_figures(subject: Subject) -> list[Quantity]:
    """Every figure of a map, with error bars where they are known."""
    kl, name, error = subject.stein, subject.name, subject.error
    relative, relative_stderr = ratio_and_stderr(-error, kl.per_sample)
    residual, residual_stderr = mean_and_stderr(subject.alignment - subject.traces)
    what = {
        "certified": "T is certified injective",
        "unknown": "a lower bound of the KL unless T is injective",
        "violated": "a lower bound of the KL: T folds",
    }[kl.injective]
    figures = [
        Quantity("KL (Stein form)", kl.value, name, kl.stderr, kl.bias_bound, note=what),
        _mean("KL (change of variables)", subject.change_from_stein, name, "eq. 53"),
        _mean("L2 term", subject.half_square, name, "E|f|²/2"),
        _mean("E(J)", error, name, "E[tr J - log|det(I+J)|], what the L2 term leaves out"),
        Quantity("relative error of L2", 100 * relative, name, 100 * relative_stderr, unit="%", note="(L2 - KL) / KL"),
        Quantity("symmetry index", kl.symmetry_index, name, unit="", note="E tr(J²) / E|J|_F², in [-1, 1]"),
        Quantity(
            "Stein residual z", residual / residual_stderr if residual_stderr else math.nan, name, unit="",
            note="E[x·f - tr J] over its standard error",
        ),
        Quantity(
            "mean shift's share", mean_shift_share(subject.value.double().flatten(1).cpu()), name, unit="",
            note="|E f|² / E|f|²",
        ),
    ]  # fmt: skip
    return [*figures, *_norm_figures(subject), *_bound_figures(subject)]


def _mean(label: str, values: Tensor, group: str, note: str) -> Quantity:
    mean, stderr = mean_and_stderr(values)
    return Quantity(label, mean, group, stderr, note=note)


def _norm_figures(subject: Subject) -> list[Quantity]:
    name, norms = subject.name, subject.norms
    levels = {"10 %": 0.1, "median": 0.5, "90 %": 0.9}
    figures = [
        Quantity(f"local norm, {label}", float(norms.quantile(level)), name, unit="", note="|J(x)|₂")
        for label, level in levels.items()
    ]
    figures.append(Quantity("local norm, largest", float(norms.max()), name, unit="", note="sampled, no bound of L"))
    figures.append(Quantity("Lipschitz, ascended", subject.lower.value, name, unit="", note="a lower bound of L"))
    constant = subject.certified_constant
    if constant is not None:
        figures.append(Quantity("Lipschitz, certified", constant, name, unit="", note="an upper bound of L"))
    return figures


def _bound_figures(subject: Subject) -> list[Quantity]:
    """Bounds on `E|E(J)|`; one that rests on an estimated constant is called an estimate."""
    name, figures = subject.name, []
    certified = subject.certified_constant
    constant = subject.lower.value if certified is None else certified
    if constant < 1:
        known = certified is not None
        label, note = ("bound", "certified L") if known else ("estimate", "L is estimated, not certified")
        figures.append(Quantity(f"Theorem 7 {label}", float(theorem7_bound(subject.dim, constant)), name, note=note))
    norms = subject.norms
    if float(norms.max()) < 1:
        local = local_theorem7_bound(subject.dim, norms)
        figures.append(_mean("local Theorem 7 bound", local, name, "E[d h(|J(x)|₂)]"))
    rows = subject.rows_or_none
    if rows is None:
        if float(norms.max()) < 1:
            share = frobenius_bound(1.0, norms) * subject.probed_frobenius
            figures.append(_mean("Frobenius estimate", share, name, "|J|_F² from probes"))
        return figures
    kept = rows.contracting
    if bool(kept.all()):
        frobenius = frobenius_bound(rows.frobenius, rows.norm)
        remainder = second_order_remainder_bound(rows.frobenius, rows.norm)
        figures += [
            _mean("Frobenius bound", frobenius, name, "E[(|J|_F²/L²) h(L)], L = |J(x)|₂"),
            _mean("singular-value bound", rows.singular, name, "E Σ h(σᵢ)"),
            _mean("second-order remainder bound", remainder, name, "on |E(J) - tr(J²)/2|"),
        ]
    figures.append(_mean("second-order term", rows.trace_square / 2, name, "E tr(J²)/2"))
    if bool((rows.least_symmetric > -1).all()):
        figures += [
            _mean("field of values, lower", rows.field_lower, name, "E(J) is above it"),
            _mean("field of values, upper", rows.field_upper, name, "E(J) is below it"),
        ]
    return figures


def invertibility(subject: Subject) -> list[str]:
    """What can and what cannot be said about the injectivity of T, hence about what the exact value is."""
    status = subject.stein.injective
    if status == "certified":
        how = certify_injective(subject.f if subject.module is None else subject.module).how
        return [f"T(x) = x + f(x) is certified injective ({how}), so the exact value is the KL."]
    rows = subject.rows_or_none
    if status == "violated":
        return ["T folds: det(I + J) changes sign among the samples. The exact value is a lower bound of the KL."]
    certificate = subject.certificate
    reason = certificate if isinstance(certificate, str) else f"certified L = {certificate.value:.4g}"
    sentence = f"Injectivity of T is not certified ({reason})."
    seen = f" No fold was seen at {len(rows.sign)} samples, which proves nothing." if rows is not None else ""
    norm = float(subject.norms.max())
    local = f" The largest local norm seen is {norm:.3g}" + (
        ": every sample is locally a contraction." if norm < 1 else ", above 1: Lemma 5 cannot apply."
    )
    return [sentence + seen + local + " The exact value is the KL if T is injective, else a lower bound of it."]


# --- a trained network ------------------------------------------------------------------------------------------


def verify_backend(
    backend: Backend, prompts: Sequence[str], settings: VerifySettings, *, alpha: float | None = None
) -> Report:
    """Measure a trained hypernetwork, prompt by prompt and overall; see `hnkit.verify_bound`.

    Args:
        backend: with its adapter loaded.
        prompts: each gets an equal share of the samples.
        settings: of the run.
        alpha: temperature it was trained at, for the optimality gap of a backend whose tilted law is known.
    """
    per_prompt = max(1, settings.samples_for(math.prod(backend.noise_shape)) // len(prompts))
    rows = [prompt for prompt in prompts for _ in range(per_prompt)]
    network = backend.hypernetwork.eval()
    parameter = next(iter(network.parameters()), torch.zeros(()))
    full = completed(backend)
    x = torch.randn(
        len(rows), *full.noise_shape, dtype=full.noise_dtype, generator=generator_for(settings.seed, "noise")
    ).to(parameter.device)
    f = full.map_for(rows)
    subject = _subject(backend.name, f, x, settings)
    subject.validate()
    subject = replace(subject, smooth=not _has_kinks(network))
    extra = _prompt_figures(subject, prompts, per_prompt) if len(prompts) > 1 else []
    problem: TiltedProblem | None = full.problem
    config: dict[str, Any] = {"backend": backend.name, "prompts": list(prompts)}
    if problem is not None:
        problem = problem if alpha is None else problem.with_alpha(alpha)
        gap = optimality_gap(problem, f, x.double())
        config["alpha"] = problem.alpha
        note = f"{gap.kind}; KL(p0^phi || p0*) on {problem.name}, alpha = {problem.alpha:g}"
        extra = [Quantity("optimality gap", gap.value, backend.name, gap.stderr, note=note), *extra]
    return _map_report(subject, settings, config, extra)


def _prompt_figures(subject: Subject, prompts: Sequence[str], per_prompt: int) -> list[Quantity]:
    figures = []
    for index, prompt in enumerate(prompts):
        rows = slice(index * per_prompt, (index + 1) * per_prompt)
        name = f"{subject.name}: {prompt}" if index < _PROMPTS_SHOWN else ""
        if not name:
            break
        integrand, half = subject.stein.per_sample[rows], subject.half_square[rows]
        if len(integrand) < per_prompt:  # a budget has stopped the estimate before this prompt
            break
        relative, spread = ratio_and_stderr(half - integrand, integrand)
        share = mean_shift_share(subject.value[rows].double().flatten(1).cpu())
        figures += [
            _mean("KL (Stein form)", integrand, name, ""),
            _mean("L2 term", half, name, ""),
            Quantity("relative error of L2", 100 * relative, name, 100 * spread, unit="%"),
            Quantity("mean shift's share", share, name, unit=""),
        ]
    return figures


# --- certification ----------------------------------------------------------------------------------------------


def certified_checks(subject: Subject) -> list[Check]:
    """Enclosures of E(A) and its bounds in ball arithmetic, as checks; needs python-flint."""
    from hnkit.checks.matrices import CERTIFIED_CHECKS, Certified

    return list(CERTIFIED_CHECKS.run(Certified(subject), subject.name))


__all__ = [
    "VerifySettings",
    "chosen_problems",
    "installed_problems",
    "map_figures",
    "reference_maps",
    "verify_backend",
    "verify_map",
    "verify_toys",
]


def checks_by_proof() -> dict[str, list[str]]:
    """Folder in `proofs/` and the checks of `verify-bound` whose statements are derived there."""
    from hnkit.checks.maps import MAP_CHECKS
    from hnkit.checks.matrices import CERTIFIED_CHECKS
    from hnkit.checks.problems import TOY_CHECKS

    found: dict[str, list[str]] = {}
    for registry in (MAP_CHECKS, TOY_CHECKS, CERTIFIED_CHECKS):
        for name, statement in registry.statements.items():
            found.setdefault(statement.proof, []).append(name)
    return found
