"""`verify-bound` on one map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hnkit.checks.card import failing, map_figures, with_checks
from hnkit.checks.check import reported
from hnkit.checks.injected import INJECTED_CHECKS
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.matrices import certified_checks
from hnkit.checks.plots import map_plots
from hnkit.checks.quantities import Quantity, map_quantities
from hnkit.checks.report import Report
from hnkit.checks.settings import VerifySettings
from hnkit.errors import InputError
from hnkit.figures.measured_map import MeasuredMap
from hnkit.internal.kept import Keep, not_kept
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import Estimate, rounded_up
from hnkit.internal.workers import ALONE, Workers
from hnkit.lipschitz.certify import certify_injective
from hnkit.maps import NoiseMap
from hnkit.output.verdict import verdict_card


def verify_map(
    f: NoiseMap,
    shape: tuple[int, ...],
    settings: VerifySettings,
    *,
    name: str = "map",
    keep: Keep = not_kept,
    workers: Workers = ALONE,
) -> Report:
    """Measure and check one map; see `hnkit.verify_bound`.

    The samples are shared out over `workers`; parts that `keep` knows are taken from it, the others are left to it.
    """
    if not shape or any(size < 1 for size in shape):
        raise InputError(f"shape {shape}: give positive sizes, such as 3,16,16")
    samples = settings.samples_for(math.prod(shape))
    x = torch.randn(samples, *shape, dtype=torch.float64, generator=generator_for(settings.seed, "noise"))
    device, dtype = _home(f)
    measured = settings.measured(name, f, x.to(device, dtype), workers=workers)
    measured.validate()
    measured = replace(measured, smooth=not has_kinks(f), injection=settings.injection, keep=keep)
    return map_report(measured, settings, {"map": name, "shape": list(shape)})


def map_report(
    measured: MeasuredMap,
    settings: VerifySettings,
    config: Mapping[str, Any],
    extra: Sequence[Quantity] = (),
    gap: Estimate | None = None,
) -> Report:
    """The report on one measured map: its checks, its figures and those in `extra`, its plots.

    `gap` is the distance from a known target, for the card.

    Raises:
        InputError: its KL cannot be estimated by the method.
    """
    _ = measured.estimate  # a KL that cannot be estimated is bad input: one line, and no report
    name, keep = measured.name, measured.keep
    checks = [*MAP_CHECKS.run(measured, name, keep), *INJECTED_CHECKS.run(measured, name, keep)]
    figures, unread = keep("figures", lambda: map_quantities(measured))
    plots, undrawn = reported("plots", measured.name, partial(map_plots, measured))
    checks += [*unread, *undrawn]
    if settings.certify:
        checks += keep("enclosures", lambda: certified_checks(measured))
    notes = [*l2_verdict(measured), *deployment(measured), *invertibility(measured)]
    known = replace(map_figures(measured), gap=gap, failing=failing(checks))
    return Report(
        f"hnkit verify-bound: {measured.name}",
        {**config, **settings.to_config(), "samples": len(measured.x), "method": measured.method},
        tuple(checks),
        (*figures, *extra),
        tuple((measured.name, sentence) for sentence in notes),
        tuple(plots),
        with_checks(verdict_card(known), checks),
    )


def _home(f: NoiseMap) -> tuple[torch.device, torch.dtype]:
    """Where a map computes and in which type: a module's own, float64 on the CPU for a plain function."""
    if isinstance(f, nn.Module):
        for tensor in [*f.parameters(), *f.buffers()]:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float64


def has_kinks(f: NoiseMap) -> bool:
    """Whether finite differences of the map may straddle a kink: unknown for a plain function, so yes."""
    kinked = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.PReLU, nn.ReLU6, nn.MaxPool2d, nn.Threshold, nn.Hardswish)
    return not isinstance(f, nn.Module) or any(isinstance(module, kinked) for module in f.modules())


def l2_verdict(measured: MeasuredMap) -> list[str]:
    """What the look that training takes shows of the L2 term, beside what was measured; nothing where it bounds the KL.

    It bounds what it cannot see, so that it may say less than they do: that is said before it.
    """
    verdict = measured.l2_verdict if measured.injection is None else None
    if verdict is None:
        return []
    return [
        f"The quick look that training takes, {verdict.samples} samples and a handful of products, rests on less than "
        f"the figures below: {verdict.finding}."
    ]


def deployment(measured: MeasuredMap) -> list[str]:
    """What is known of the KL of a hypernetwork that is deployed with injected noise; nothing of another."""
    if measured.injection is None:
        return []
    share = measured.injection.share
    return [
        f"Deployed with injected noise, share {share:g}: {measured.injected.sentence()}.",
        "All other figures of the KL, of J and of T are those of x + f(x) without the injected noise, which is not "
        "what is deployed.",
    ]


def invertibility(measured: MeasuredMap) -> list[str]:
    """What can and what cannot be said about the injectivity of T, hence about what the exact value is."""
    status = measured.stein.injective
    if status == "certified":
        how = certify_injective(measured.f if measured.module is None else measured.module).how
        return [f"T(x) = x + f(x) is certified injective ({how}), so the exact value is the KL."]
    folds = measured.stein.folds
    if status == "violated":
        return [f"T folds: det(I + J) changes sign, {folds}. The exact value is a lower bound of the KL."]
    certificate = measured.certificate
    reason = certificate if isinstance(certificate, str) else f"certified L = {rounded_up(certificate.value)}"
    sentence = f"Injectivity of T is not certified ({reason})."
    seen = (
        "" if folds is None else f" There is {folds}, which is no proof." if folds.negative == 0 else f" Seen: {folds}."
    )
    norm = float(measured.norms.max())
    local = f" The largest local norm seen is {norm:.3g}" + (
        ": every sample is locally a contraction." if norm < 1 else ", above 1: f is no contraction."
    )
    return [sentence + seen + local + " The exact value is the KL if T is injective, else a lower bound of it."]
