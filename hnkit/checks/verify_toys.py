"""`verify-bound` on closed-form problems and on the reference maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hnkit.backend import installed_names, load_installed
from hnkit.checks.card import failing, map_figures, toys_card, with_checks
from hnkit.checks.check import Check, reported
from hnkit.checks.injected import INJECTED_CHECKS
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.matrices import certified_checks
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.checks.plots import toy_plots
from hnkit.checks.problems import TOY_CHECKS
from hnkit.checks.quantities import Quantity, map_quantities, problem_quantities
from hnkit.checks.reference_maps import reference_maps
from hnkit.checks.report import Report
from hnkit.checks.settings import Say, VerifySettings
from hnkit.errors import InputError
from hnkit.figures.measured_map import MeasuredMap
from hnkit.internal.kept import Keep, not_kept
from hnkit.internal.seeds import generator_for
from hnkit.internal.workers import ALONE, Workers, all_made
from hnkit.output.page import Card
from hnkit.output.verdict import verdict_card
from hnkit.tilt import TiltedProblem

TOY_SAMPLES = 2048
_ALPHAS = (1e-3, 1e4)


def installed_problems(names: Sequence[str] = ()) -> dict[str, Callable[[], TiltedProblem]]:
    """Every closed-form problem of the installed distributions, by name.

    Args:
        names: the names of those that are needed, all if none is named: a distribution that is broken is an error where
            one of these may be its.

    Raises:
        InputError: a distribution is broken, or two of them have a problem of one name.
    """
    problems: dict[str, Callable[[], TiltedProblem]] = {}
    broken: InputError | None = None
    for point in installed_names("hnkit.problems"):
        try:
            offered = load_installed("hnkit.problems", point)
        except InputError as error:
            broken = error
            continue
        for name, build in offered.items():
            if name in problems or name in reference_maps():
                raise InputError(f"two toys are named {name!r}, one of them by {point!r}: uninstall what brings it")
            problems[name] = build
    known = {*problems, *reference_maps()}
    if broken is not None and not (names and known.issuperset(names)):
        raise broken
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
    installed = installed_problems(names)
    for name in names:
        if name not in installed and name not in reference_maps():
            accepted = ", ".join([*installed, *reference_maps()])
            raise InputError(f"unknown toy {name!r}: accepted are {accepted}")
    chosen = dict.fromkeys(names or installed)
    problems = [installed[name]() for name in chosen if name in installed]
    return problems if alpha is None else [problem.with_alpha(alpha) for problem in problems]


def verify_toys(
    problems: Sequence[TiltedProblem],
    settings: VerifySettings,
    *,
    references: Sequence[str] | None = None,
    say: Say = lambda _: None,
    keep: Keep = not_kept,
    workers: Workers = ALONE,
) -> Report:
    """Check every statement on closed-form problems, and on reference maps.

    Args:
        problems: what is checked.
        settings: the settings of the run.
        references: names of the reference maps that are checked too; `None`: all.
        say: a function that is called with the name of each part when it begins.
        keep: parts that it knows are taken from it, the others are left to it.
        workers: the processes that the problems and maps are shared out over, one part each.
    """
    samples = settings.samples or TOY_SAMPLES
    subjects: list[_Subject] = []
    for name, (f, dim, shows) in reference_maps().items():
        if references is None or name in references:
            x = torch.randn(samples, dim, dtype=torch.float64, generator=generator_for(settings.seed, f"maps/{name}"))
            subjects.append(_Subject(replace(settings.measured(name, f, x), certifiable=True), shows))
    for problem in problems:
        known = MeasuredProblem(problem, samples, settings.seed)
        optimum = settings.measured(problem.name, known.optimum, known.x)
        subjects.append(_Subject(replace(optimum, smooth=False, continuous=True), problem.statement, known))

    def part(subject: _Subject) -> _Part:
        say(subject.map.name)
        return _Part(*keep(subject.map.name, lambda: tuple(vars(_part(subject, settings)).values())))

    parts = all_made(subjects, workers, part)
    for subject, found in zip(subjects, parts, strict=True):
        subject.recall(found)
    checks = [check for found in parts for check in found.checks]
    figures = [figure for found in parts for figure in found.figures]
    notes = [(subject.map.name, subject.shows) for subject in subjects]
    maps = [subject.map for subject in subjects]
    problems_measured = [subject.problem for subject in subjects if subject.problem is not None]
    names = [measured.name for measured in maps]
    plots, undrawn = reported("plots", names[-1], partial(toy_plots, maps, problems_measured)) if names else ([], ())
    cards, unread = reported("card", names[-1], lambda: [_card(maps, problems_measured, checks)]) if names else ([], ())
    checks += [*undrawn, *unread]
    title = "hnkit verify-bound: " + (names[0] if len(names) == 1 else f"{len(names)} toys")
    config = {"toys": names, "alpha": {p.name: p.alpha for p in problems}}
    return Report(
        title,
        {**config, **settings.to_config(), "samples": samples},
        tuple(checks),
        tuple(figures),
        tuple(notes),
        tuple(plots),
        cards[0] if cards else None,
    )


def _card(maps: Sequence[MeasuredMap], problems: Sequence[MeasuredProblem], checks: Sequence[Check]) -> Card:
    """The card of the run: of the one toy, or of all."""
    if len(maps) > 1:
        return toys_card(maps, checks)
    known = replace(map_figures(maps[0]), failing=failing(checks))
    if problems and "l2_gap" not in problems[0].problem.unavailable:
        known = replace(known, l2_gap=problems[0].ask("l2_gap"))
    return with_checks(verdict_card(known), checks)


@dataclass(frozen=True)
class _Subject:
    """A map with its noise, what it shows, and the problem whose optimum it is, if it is one."""

    map: MeasuredMap
    shows: str
    problem: MeasuredProblem | None = None

    def recall(self, part: _Part) -> None:
        """Take what another process has measured on it as measured here."""
        vars(self.map).update(part.measured)
        if self.problem is not None:
            vars(self.problem).update(part.known)


@dataclass(frozen=True)
class _Part:
    """What is found out about one subject: checks and figures, and the tensors that plots are drawn from."""

    checks: list[Check]
    figures: list[Quantity]
    measured: dict[str, Any]
    known: dict[str, Any]


_DRAWN = (
    "estimate", "error", "value", "half_square", "rows_or_none", "norms", "lower", "certificate", "l2_verdict",
)  # fmt: skip
"""What plots and card read of a map once it is measured."""


def _part(subject: _Subject, settings: VerifySettings) -> _Part:
    """Every check and every figure of one subject."""
    measured, known = subject.map, subject.problem
    checks: list[Check] = [] if known is None else [*TOY_CHECKS.run(known, measured.name)]
    checks += MAP_CHECKS.run(measured, measured.name)
    checks += INJECTED_CHECKS.run(measured, measured.name)
    figures: list[Quantity] = []
    readings = [map_quantities(measured, headlines=True), *([problem_quantities(known)] if known else [])]
    for found, failed in readings:
        figures += found
        checks += failed
    if settings.certify:
        checks += certified_checks(measured)
    drawn = {name: vars(measured)[name] for name in _DRAWN if name in vars(measured)}
    noise = {} if known is None else {name: vars(known)[name] for name in ("tilted_noise",) if name in vars(known)}
    return _Part(checks, figures, drawn, noise)
