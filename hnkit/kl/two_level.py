"""A KL from a costly method at some samples and the second-order term at the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.stats import Estimate
from hnkit.kl.control import FEWEST, two_level_mean
from hnkit.kl.divergence import Method, noise_kl
from hnkit.kl.method import check_counts
from hnkit.maps import NoiseMap, at_rows


def two_level_kl(
    f: NoiseMap,
    x: Tensor,
    *,
    costly: int,
    method: Method = "low-rank",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Estimate:
    """Estimate the mean KL integrand (Stein form) by `method` at `costly` of the samples, chosen at random.

    The other samples get `|f|^2/2 + tr(J^2)/2` by two products and one probe each, whose mean a regression, fitted
    across two halves of the costly samples, turns into a correction without bias (see `two_level_mean`). It pays where
    the second order follows `E(J)` from sample to sample, as on trained networks, and `method` costs tens of products.

    Args:
        f: batch-first map.
        x: `(n, *shape)`, draws of `N(0, I_d)`.
        costly: samples at which `method` is run, 16 or more, and 8 fewer than n or less.
        method: a method of `noise_kl` that looks at J.
        generator: the generator of the choice and of the probes.
        options: further options of `noise_kl` for `method`.

    Returns:
        The mean and its standard error, nats; the truncation of `method`, where it has one, is not in it.

    Raises:
        InputError: too few samples; what `noise_kl` refuses.

    Source: `proofs/stein_control_variate`.
    """
    check_counts(costly=costly)
    n = len(x)
    if not 2 * FEWEST <= costly <= n - FEWEST:
        raise InputError(f"costly = {costly} of {n} samples: give {2 * FEWEST} or more, and leave {FEWEST} or more")
    device = generator.device if generator is not None else x.device
    order = torch.randperm(n, generator=generator, device=device).to(x.device)
    few = noise_kl(*at_rows(f, x, order[:costly]), method=method, generator=generator, certify=False, **options)
    if few.samples < costly or not bool(few.parts.square.isfinite().all()):
        raise InputError(f"method {few.method} did not look at J at {costly} samples: name another, without a budget")
    rest = at_rows(f, x, order[costly:])
    cheap = noise_kl(*rest, method="second-order", generator=generator, certify=False, check=False)
    return two_level_mean(few.parts.l2 + few.parts.error, few.parts.l2 + few.parts.square / 2, cheap.per_sample)
