"""`verify-bound` on a trained hypernetwork, prompt by prompt and overall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hnkit.backend import Backend, completed, image_noise
from hnkit.checks.quantities import Quantity, prompt_quantities
from hnkit.checks.report import Report
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_map import has_kinks, map_report
from hnkit.internal.kept import Keep, not_kept
from hnkit.internal.stats import Estimate
from hnkit.internal.workers import ALONE, Workers
from hnkit.maps import Condition, NoiseMap
from hnkit.tilt import TiltedProblem, injected_gap, optimality_gap


def verify_backend(
    backend: Backend,
    prompts: Sequence[str],
    settings: VerifySettings,
    *,
    alpha: float | None = None,
    keep: Keep = not_kept,
    workers: Workers = ALONE,
) -> Report:
    """Measure a trained hypernetwork, prompt by prompt and overall; see `hnkit.verify_bound`.

    Args:
        backend: the backend, with its adapter loaded.
        prompts: each gets an equal share of the samples.
        settings: the settings of the run.
        keep: parts of the report that it knows are taken from it, the others are left to it.
        alpha: temperature it was trained at, for the optimality gap of a backend whose tilted law is measured.
        workers: the processes that the samples are shared out over.
    """
    per_prompt = max(1, settings.samples_for(math.prod(backend.noise_shape)) // len(prompts))
    rows = [prompt for prompt in prompts for _ in range(per_prompt)]
    network = backend.hypernetwork.eval()
    full = completed(backend)
    images = Condition(tuple(rows)).of_images(settings.seed, [*range(per_prompt)] * len(prompts))
    x = image_noise(backend, images)
    f = full.map_for(rows)
    measured = settings.measured(backend.name, f, x, trained=True, workers=workers)
    measured.validate()
    measured = replace(measured, smooth=not has_kinks(network), injection=full.injection, keep=keep)
    away = None
    extra = prompt_quantities(measured, prompts, per_prompt) if len(prompts) > 1 else []
    problem: TiltedProblem | None = full.problem
    config: dict[str, Any] = {"backend": backend.name, "prompts": list(prompts)}
    if problem is not None:
        problem = problem if alpha is None else problem.with_alpha(alpha)
        config["alpha"] = problem.alpha
        where = f"KL(p0^phi || p0*) on {problem.name}, alpha = {problem.alpha:g}"
        if full.injection is None:
            found = keep("optimality gap", partial(_gap, problem, f, x, backend.name, where))
            away = Estimate(found.value, math.nan if found.stderr is None else found.stderr)
        else:
            most = injected_gap(problem, full.injection, measured.value, x, images.generators("fresh noise"))
            found = Quantity("optimality gap, at most", most.value, backend.name, most.stderr, note=where)
        extra = [found, *extra]
    return map_report(measured, settings, config, extra, away)


def _gap(problem: TiltedProblem, f: NoiseMap, x: Tensor, group: str, where: str) -> Quantity:
    gap = optimality_gap(problem, f, x.double())
    return Quantity("optimality gap", gap.value, group, gap.stderr, note=f"{gap.kind}; {where}")
